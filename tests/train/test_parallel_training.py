"""The loop on many ranks: losses of one process, one data stream, stops, rollbacks, other layouts, the average."""

import dataclasses
import re
import signal

import parallel_jobs
import pytest
import torch
from documents_in_memory import PARALLEL_RUN
from parallel_jobs import facts
from ranks import RankFailure, Ranks, every_composition

from herdkern.parallel import ParallelConfig
from herdkern.train.checkpoint import load_checkpoint
from herdkern.train.config import CheckpointConfig, ScheduleConfig, TrainConfig
from herdkern.train.ramp import RampPhase
from herdkern.train.trainer import Trainer

pytestmark = pytest.mark.distributed
BOUND = 1e-5
FEW = [{"cp": 2, "dp": 2}, {"tp": 2, "pp": 2}]
MORE = [
    ({"dp": 4, "dp_shard": 2}, True),
    ({"dp": 4, "dp_shard": 1}, False),
    ({"pp": 2, "dp": 2, "num_chunks": 2}, True),
    ({"pp": 2, "dp": 4, "dp_shard": 2}, False),
    ({"tp": 2, "dp": 4, "dp_shard": 2}, True),
]
RAMP = (RampPhase(from_tokens=200, batch_size=8, seq_len=32), RampPhase(from_tokens=900, batch_size=4, seq_len=64))


@pytest.fixture(scope="module")
def worlds():
    """Processes by their number; those of a failed job are replaced."""
    started = {}

    def run(function, folder, sizes, *args):
        size = ParallelConfig(**sizes).world_size
        if size not in started:
            started[size] = Ranks(size)
        try:
            return started[size].run(function, folder, sizes, *args, seconds=150)
        except RankFailure:
            started.pop(size).close()
            raise

    yield run
    for ranks in started.values():
        ranks.close()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process makes of a run with these changes: (what it read, its metrics, its folder)."""
    made = {}

    def of(**changes):
        key = repr(sorted(changes.items()))
        if key not in made:
            torch.set_num_threads(1)
            folder = tmp_path_factory.mktemp("one")
            trainer = parallel_jobs.trainer_of(folder, None, **changes)
            trainer.fit()
            made[key] = trainer.source.seen, facts(folder), folder
        return made[key]

    return of


def name_of(value):
    if isinstance(value, bool):
        return "tied" if value else "apart"
    return "-".join(f"{name}{size}" for name, size in value.items())


def assert_close(got, want, bound=BOUND):
    """The same steps, tokens and rates, losses and norms within `bound`."""
    assert len(got) == len(want)
    for ours, theirs in zip(got, want):
        exact = [{k: v for k, v in r.items() if k not in ("loss", "grad_norm", "rolled_back")} for r in (ours, theirs)]
        assert exact[0] == exact[1]
        for key in ("loss", "grad_norm"):
            assert (ours[key] is None) == (theirs[key] is None)
            assert ours[key] is None or abs(ours[key] - theirs[key]) <= bound * abs(theirs[key])


def assert_as_one_process(worlds, one, folder, sizes, **changes):
    seen, want, _ = one(**changes)
    answers = worlds(parallel_jobs.train, folder, sizes, changes)
    assert_close(facts(folder), want)
    config = ParallelConfig(**sizes)
    read = {config.place(rank)["dp"]: answer[0] for rank, answer in enumerate(answers)}
    for rank, answer in enumerate(answers):
        assert answer[0] == read[config.place(rank)["dp"]]
        assert answer[1:] == (PARALLEL_RUN.steps, want[-1]["tokens"], False)
    assert sorted(one for some in read.values() for one in some) == sorted(seen)


@pytest.mark.parametrize("sizes", FEW, ids=name_of)
def test_losses_of_one_process_over_ten_steps(worlds, one, tmp_path, sizes):
    assert_as_one_process(worlds, one, tmp_path, sizes)


@pytest.mark.full
@pytest.mark.parametrize(("sizes", "tied"), [*every_composition(), *MORE], ids=name_of)
def test_losses_of_every_composition(worlds, one, tmp_path, sizes, tied):
    changes = {"batch_size": 8, "tied": tied, "num_layers": 5}
    assert_as_one_process(worlds, one, tmp_path, sizes, **changes)


def test_a_ramp_switches_at_its_tokens_on_all_ranks(worlds, one, tmp_path):
    changes = {"seq_len": 16, "ramp": RAMP}
    assert_as_one_process(worlds, one, tmp_path, {"dp": 2}, **changes)
    config = dataclasses.replace(PARALLEL_RUN, **changes)
    steps = [record["tokens"] for record in facts(tmp_path)]
    assert steps == [config.ramp_plan().tokens_before(step) for step in range(1, 11)]
    assert {b - a for a, b in zip([0, *steps], steps)} == {64, 256}
    at = [a for a, b in zip([0, *steps], steps) if b - a == 256]
    assert min(at) == 256  # the first step that begins at or behind token 200


def tensors_of(folder, step):
    return load_checkpoint(folder / "checkpoints" / f"step-{step}")


def test_average_is_the_mean_of_the_weights_of_all_ranks(worlds, tmp_path):
    worlds(
        parallel_jobs.train, tmp_path, {"dp": 2, "pp": 2}, {"checkpoint": CheckpointConfig(keep_last=9, every_steps=2)}
    )
    saved = [tensors_of(tmp_path, step).tensors["model"] for step in (6, 8, 10)]
    average = tensors_of(tmp_path, 10)
    assert average.state["average_count"] == 3
    for name, mean in average.tensors["average"].items():
        offline = sum(weights[name if name in weights else f"model.{name}"].double() for weights in saved) / 3
        assert (mean - offline).abs().max() <= 1e-15


def assert_same_bits(one, two):
    assert one.keys() == two.keys()
    for stem, named in one.items():
        assert named.keys() == two[stem].keys()
        for name, tensor in named.items():
            assert torch.equal(tensor, two[stem][name]), (stem, name)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.full)], ids=lambda number: number.name
)
def test_a_signal_to_one_rank_stops_all_and_they_go_on(worlds, tmp_path, number):
    sizes = {"dp": 2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    worlds(parallel_jobs.train, whole, sizes)
    for answer in worlds(parallel_jobs.train_until_signal, cut, sizes, 4, number):
        assert answer[:3] == (4, True, "step-4")
        assert [phase for step, phase in answer[3] if step == 4] == ["data", "step"]
        assert answer[3][-1] == (5, "save")
    worlds(parallel_jobs.train, cut, sizes)
    assert facts(cut) == facts(whole)
    assert_same_bits(tensors_of(cut, 10).tensors, tensors_of(whole, 10).tensors)


def test_a_run_goes_on_in_other_layouts(worlds, one, tmp_path):
    """One process, then two layouts, then one process again."""
    parallel_jobs.train_until_signal(0, tmp_path, None, 2, signal.SIGTERM)
    worlds(parallel_jobs.train_until_signal, tmp_path, {"dp": 2}, 4, signal.SIGTERM)
    worlds(parallel_jobs.train_until_signal, tmp_path, {"tp": 2, "pp": 2}, 7, signal.SIGTERM)
    assert parallel_jobs.train(0, tmp_path, None)[1:] == (10, one()[1][-1]["tokens"], False)
    assert_close(facts(tmp_path), one()[1])


def test_a_run_of_one_process_without_an_update_goes_on(worlds, one, tmp_path):
    """Its checkpoint of step 0, to which it could have gone back, has no state of the optimizer."""
    changes = {"on_nonfinite": "rollback"}
    parallel_jobs.trainer_of(tmp_path, None, **changes).save()
    worlds(parallel_jobs.train, tmp_path, {"dp": 2}, changes)
    assert_close(facts(tmp_path), one()[1])


@pytest.mark.parametrize("sizes", [{"cp": 2}, pytest.param({"tp": 2, "dp": 2}, marks=pytest.mark.full)], ids=name_of)
def test_stages_of_long_context_are_those_of_one_process(worlds, tmp_path, sizes):
    """Also if the ranks stop inside a stage and go on."""
    torch.set_num_threads(1)
    parallel_jobs.train_in_stages(0, tmp_path / "one", None)
    worlds(parallel_jobs.train_in_stages, tmp_path / "ranks", sizes, 6)
    worlds(parallel_jobs.train_in_stages, tmp_path / "ranks", sizes)
    want = facts(tmp_path / "one")
    assert_close(facts(tmp_path / "ranks"), want)
    assert [record.get("context") for record in want] == [None] + [32] * 2 + [64] * 9


def test_rollback_goes_past_the_bad_sequences(worlds, one, tmp_path):
    """On one process and on ranks: the sequences of step 6 are left out, the others are seen in their order."""
    changes = {
        "on_nonfinite": "rollback",
        "bad": (22,),
        "checkpoint": CheckpointConfig(every_steps=4),
        "max_rollbacks": 1,
    }
    seen, want, _ = one(**changes)
    assert seen == [*range(24), *range(16, 20), *range(24, 44)]
    assert [record["step"] for record in want] == list(range(1, 11))
    assert want[4]["rolled_back"] == "from step 6: output of embed_tokens"
    worlds(parallel_jobs.train, tmp_path, {"dp": 2}, changes)
    assert_close(facts(tmp_path), want)
    assert facts(tmp_path)[4]["rolled_back"] == "from step 6: output of embed_tokens on rank 1"
    # the place is part of a checkpoint: a later start reads on behind it
    assert tensors_of(tmp_path, 10).state["position"] == {"token": 44 * 32, "left_out": [[20 * 32, 4 * 32]]}


@pytest.mark.parametrize("size", [1, 2])
def test_sequences_stay_left_out_if_the_run_is_killed_behind_a_rollback(worlds, one, tmp_path, size):
    """Before the next checkpoint could say so; the run that goes on has no poison in it, and still leaves them out."""
    changes = {
        "on_nonfinite": "rollback",
        "bad": (22,),
        "checkpoint": CheckpointConfig(every_steps=4),
        "max_rollbacks": 1,
    }
    sizes = None if size == 1 else {"dp": 2}
    with Ranks(size) as ranks, pytest.raises(RankFailure) as failed:
        ranks.run(parallel_jobs.train_and_die_behind_a_rollback, tmp_path, sizes, changes)
    assert set(failed.value.said.values()) == {"died with exit code -9"}
    assert [record["step"] for record in facts(tmp_path)] == [1, 2, 3, 4, 5]
    assert max(int(folder.name[5:]) for folder in (tmp_path / "checkpoints").glob("step-*")) == 4
    changed = {**changes, "bad": ()}
    if sizes is None:
        seen = parallel_jobs.train(0, tmp_path, None, changed)[0]
        assert seen == [*range(16, 20), *range(24, 44)]
    else:
        worlds(parallel_jobs.train, tmp_path, sizes, changed)
    assert_close(facts(tmp_path), one(**changes)[1])
    assert facts(tmp_path)[4]["rolled_back"].startswith("from step 6: output of embed_tokens")
    kept = tensors_of(tmp_path, 10).state
    assert (kept["position"]["left_out"], kept["rollbacks"]) == ([[20 * 32, 4 * 32]], 1)


def test_rollbacks_are_counted(worlds, tmp_path):
    changes = {"on_nonfinite": "rollback", "bad": (5, 9), "max_rollbacks": 1}
    for answer in worlds(parallel_jobs.train_badly, tmp_path, {"dp": 2}, changes):
        assert "train: step 2 must have a finite loss" in answer
        assert "the last good checkpoint is" in answer
        assert "step-0" in answer


def test_what_is_not_finite_is_named_with_its_rank(worlds, tmp_path):
    sizes = {"pp": 2}
    name = "layers.1.mlp.up_proj.weight"
    for answer in worlds(parallel_jobs.train_with_bad_weight, tmp_path / "weight", sizes, 1, name):
        assert f"first bad tensor: parameter {name} on rank 1;" in answer
    for answer in worlds(parallel_jobs.train_with_bad_gradient, tmp_path / "gradient", sizes, "layers.1.mlp.up_proj"):
        assert re.search(r"first bad tensor: gradient of layers\.1\.\S+ on rank 1;", answer)
    skip = {"on_nonfinite": "skip", "bad": (6,), "max_skipped_steps": 1}
    assert set(worlds(parallel_jobs.train_badly, tmp_path / "skip", sizes, skip)) == {""}
    record = facts(tmp_path / "skip")[1]
    assert (record["loss"], record["skipped"]) == (None, "output of embed_tokens on rank 0")


def test_a_second_run_in_the_folder_is_refused_on_all_ranks(worlds, tmp_path):
    for rank, said in enumerate(worlds(parallel_jobs.second_trainer, tmp_path, {"dp": 2})):
        assert len(said) == 1
        assert "must have one process training in it" in said[0]
        assert said[0].startswith("rank 0: RuntimeError: ") == (rank > 0)


@pytest.mark.parametrize("what", ["block", pytest.param("swiglu", marks=pytest.mark.full)])
def test_recompute_and_bf16_on_ranks(worlds, one, tmp_path, what):
    """bf16 activations, fp32 weights and sums: as one process, whose sums have another order; the same bits with
    activations made again."""
    schedule = ScheduleConfig(peak_lr=1e-2, min_lr=1e-3, warmup_steps=1)
    changes, runs = {"dtype": "bf16", "steps": 3, "average_every_steps": 0, "schedule": schedule}, {}
    for recompute in ("none", what):
        worlds(parallel_jobs.train, tmp_path / recompute, {"tp": 2}, {**changes, "recompute": recompute})
        runs[recompute] = facts(tmp_path / recompute)
    assert runs[what] == runs["none"]
    assert_close(runs["none"], one(**changes)[1], 2e-2)
    for stem in ("model", "optimizer"):
        kept = tensors_of(tmp_path / "none", 3).tensors[stem]
        assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.full)], ids=["apart", "tied"])
def test_wrong_targets_are_counted_over_the_vocabulary_of_all_ranks(worlds, tied):
    wanted, losses = parallel_jobs.wrong_targets(0, None, None, tied)
    for sizes in ({"tp": 2, "pp": 2}, {"cp": 2, "dp": 2}):
        for wrong, found in worlds(parallel_jobs.wrong_targets, None, sizes, tied):
            assert wrong == wanted
            assert found == pytest.approx(losses, rel=BOUND)


def test_what_does_not_fit_the_layout_is_named(tmp_path):
    from herdkern.train.parallel_engine import _check_batches

    with pytest.raises(ValueError, match="batch_size must be a multiple of dp=3, got 4"):
        _check_batches(PARALLEL_RUN, ParallelConfig(dp=3))
    with pytest.raises(ValueError, match="micro_batch_size must divide the 2 sequences of a data-parallel rank, got 4"):
        _check_batches(TrainConfig(batch_size=4, micro_batch_size=4), ParallelConfig(dp=2))
    with pytest.raises(ValueError, match="objective must be next_token_loss with parallel"):
        Trainer(None, PARALLEL_RUN, None, tmp_path, objective=print, parallel=ParallelConfig())
