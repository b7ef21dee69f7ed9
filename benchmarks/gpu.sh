#!/usr/bin/env bash
# Tests and measures the Triton kernels on a machine with an NVIDIA GPU and a CUDA build of torch.
#
#   OUT=results bash benchmarks/gpu.sh      PYTHON=/path/to/python names the interpreter that has torch
#
# Writes $OUT/gpu_tests.log and $OUT/gpu_ops.json. Needs no network if triton and pytest are installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"

"$python" - <<'CHECK'
import sys
import torch

if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: torch must see a CUDA device, got none (torch {torch.__version__})")
CHECK
missing=$("$python" -c 'import importlib.util as u; print(*[m for m in ("triton", "pytest", "pybind11") if not u.find_spec(m)])')
if [ -n "$missing" ]; then
  "$python" -m pip install -q $missing
fi
"$python" setup.py -q build_ext --inplace --only=_ops # the CPU kernels, which other tests of herdkern.ops use

export PYTHONPATH=$PWD CUBLAS_WORKSPACE_CONFIG=:4096:8 # what torch asks for where products must be deterministic
"$python" -m pytest -q -p no:cacheprovider tests/ops -k test_triton 2>&1 | tee "$OUT/gpu_tests.log"
"$python" benchmarks/gpu_ops.py --json "$OUT/gpu_ops.json"
