"""Silent corruption: one flipped bit on one rank is found in the next check, by rank and tensor, and nothing else."""

import json

import parallel_jobs
import pytest
import torch
from parallel_jobs import facts

from herdkern.parallel.heartbeat import Heartbeat
from herdkern.train.config import CheckpointConfig, TrainConfig
from herdkern.train.corruption import SilentCorruptionError, checksum, judge_replays
from herdkern.train.supervisor import Watch, WatchConfig

EVERY = {"batch_size": 6, "corruption_check_every_steps": 3}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_every_flipped_bit_changes_a_checksum(dtype):
    for size, start in ((37, 0), (37, 1), (1, 0), (8, 3)):
        whole = (torch.arange(size + start) % 2).to(dtype)
        part = whole[start:]
        before = int(checksum(part))
        octets = part.view(torch.uint8)
        for i in range(octets.numel()):
            for bit in range(8):
                octets[i] ^= 1 << bit
                assert int(checksum(part)) != before
                octets[i] ^= 1 << bit
        assert int(checksum(part)) == before
    assert int(checksum(torch.empty(0, dtype=dtype))) == 0
    assert int(checksum(torch.ones(3, 4).T)) == int(checksum(torch.ones(4, 3)))


def sums(stage, **values):
    return {(0, stage, name): value for name, value in values.items()}


def test_the_majority_is_right_and_the_first_difference_counts():
    good, bad = sums(0, a=1, b=2, c=3), sums(0, a=1, b=9, c=8)
    three = [(0, {"first": bad, "third": bad}), (1, {"replay": good, "third": good}), (2, {"third": good})]
    found = judge_replays(three, 3)
    assert (found.what, found.ranks, found.agreeing) == ("b", (0,), (1, 2))
    two = [(0, {"first": bad, "third": bad}), (1, {"replay": good, "third": good})]
    assert judge_replays(two, 2).ranks == (0, 1)
    assert "no majority" in str(judge_replays(two, 2))
    once = [(0, {"first": good, "third": good}), (1, {"replay": bad, "third": good})]
    assert (judge_replays(once, 2).ranks, judge_replays(once, 2).agreeing) == ((1,), (0,))
    alone = [(0, {"first": bad, "replay": good, "third": good})]
    assert str(judge_replays(alone, 1)) == "b on rank 0 must have the same bits each time that it is computed"


def test_of_a_model_over_ranks_those_are_named_that_had_it_first():
    """Two stages on two ranks each of two replicas; what rank 2 got wrong in the first comes to rank 3, too."""
    good, bad = sums(0, a=1, b=2), sums(0, a=1, b=7)
    later, wrong = sums(1, c=3), sums(1, c=4)
    gathered = [(0, {"third": good}), (0, {"third": later}), (1, {"first": bad}), (1, {"first": wrong})]
    gathered[0][1]["replay"], gathered[1][1]["replay"] = good, later
    found = judge_replays(gathered, 2)
    assert (found.what, found.ranks) == ("b", (2,))


FAULTS = {
    "output": "output of layers.1.mlp.up_proj on rank 1 must have the bits of ranks 0 2",
    "output once": "output of layers.1.mlp.up_proj on rank 1 must have the bits of ranks 0 2",
    "gradient": "gradient of layers.0.self_attn.o_proj.weight on rank 1 must have the bits of ranks 0 2",
    "reduced": "reduced gradient of layers.1.mlp.up_proj.weight on rank 1 must have the bits of ranks 0 2",
    "weight": "weight layers.1.mlp.up_proj.weight on rank 1 must have the bits of ranks 0 2",
    "exp_avg_sq": "exp_avg_sq of layers.1.mlp.up_proj.weight on rank 1 must have the bits of ranks 0 2",
    "average": "average of layers.1.mlp.up_proj.weight on rank 1 must have the bits of ranks 0 2",
}
SOON = ("output", "gradient", "reduced", "weight")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "fault", [fault if fault in SOON else pytest.param(fault, marks=pytest.mark.full) for fault in FAULTS]
)
def test_a_flipped_bit_is_found_in_the_next_check(worlds, tmp_path, fault):
    """Three copies, a flip in step 5 or before it; the check is in step 6, and nothing was updated there."""
    sizes = {"dp": 3, "dp_shard": 1}
    at = 8 if fault == "average" else 6 if fault in ("output once", "reduced", "exp_avg_sq") else 5
    step = 9 if fault == "average" else 6
    for message, ranks, reached in worlds(3).run(parallel_jobs.train_with_a_flip, tmp_path, sizes, fault, at, EVERY):
        assert message.startswith(f"train: step {step}: {FAULTS[fault]}; the last check that found nothing was at ")
        assert (ranks, reached) == ((1,), step - 1)
    line = json.loads((tmp_path / "corruption.jsonl").read_text())
    assert (line["step"], line["ranks"], line["reason"]) == (step, [1], message)


@pytest.mark.distributed
def test_shards_are_replayed_and_checkpoints_are_compared(worlds, tmp_path):
    """FSDP has no copies to compare, but its neighbours compute; a save finds what the last check did not see."""
    run = worlds(3).run
    for message, ranks, _ in run(parallel_jobs.train_with_a_flip, tmp_path / "a", {"dp": 3}, "output", 5, EVERY):
        assert FAULTS["output"] in message
        assert ranks == (1,)
    changes = {**EVERY, "checkpoint": CheckpointConfig(every_steps=5)}
    sizes = {"dp": 3, "dp_shard": 1}
    for message, _, _ in run(parallel_jobs.train_with_a_flip, tmp_path / "b", sizes, "weight", 5, changes):
        assert message.startswith("train: step 5: weight layers.1.mlp.up_proj.weight on rank 1")
    assert not (tmp_path / "b" / "checkpoints").exists()


LAYOUTS = [
    ({"tp": 2, "dp": 2, "dp_shard": 1}, {"tied": True}),
    pytest.param(
        {"pp": 2, "dp": 2, "num_chunks": 2},
        {"tied": True, "recompute": "block", "num_layers": 3},
        marks=pytest.mark.full,
    ),
    pytest.param({"cp": 2, "tp": 2}, {"dtype": "bf16"}, marks=pytest.mark.full),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("sizes", "changes"), LAYOUTS, ids=["tp-hsdp", "pp-fsdp", "cp-tp"])
def test_without_a_fault_nothing_is_found_and_the_bits_are_the_same(worlds, tmp_path, sizes, changes):
    for name, every in (("off", 0), ("on", 1)):
        changed = {**changes, "batch_size": 4, "micro_batch_size": 1, "steps": 5, "corruption_check_every_steps": every}
        worlds(4).run(parallel_jobs.train, tmp_path / name, sizes, {**changed, **parallel_jobs.FEW_STEPS})
    assert facts(tmp_path / "on") == facts(tmp_path / "off")
    assert not (tmp_path / "on" / "corruption.jsonl").exists()


@pytest.mark.distributed
def test_a_weight_of_two_tensor_parallel_ranks(worlds, tmp_path):
    """Norms lie on both; of two copies nobody can say which is wrong."""
    found = worlds(4).run(
        parallel_jobs.train_with_a_flip, tmp_path, {"tp": 2, "pp": 2}, "norm", 2, {"corruption_check_every_steps": 3}
    )
    for message, ranks, _ in found:
        assert "weight layers.0.input_layernorm.weight on ranks 0 1 must have the same bits, and there is no" in message
        assert ranks == (0, 1)


def test_one_process_computes_twice(tmp_path):
    torch.set_num_threads(1)
    for name, every in (("off", 0), ("on", 2)):
        parallel_jobs.train(0, tmp_path / name, None, {"corruption_check_every_steps": every})
    assert facts(tmp_path / "on") == facts(tmp_path / "off")
    message, ranks, reached = parallel_jobs.train_with_a_flip(
        0, tmp_path / "bad", None, "output once", 6, {"corruption_check_every_steps": 3}
    )
    assert "output of layers.1.mlp.up_proj on rank 0 must have the same bits each time" in message
    assert (ranks, reached) == ((0,), 5)


def test_the_supervisor_tells_what_was_found(tmp_path):
    watch = Watch(tmp_path, WatchConfig())
    watch.start([0, 1], 2, True)
    Heartbeat(tmp_path, 0).beat(step=3, phase="step")
    watch.exit_codes = {0: 1, 1: 1}
    line = {"time": watch.began - 1, "step": 6, "ranks": [1], "reason": "train: step 6: x on rank 1"}
    (tmp_path / "corruption.jsonl").write_text(json.dumps(line) + "\n")
    assert watch.diagnose({}, {}).kind == "gone"  # what an earlier start found counts no more
    (tmp_path / "corruption.jsonl").write_text(json.dumps({**line, "time": watch.began + 1}) + "\n")
    verdict = watch.diagnose({}, {})
    assert (verdict.kind, verdict.ranks, verdict.line) == ("corrupt", (1,), line["reason"])
    assert watch.log.read()[-1]["kind"] == "corrupt"


def test_the_interval_is_no_part_of_what_a_run_is():
    assert TrainConfig(corruption_check_every_steps=5).identity() == TrainConfig().identity()
    with pytest.raises(ValueError, match="corruption_check_every_steps must not be negative, got -1"):
        TrainConfig(corruption_check_every_steps=-1)
    assert issubclass(SilentCorruptionError, RuntimeError)
