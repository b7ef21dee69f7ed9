"""The ahead-of-time compilation of the Triton kernels: one kernel compiles; one that spills is noticed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLANTED = """
import torch
import triton
import triton.language as tl


@triton.jit
def spilling_kernel(x_ptr, out_ptr, COLS: tl.constexpr):
    col = tl.arange(0, COLS)
    x = tl.load(x_ptr + col)
    y = tl.load(x_ptr + COLS + col)
    tl.debug_barrier()
    tl.store(out_ptr + col, x / tl.sum(x, axis=0) + y / tl.sum(y, axis=0))


def call():
    spilling_kernel[(1,)](torch.empty(65536), torch.empty(32768), COLS=32768, num_warps=4)


CASES = [("planted", call, True)]
"""

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed: make check-gpu-build installs it"
    ),
]


def check(tmp_path, *arguments):
    """Exit status, printed text and rows of tools/check_gpu_build.py."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, ROOT / "tools/check_gpu_build.py", "--target", "90", "--json", report, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
    )
    assert report.exists(), done.stderr
    return done.returncode, done.stdout, json.loads(report.read_text())["rows"]


def test_a_kernel_compiles_with_wide_accesses_and_no_spill(tmp_path):
    status, text, rows = check(tmp_path, "--case", "swiglu fp32")
    assert status == 0, text
    assert "no kernel was run" in text
    assert {row["kernel"] for row in rows} == {"_forward_kernel", "_backward_kernel"}
    assert all(row["accesses_of_16_bytes"] == row["accesses"] > 0 and row["registers"] > 0 for row in rows)


def test_a_spilling_kernel_fails_the_check(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    status, text, rows = check(tmp_path, "--cases", tmp_path / "planted.py")
    assert status == 1
    assert "SPILLS" in text
    assert rows[0]["stack_bytes"] > 0


def test_a_kernel_of_a_hot_and_another_case_is_hot(tmp_path):
    (tmp_path / "planted.py").write_text(
        PLANTED.replace('CASES = [("planted"', 'CASES = [("not hot", call, False), ("planted"')
    )
    status, text, rows = check(tmp_path, "--cases", tmp_path / "planted.py")
    assert status == 1, text
    assert [row["hot"] for row in rows] == [True]
