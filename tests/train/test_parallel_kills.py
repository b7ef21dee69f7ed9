"""kill -9 of one rank or all at any moment, also in a save: a resumed run has the bits of an undisturbed one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_jobs import facts

from herdkern.train.checkpoint import load_checkpoint

pytestmark = pytest.mark.distributed
STEPS = 12


def zygote(*runs):
    """What became of each run (run_dir, layout, mode, seed, kills); one process, so torch is imported once."""
    command = [sys.executable, str(Path(__file__).with_name("kill_ranks.py")), *(str(a) for run in runs for a in run)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert output.returncode == 0, output.stderr
    results = [json.loads(line) for line in output.stdout.splitlines() if line.startswith("{")]
    assert [r["statuses"] for r in results] == [[0, 0]] * len(runs), "\n".join(results[-1]["said"])
    return [r["resumed_from"] for r in results]


def outcome(run_dir):
    assert not list(run_dir.glob("**/*.tmp"))
    return facts(run_dir), load_checkpoint(run_dir / "checkpoints" / f"step-{STEPS}").tensors


def assert_same(got, want):
    assert [record["step"] for record in got[0]] == list(range(1, STEPS + 1))
    assert got[0] == want[0]
    assert got[1].keys() == want[1].keys() == {"model", "optimizer", "average"}
    for stem, tensors in want[1].items():
        assert got[1][stem].keys() == tensors.keys()
        assert all(torch.equal(got[1][stem][name], tensor) for name, tensor in tensors.items()), stem


def test_three_kills_in_a_row(tmp_path):
    """An undisturbed run, one whose ranks were killed at random, and one of whose ranks killed itself in a save."""
    runs = [("none", "random", 0, 0), ("random", "random", 11, 3), ("syscall", "syscall", 16, 2)]
    found = zygote(*((tmp_path / name, "dp", mode, seed, kills) for name, mode, seed, kills in runs))
    assert [len(resumed) for resumed in found] == [0, 3, 2]
    assert max(found[1]) > 0
    want = outcome(tmp_path / "none")
    assert_same(outcome(tmp_path / "random"), want)
    assert_same(outcome(tmp_path / "syscall"), want)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", ["random", "syscall"])
@pytest.mark.parametrize("layout", ["dp", "tp", "pp"])
def test_a_hundred_kills(tmp_path, layout, mode, seed):
    runs = [(tmp_path / "none", layout, "random", 0, 0), (tmp_path / "killed", layout, mode, 100 + seed, 3)]
    _, resumed = zygote(*runs)
    print(f"kills: {len(resumed)}, resumed from {resumed}")
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "none"))
