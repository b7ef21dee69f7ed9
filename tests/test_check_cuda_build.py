"""The ahead-of-time check of _cuda: what ptxas says is read, planted faults are found, a fair kernel passes."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
PLANTED = """
namespace herdkern::cuda {

__global__ void __launch_bounds__(256) fair_kernel(const float4* x, float4* y) {
  y[threadIdx.x] = x[threadIdx.x];
}
__global__ void __launch_bounds__(64) stack_kernel(const int* x, int* y) {
  int held[1000];
  for (int i = 0; i < y[0]; ++i) held[x[i] % 1000] = i;
  y[threadIdx.x] = held[x[threadIdx.x] % 1000];
}
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* x, float* y) {
  float held[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) held[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) y[i * 1024 + threadIdx.x] = held[i] * held[63 - i];
}
__global__ void plain_hopper_kernel(float* y) { y[threadIdx.x] = 1.0f; }

}  // namespace herdkern::cuda
"""


def load():
    spec = importlib.util.spec_from_file_location("check_cuda_build", ROOT / "tools/check_cuda_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reads_what_ptxas_says():
    text = (
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : Compiling entry function '_Z1kv' for 'sm_90a'\n"
        "ptxas info    : Function properties for _Z1kv\n"
        "    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 128 bytes smem\n"
        "ptxas info    : Compiling entry function '_Z1jv' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z1jv\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers, used 0 barriers, 400 bytes cmem[0]\n"
    )
    assert load().resources(text) == {
        ("_Z1kv", "sm_90a"): {"registers": 40, "shared_bytes": 128, "stack_bytes": 16, "spill_bytes": 20},
        ("_Z1jv", "sm_80"): {"registers": 8, "shared_bytes": 0, "stack_bytes": 0, "spill_bytes": 0},
    }


@pytest.mark.parametrize(
    ("registers", "threads", "shared_bytes", "target", "expected"),
    [
        (32, 256, 0, "sm_80", 1.0),
        (64, 1024, 0, "sm_90a", 0.5),
        (128, 512, 0, "sm_90a", 0.25),
        (32, 32, 0, "sm_120", 0.5),
        (168, 384, 200000, "sm_90a", 12 / 64),
    ],
)
def test_occupancy(registers, threads, shared_bytes, target, expected):
    row = {"registers": registers, "threads": threads, "shared_bytes": shared_bytes, "target": target}
    assert load().occupancy(row) == expected


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.skipif(load().disassembler() is None, reason="there is no cuobjdump: pip install triton")
def test_planted_faults_are_found(tmp_path):
    (tmp_path / "planted.cu").write_text(PLANTED)
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas=-v", "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]"]
    built = subprocess.run(
        [*command, "-c", "planted.cu", "-o", "planted.cu.o"], cwd=tmp_path, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (tmp_path / "planted.cu.o.ptxas").write_text(built.stderr)
    check = [
        sys.executable,
        ROOT / "tools/check_cuda_build.py",
        "--objects",
        tmp_path,
        "--json",
        tmp_path / "made.json",
    ]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = {row["kernel"]: row for row in json.loads((tmp_path / "made.json").read_text())["rows"]}
    module = load()
    found = {kernel: " ".join(module.faults(row)) for kernel, row in rows.items()}
    assert found["fair_kernel"] == ""
    assert rows["fair_kernel"]["accesses_of_16_bytes"] == rows["fair_kernel"]["accesses"] == 2
    assert rows["fair_kernel"]["threads"] == 256
    assert "stack frame of" in found["stack_kernel"]
    assert "accesses of local memory" in found["stack_kernel"]
    assert "spills" in found["spilling_kernel"]
    assert found["plain_hopper_kernel"] == "has no HGMMA has no bulk copies"
