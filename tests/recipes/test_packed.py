"""`herdkern pretrain`: torchrun's ranks train from the packed tokens of a run as one process does."""

import os
import subprocess
import sys

import pytest

from herdkern import cli
from herdkern.engine import read_json
from herdkern.train.checkpoint import load_checkpoint
from herdkern.train.metrics import MetricsLog

STAGES = {
    "train__long_context__lengths": "64 128",
    "train__long_context__check_every_steps": 5,
    "train__long_context__from_tokens": 1024,
}


def words_of(runs, finished, out, **changed):
    settings = {"train__dtype": "fp32", "train__micro_batch_size": 1, **STAGES, **changed}
    return ["pretrain", *runs.arguments(out, **settings)[1:], "--tokens", str(finished)]


def torchrun(size, words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "herdkern", *words], capture_output=True, text=True, timeout=250, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.distributed
def test_ranks_train_from_the_tokens_of_a_run(runs, finished, tmp_path, capsys, one_thread):
    """Losses and held-out losses of one process, and its verdicts on a stage of longer sequences."""
    assert cli.main(words_of(runs, finished, tmp_path / "one")) == 0
    assert "done at step 12" in capsys.readouterr().out
    layout = ["--parallel.tp", "2"]
    said = torchrun(2, [*words_of(runs, finished, tmp_path / "two"), *layout])
    assert said.count("done at step 12") == 1
    one, two = (MetricsLog(tmp_path / name / "metrics.jsonl").read() for name in ("one", "two"))
    assert [record["step"] for record in two] == list(range(1, 13))
    for ours, theirs in zip(two, one):
        assert {*ours} == {*theirs}
        for key in ("loss", "grad_norm", "heldout_loss", "heldout_bits_per_byte"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
        for key in ("tokens", "lr", "context"):
            assert ours.get(key) == theirs.get(key)
    verdicts = [record["long_context"] for record in two if "long_context" in record]
    assert [verdict["length"] for verdict in verdicts] == [128]
    assert not verdicts[0]["advances"]
    assert "5 of 5 needles are not found" in verdicts[0]["reasons"][-1]
    assert [record.get("context") for record in two] == [None] * 4 + [128] * 8
    assert read_json(tmp_path / "two" / "config.json")["parallel"]["tp"] == 2
    assert load_checkpoint(tmp_path / "two" / "checkpoints" / "step-12").state["average_count"] == 4
    assert sorted(p.name for p in (tmp_path / "two" / "heartbeat").iterdir()) == ["rank-0.json", "rank-1.json"]


def test_what_cannot_be_started_is_told(runs, finished, tmp_path, capsys):
    assert cli.main([*words_of(runs, finished, tmp_path), "--parallel.dp", "2"]) == 1
    assert "start it by torchrun --nproc-per-node 2" in capsys.readouterr().err
    assert cli.main(words_of(runs, tmp_path / "nothing", tmp_path / "out")) == 1
    assert "must hold tokens/train and tokenizer" in capsys.readouterr().err
