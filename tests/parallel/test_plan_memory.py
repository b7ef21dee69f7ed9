"""The memory estimate against the bytes that live in real training steps."""

import dataclasses

import pytest
from live_bytes import RankAlone, peak_bytes

from herdkern.model.config import llama3_405b, nano
from herdkern.parallel.config import ParallelConfig
from herdkern.parallel.layout import Layout
from herdkern.parallel.memory_estimate import PURPOSES, as_table, estimate_memory, peak_rank

SMALL = dataclasses.replace(nano(512), max_seq_len=256)
DEEP = dataclasses.replace(SMALL, num_layers=6)
WIDE_VOCABULARY = dataclasses.replace(nano(6000), max_seq_len=256)
TIED = dataclasses.replace(DEEP, tied_embeddings=True)


AXES = {field.name for field in dataclasses.fields(ParallelConfig)}


def one(**settings) -> Layout:
    axes = ParallelConfig(**{name: value for name, value in settings.items() if name in AXES})
    others = {name: value for name, value in settings.items() if name not in AXES}
    return Layout(axes, **{"micro_batch_tokens": 256, **others})


LAYOUTS = [
    pytest.param(SMALL, one(dtype="fp32"), id="fp32"),
    pytest.param(SMALL, one(num_microbatches=3), id="accumulate"),
    pytest.param(DEEP, one(dtype="fp32", num_microbatches=2), id="deep-fp32-accumulate"),
    pytest.param(DEEP, one(recompute="block"), id="recompute-block"),
    pytest.param(DEEP, one(dtype="fp32", recompute="block", num_microbatches=2), id="recompute-block-accumulate"),
    pytest.param(DEEP, one(recompute="swiglu", num_microbatches=2), id="recompute-swiglu"),
    pytest.param(WIDE_VOCABULARY, one(), id="wide-vocabulary"),
    pytest.param(WIDE_VOCABULARY, one(dtype="fp32", micro_batch_tokens=64, num_microbatches=2), id="few-tokens"),
    pytest.param(TIED, one(num_microbatches=2), id="tied"),
    pytest.param(TIED, one(dtype="fp32", recompute="block"), id="tied-recompute"),
    pytest.param(DEEP, one(pp=2, num_microbatches=4), id="pp2"),
    pytest.param(DEEP, one(pp=2, num_chunks=2, num_microbatches=5, dtype="fp32"), id="pp2-v2"),
    pytest.param(DEEP, one(pp=4, num_chunks=2, num_microbatches=6), id="pp4-v2-ends-alone"),
    pytest.param(DEEP, one(pp=4, num_microbatches=3, recompute="block"), id="pp4-recompute"),
]


@pytest.mark.parametrize(("config", "layout"), LAYOUTS)
def test_estimate_is_within_a_tenth_of_the_measured_peak(config, layout):
    for rank in {0, layout.pp - 1}:
        alone = RankAlone(config, layout, rank)
        static = alone.static_bytes()
        measured = static + peak_bytes(alone.step)
        (estimate,) = estimate_memory(config, layout, [rank])
        assert estimate.num_params == sum(p.numel() for p in alone.params)
        assert estimate.in_tensors == pytest.approx(measured, rel=0.1)
        assert estimate.in_tensors - static == pytest.approx(measured - static, rel=0.1)  # what a step adds, too


def test_a_layout_that_keeps_more_than_said_is_found():
    """The bound can fail: the estimate of another layout is off by more than a tenth."""
    alone = RankAlone(DEEP, one(), 0)
    measured = alone.static_bytes() + peak_bytes(alone.step)
    for other in (one(recompute="block"), one(dtype="fp32"), one(micro_batch_tokens=384)):
        (estimate,) = estimate_memory(DEEP, other)
        assert abs(estimate.in_tensors / measured - 1) > 0.1


def test_the_table_holds_what_the_terms_hold():
    estimates = estimate_memory(DEEP, one(pp=2, num_microbatches=4))
    table = as_table(estimates, unit=1 << 20, name="MiB")
    assert table.splitlines()[0].split() == ["MiB", "at", "the", "peak", "pp", "0", "pp", "1"]
    totals = [float(word) for word in table.splitlines()[-1].split()[1:]]
    assert totals == pytest.approx([e.total / 2**20 for e in estimates], abs=0.005)
    assert all(set(e.terms) == set(PURPOSES) for e in estimates)
    assert all(size >= 0 for e in estimates for size in e.terms.values())


def test_every_schedule_ends_with_what_it_began_with():
    """Nothing is freed twice or forgotten: behind a step only what lives all the time and gradients are left."""
    from herdkern.parallel.memory_ledger import Ledger
    from herdkern.parallel.memory_walk import StageWalk

    for recompute in ("none", "swiglu", "block"):
        for fsdp in (False, True):
            for tp in (1, 2):
                layout = one(recompute=recompute, tp=tp, dp=2 if fsdp else 1, num_microbatches=2)
                for layers, is_first, is_last in ((0, 1, 0), (0, 0, 1), (1, 1, 0), (3, 0, 0), (2, 0, 1), (2, 1, 1)):
                    for config in (SMALL, dataclasses.replace(SMALL, tied_embeddings=True)):
                        kinds = {"is_first": bool(is_first), "is_last": bool(is_last)}
                        walk = StageWalk(config, layout, layers=layers, **kinds)
                        ledger = Ledger()
                        for microbatch in range(2):
                            ledger.run(walk.forward())
                            ledger.run(walk.backward(first=microbatch == 0, last=microbatch == 1))
                        left = {purpose: size for purpose, size in ledger.live.items() if size}
                        kept = "gradient shards" if fsdp else "gradients"
                        bytes_each = -(-4 // layout.shard_size) if fsdp else 4
                        assert set(left) == {kept}, (recompute, fsdp, tp, layers, kinds)
                        assert left[kept] == pytest.approx(walk.weight * bytes_each, rel=0.01 if fsdp else 0)


def test_tensor_context_and_data_ranks_share():
    whole = one(dp=2, micro_batch_tokens=8192)
    model = dataclasses.replace(llama3_405b(), num_layers=2)
    base = estimate_memory(model, whole)[0]
    for axes, share in (({"tp": 8}, 1 / 8), ({"cp": 8}, 1 / 8)):
        cut = estimate_memory(model, whole.cut(**axes))[0]
        assert cut.terms["activations"] == pytest.approx(base.terms["activations"] * share, rel=0.02)
    sharded = estimate_memory(model, whole.cut(dp=16))[0]
    assert sharded.terms["optimizer"] == base.terms["optimizer"] / 8
    assert sharded.terms["parameters"] == base.terms["parameters"]  # not resharded after the forward pass


def test_the_first_and_last_stage_are_not_the_fullest_of_405b():
    layout = one(tp=8, pp=16, dp=128, num_chunks=8, micro_batch_tokens=8192, num_microbatches=16)
    estimates = estimate_memory(llama3_405b(), layout)
    assert len(estimates) == 16
    assert peak_rank(estimates).pp_rank == 1  # rank 0 holds one layer fewer
    assert estimates[0].total < 80e9


def test_a_layout_holds_the_axes_of_a_run():
    layout = one(tp=2, cp=3, pp=4, dp=6, dp_shard=2, num_chunks=2, micro_batch_tokens=64)
    assert layout.world_size == layout.axes.world_size == 2 * 3 * 4 * 6
    assert (layout.shard_size, layout.num_stages, layout.rank_tokens) == (2 * 3, 4 * 2, 22)
    assert layout.cut(dp_shard=0).shard_size == 6 * 3
    assert (one().fsdp, one(cp=2).fsdp, one(dp=2).fsdp) == (False, True, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tp": 0}, "tp must be at least 1"),
        ({"num_microbatches": 0}, "num_microbatches must be at least 1"),
        ({"dp_shard": 3, "dp": 4}, "dp_shard must be 0"),
        ({"num_chunks": 2}, "num_chunks must be 1 without a pipeline"),
        ({"dtype": "fp16"}, "dtype must be"),
        ({"recompute": "all"}, "recompute must be"),
    ],
)
def test_wrong_layouts_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        one(**change)
