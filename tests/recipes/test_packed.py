"""`herdkern pretrain`: torchrun's ranks train from the packed tokens of a run as one process does."""

import contextlib
import io
import os
import socket
import subprocess
import sys

import numpy as np
import parallel_jobs  # noqa: F401 - with it no rate is measured
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from herdkern import cli
from herdkern.engine import read_json
from herdkern.model.config import ModelConfig
from herdkern.model.hf_weights import config_to_hf
from herdkern.model.transformer import Transformer
from herdkern.recipes import model_stages
from herdkern.recipes import packed as module
from herdkern.recipes.config import SampleConfig
from herdkern.recipes.model_stages import FinalConfig
from herdkern.train import Saver, TrainConfig
from herdkern.train.checkpoint import load_checkpoint
from herdkern.train.metrics import MetricsLog
from herdkern.train.surroundings import take_lock

STAGES = {
    "train__long_context__lengths": "64 128",
    "train__long_context__check_every_steps": 5,
    "train__long_context__from_tokens": 1024,
}


def words_of(runs, tokens, out, **changed):
    settings = {"train__dtype": "fp32", "train__micro_batch_size": 1, **STAGES, **changed}
    return ["pretrain", *runs.arguments(out, **settings)[1:], "--tokens", str(tokens)]


def pretrain(rank, words, size, port):
    """What a rank of torchrun does, and what it says."""
    dist.destroy_process_group()
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), **address)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert cli.main(words) == 0
    return said.getvalue()


def forked(size, words):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with Ranks(size) as ranks:
        return "".join(ranks.run(pretrain, words, size, port))


def torchrun(size, words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "herdkern", *words], capture_output=True, text=True, timeout=250, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.distributed
@pytest.mark.parametrize("start", [forked, pytest.param(torchrun, marks=pytest.mark.full)])
def test_ranks_train_from_the_tokens_of_a_run(runs, packed, tmp_path, capsys, one_thread, start):
    """Losses and held-out losses of one process, and its verdicts on a stage of longer sequences."""
    assert cli.main(words_of(runs, packed, tmp_path / "one")) == 0
    assert "done at step 12" in capsys.readouterr().out
    layout = ["--parallel.tp", "2"]
    said = start(2, [*words_of(runs, packed, tmp_path / "two"), *layout])
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


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_second_start_in_a_live_folder_changes_nothing(runs, packed, tmp_path, capsys, one_thread):
    few = {"train__steps": 4, "train__long_context__lengths": "", "train__schedule__anneal_steps": 0}
    few |= {"train__average_every_steps": 0, "train__eval_every_steps": 0, "train__schedule__warmup_steps": 1}
    assert cli.main(words_of(runs, packed, tmp_path, **few)) == 0
    before = contents(tmp_path)
    assert read_json(tmp_path / "config.json")["train"]["steps"] == 4
    other = words_of(runs, packed, tmp_path, **{**few, "train__steps": 5})
    with take_lock(tmp_path / "train.lock"):
        assert cli.main(other) == 1
    assert "must have one process training in it" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert cli.main(other) == 1  # nobody else, but another configuration
    assert "steps was 4 and is 5" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_what_cannot_be_started_is_told(runs, packed, tmp_path, capsys):
    assert cli.main([*words_of(runs, packed, tmp_path), "--parallel.dp", "2"]) == 1
    assert "start it by torchrun --nproc-per-node 2" in capsys.readouterr().err
    assert cli.main(words_of(runs, tmp_path / "nothing", tmp_path / "out")) == 1
    assert "must hold tokens/train and tokenizer" in capsys.readouterr().err


def test_without_held_out_text_nothing_is_evaluated():
    config = TrainConfig(eval_every_steps=2)
    for on_ranks in (False, True):
        assert module._evaluation(config, [], np.ones(3, np.int64), on_ranks=on_ranks) is None


@pytest.mark.parametrize("tied", [False, True])
def test_the_stages_after_training_take_a_checkpoint_of_ranks(tmp_path, tied):
    """As `herdkern run` finds it in its folder when ranks have trained there."""
    shape = {"dim": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "ffn_dim": 12}
    model = Transformer(ModelConfig(vocab_size=11, max_seq_len=8, tied_embeddings=tied, **shape), seed=1)
    weights = dict(model.named_parameters())
    saver = Saver(tmp_path, background=False)
    tensors = {"model": weights, "average": {name: 2.0 * p.detach().double() for name, p in weights.items()}}
    folder = saver.save(3, tensors, {"average_count": 1}, {}, {"config.json": config_to_hf(model.config)})
    config = FinalConfig(model=model.config, train=TrainConfig(), samples=SampleConfig(prompts=()))
    found = model_stages._averaged(folder, config)
    for name, factor in (("last step", 1.0), ("averaged", 2.0)):
        for ours, theirs in zip(found[name].parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, factor * theirs)
