"""benchmarks/gpu.sh without a GPU: its control flow on tiny sizes; it names what it left out; it refuses a CPU else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("triton", reason="triton is not installed: make check-gpu-build, or pip install 'herdkern[triton]'")


def run(*command, out):
    """Exit status, printed text and the report, None if there is none."""
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OUT": str(out)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    report = out / "h200.json"
    return done.returncode, done.stdout + done.stderr, json.loads(report.read_text()) if report.exists() else None


def test_without_time_it_says_what_it_left_out(tmp_path):
    command = sys.executable, "benchmarks/gpu_ops.py", "--rehearse", "--seconds", "0", "--json", tmp_path / "h200.json"
    status, text, report = run(*command, out=tmp_path)
    assert status == 0, text
    assert report["rehearsal"]
    assert report["rows"] == []
    assert {name.split()[0] for name in report["skipped"]} == {
        "checks",
        "attention",
        "rms_norm",
        "swiglu",
        "rope",
        "linear_cross_entropy",
        "adamw",
    }


@pytest.mark.full
def test_rehearsal_goes_through_everything(tmp_path):
    status, text, report = run("bash", "benchmarks/gpu.sh", "--rehearse", out=tmp_path)
    assert status == 0, text
    assert report["skipped"] == []
    assert {name: set(results.values()) for name, results in report["checks"].items()} == {
        "attention reference": {"ok"},
        "attention triton": {"ok"},
    }
    timed = {row["case"]: set(row["ms"]) for row in report["rows"]}
    assert {"herdkern triton", "herdkern reference", "SDPA math"} <= timed["attention 12 one both passes"]
    assert {"herdkern triton", "FlexAttention with its mask"} <= timed["attention 12 short128 forward"]
    assert all(any(peer.startswith("herdkern") for peer in row["ms"]) for row in report["rows"])
    assert "passed" in (tmp_path / "gpu_tests.log").read_text()


@pytest.mark.full
@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU: it would be measured")
def test_without_a_gpu_it_refuses(tmp_path):
    status, text, report = run("bash", "benchmarks/gpu.sh", out=tmp_path)
    assert status != 0
    assert report is None
    assert "gpu.sh: torch must see a CUDA device, got none" in text
