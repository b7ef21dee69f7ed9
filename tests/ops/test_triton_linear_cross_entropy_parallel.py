"""One shard of the vocabulary in Triton against fp64: statistics and gradients, targets here, elsewhere and ignored.

For bfloat16 the gradient of the logits is rounded before its products, in the kernel and in the plain implementation.
"""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from fp64_bound import worst_ratio
from triton_interpreter import triton_runs  # noqa: F401

from herdkern.ops import linear_cross_entropy_parallel as parallel
from herdkern.ops.linear_cross_entropy import Options

pytestmark = pytest.mark.triton
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = [
    pytest.param((FP32, FP32), id="fp32"),
    pytest.param((BF16, BF16), id="bf16"),
    pytest.param((BF16, FP32), id="bf16-weight-fp32"),
]
OPTIONS = [Options(parallel._NOWHERE, "none", 0.0, 0.0, 0.0), Options(parallel._NOWHERE, "none", 0.1, 1e-2, 5.0)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    from herdkern.ops.triton import linear_cross_entropy as module

    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 64 * 10)  # ten tokens
    monkeypatch.setattr(module, "_PART_BYTES", 2 * 12 * 40)  # forty rows of a float32 weight


def shard(dtypes):
    """hidden, weight, targets: in the shard, beyond it on both sides, ignored."""
    targets = torch.randint(-30, 90, (23,))
    targets[::7] = parallel._NOWHERE
    return torch.randn(23, 12).to(dtypes[0]), (torch.randn(61, 12) / 3).to(dtypes[1]), targets


def plain_gradients(given, dlosses, dlogps, dtype):
    """The reference, with the gradient of the logits in `dtype`."""
    eye = torch.eye(len(given.weight), dtype=given.stats.dtype)
    _, logits = parallel._logits_reference(given.hidden, given.weight, 0.0)
    of_logits = dataclasses.replace(given, hidden=logits, weight=eye)
    dlogits, _ = parallel._gradients_reference(of_logits, dlosses, dlogps, (True, False))
    dlogits = dlogits.to(dtype).to(given.stats.dtype)
    wide = given.weight.to(given.hidden.dtype).to(dlogits.dtype)
    return dlogits @ wide, (dlogits.T @ given.hidden.to(dlogits.dtype)).to(given.weight.dtype)


def doubled(given):
    values = given.weight.to(given.hidden.dtype).double()
    return dataclasses.replace(given, hidden=given.hidden.double(), weight=values, stats=given.stats.double())


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_shard_matches_fp64(dtypes, options):
    hidden, weight, targets = shard(dtypes)
    values = weight.to(hidden.dtype).double()
    found = parallel._STATS["triton"](hidden, weight, targets, options)
    plain = parallel._stats_reference(hidden, weight, targets, options)
    for got, ref, gold in zip(found, plain, parallel._stats_reference(hidden.double(), values, targets, options)):
        assert worst_ratio(got, ref, gold) <= 1
    everywhere = torch.cat([plain[:1], plain[1:2] * 2.5, plain[2:]])  # as if other shards held more
    given = parallel._Given(hidden, weight, targets, everywhere, options, 150)
    douts = torch.randn(23), torch.randn(23)
    got = parallel._GRADIENTS["triton"](given, *douts, (True, True))
    ref = plain_gradients(given, *douts, hidden.dtype)
    gold = parallel._gradients_reference(doubled(given), *(d.double() for d in douts), (True, True))
    for name, *results in zip(("dhidden", "dweight"), got, ref, gold):
        assert results[0].dtype == (FP32 if name == "dhidden" else weight.dtype)
        assert worst_ratio(*results) <= 1, name


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_wanted_gradients(needs):
    hidden, weight, targets = shard((FP32, FP32))
    stats = parallel._STATS["triton"](hidden, weight, targets, OPTIONS[0])
    given = parallel._Given(hidden, weight, targets, stats, OPTIONS[0], 61)
    both, some = (parallel._GRADIENTS["triton"](given, stats[0], stats[1], n) for n in ((True, True), needs))
    for one, other, needed in zip(some, both, needs):
        assert torch.equal(one, other) if needed else one is None


def test_one_rank_has_the_whole_loss(tmp_path):
    hidden, weight, _ = shard((FP32, FP32))
    targets = torch.randint(0, 61, (23,))
    targets[3] = -100
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        results = []
        for backend in ("triton", "reference"):
            leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            loss = parallel.vocab_parallel_linear_cross_entropy(*leaves, targets, vocab_start=0, backend=backend)
            results.append([loss, *torch.autograd.grad(loss, leaves)])
    finally:
        dist.destroy_process_group()
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
