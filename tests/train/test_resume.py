"""kill -9 at any moment: a resumed run has the bits of an undisturbed one: weights, optimizer, average and metrics."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TIMING = ("time", "seconds", "tokens_per_s", "mfu", "mfu_convention")


def zygote(*runs):
    """The steps that each run (run_dir, mode, seed, kills) resumed from; one process, so torch is imported once."""
    command = [sys.executable, str(Path(__file__).with_name("kill_zygote.py")), *(str(a) for run in runs for a in run)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert output.returncode == 0, output.stderr
    results = [json.loads(line) for line in output.stdout.splitlines() if line.startswith("{")]
    assert [r["status"] for r in results] == [0] * len(runs), output.stderr
    return [r["resumed_from"] for r in results]


def outcome(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    facts = [{k: v for k, v in record.items() if k not in TIMING} for record in records]
    folder = run_dir / "checkpoints" / "step-30"
    tensors = {name: load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer", "average")}
    assert not list(run_dir.glob("**/*.tmp"))
    return facts, tensors


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """An undisturbed run and two that were killed three times each."""
    root = tmp_path_factory.mktemp("runs")
    zygote_runs = [
        (root / "none", "random", 0, 0),
        (root / "random", "random", 11, 3),
        (root / "syscall", "syscall", 11, 3),
    ]
    return root, dict(zip(("none", "random", "syscall"), zygote(*zygote_runs)))


def assert_same(got, want):
    assert [r["step"] for r in got[0]] == list(range(1, 31))
    assert got[0] == want[0]
    for name, tensors in want[1].items():
        assert got[1][name].keys() == tensors.keys()
        assert all(torch.equal(got[1][name][key], tensor) for key, tensor in tensors.items()), name


@pytest.mark.parametrize("mode", ["random", "syscall"])
def test_three_kills_in_a_row(killed, mode):
    root, resumed_from = killed
    assert len(resumed_from[mode]) == 3
    assert max(resumed_from[mode]) > 0
    assert_same(outcome(root / mode), outcome(root / "none"))


@pytest.mark.full
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", ["random", "syscall"])
def test_many_kills(killed, tmp_path, mode, seed):
    zygote((tmp_path, mode, seed, 12))
    assert_same(outcome(tmp_path), outcome(killed[0] / "none"))
