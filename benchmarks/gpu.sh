#!/usr/bin/env bash
# Tests and measures the kernels on a machine with an NVIDIA GPU and a CUDA build of torch, in under nine minutes.
#
#   OUT=results bash benchmarks/gpu.sh      PYTHON=/path/to/python names the interpreter that has torch
#   bash benchmarks/gpu.sh --rehearse       the whole of it on tiny sizes, on a CPU
#
# Writes $OUT/gpu_tests.log and $OUT/h200.json (the second anew after each row: what is stopped leaves what it has).
# Needs no network if triton, pytest and pybind11 are installed. The tests have two minutes, the rest what is left of
# eight and a half.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
rehearse=
tests="tests/ops -k test_triton"
if [ "${1:-}" = --rehearse ]; then
  rehearse=--rehearse
  tests="tests/ops/test_triton_swiglu.py"
fi
mkdir -p "$OUT"
began=$SECONDS

if [ -z "$rehearse" ]; then
  "$python" - <<'CHECK' || exit 1
import sys
import torch

if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: torch must see a CUDA device, got none (torch {torch.__version__})")
CHECK
  missing=$("$python" -c 'import importlib.util as u; print(*[m for m in ("triton", "pytest", "pybind11") if not u.find_spec(m)])')
  if [ -n "$missing" ]; then
    "$python" -m pip install -q $missing
  fi
  # the CPU kernels, which other tests of herdkern.ops use, and those of CUDA for this GPU alone
  "$python" setup.py -q build_ext --inplace --only=_ops || exit 1
  archs=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a in (9, 10)))')
  HERDKERN_CUDA=1 HERDKERN_CUDA_ARCHS=$archs timeout 150 "$python" setup.py -q build_ext --inplace --only=_cuda ||
    echo "gpu.sh: _cuda was not built; only the Triton kernels are measured"
fi

export PYTHONPATH=$PWD CUBLAS_WORKSPACE_CONFIG=:4096:8 # what torch asks for where products must be deterministic
timeout 120 "$python" -m pytest -q -p no:cacheprovider $tests 2>&1 | tee "$OUT/gpu_tests.log"
tested=${PIPESTATUS[0]}
left=$((510 - (SECONDS - began)))
timeout $((left + 20)) "$python" benchmarks/gpu_ops.py $rehearse --seconds "$left" --json "$OUT/h200.json"
measured=$?
# a small case under compute-sanitizer, where there is time and the tool
if [ -z "$rehearse" ] && [ $((SECONDS - began)) -lt 480 ] && command -v compute-sanitizer >/dev/null; then
  timeout 50 compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider \
    tests/ops/test_triton_swiglu.py -k packed 2>&1 | tail -5 | tee "$OUT/sanitizer.log"
fi
echo "gpu.sh: tests $tested, gpu_ops $measured, $((SECONDS - began)) s"
[ "$tested" -eq 0 ] && [ "$measured" -eq 0 ]
