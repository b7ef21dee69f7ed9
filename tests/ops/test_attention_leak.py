"""No document sees another: 1,000 random packings (200 by default) with every feature, and a control that the checks do
catch a leak; the order of the documents, the number of threads and repetition change no bit.

Equality is bitwise: how a document is cut into tiles depends on the document alone.
"""

import random
from dataclasses import replace

import pytest
import torch
from attention_cases import HEADS, LAYOUTS, NAMES, Packed, assert_bound, attention_with_lse, borders, packed, relayout

from herdkern.ops.backend import available_isas, forced_isa

ISAS = available_isas()
DEFAULT_SEEDS = [*range(200), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(200, 1000))]


@pytest.fixture(autouse=True)
def _one_thread(with_threads):
    with_threads(1)


def random_case(seed: int) -> tuple[Packed, dict]:
    """A packing and the options of its call."""
    rng = random.Random(seed)
    longest = rng.choice([3, 20, 80, 200])
    lengths = [rng.choice([0, 1, rng.randint(1, longest)]) for _ in range(rng.randint(2, 9))] + [
        rng.randint(1, longest)
    ]
    rng.shuffle(lengths)
    lengths_k = None
    if rng.random() < 0.4:
        lengths_k = [max(0, n + rng.randint(-5, 60)) for n in lengths]
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    head_dim, heads = rng.choice([1, 8, 16, 24, 33, 64, 96]), rng.choice(HEADS)
    batch = packed(lengths, dtype, heads, head_dim, lengths_k=lengths_k, sinks=rng.random() < 0.4, seed=seed)
    options = {
        "causal": rng.random() < 0.6,
        "window_size": tuple(rng.choice([-1, -1, rng.randint(0, longest)]) for _ in range(2)),
        "softcap": rng.choice([0.0, 0.0, 1.0, 20.0]),
    }
    return relayout(batch, rng.choice(LAYOUTS)), options


def part(results: list[torch.Tensor], rows: slice, keys: slice) -> list[torch.Tensor]:
    """What belongs to one document; dsinks belongs to all."""
    out, lse, dq, dk, dv = results[:5]
    return [out[rows], lse[:, rows], dq[rows], dk[keys], dv[keys]]


def same_bits(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(got) == len(expected) and all(torch.equal(x, y) for x, y in zip(got, expected))


def perturbed(batch: Packed, rows: slice, keys: slice, value: float | None, seed: int) -> Packed:
    """The batch with one document's tensors replaced: by other numbers, or all by `value`. Strides stay."""
    generator = torch.Generator().manual_seed(seed + 10_000)

    def replaced(x: torch.Tensor, at: slice) -> torch.Tensor:
        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        y.copy_(x)
        y[at] = torch.randn(y[at].shape, generator=generator).to(y.dtype) if value is None else value
        return y

    tensors = {"q": rows, "k": keys, "v": keys, "dout": rows}
    return replace(batch, **{name: replaced(getattr(batch, name), at) for name, at in tensors.items()})


def leaks(batch: Packed, seed: int, **options) -> list[str]:
    """Which results of other documents change, by as much as one bit, when one document's content changes."""
    documents = batch.documents()
    chosen = random.Random(seed).choice(
        [d for d, (q, k) in enumerate(documents) if q.stop > q.start or k.stop > k.start]
    )
    before = batch.run(attention_with_lse, **options)
    found = []
    for value in (None, float("inf"), float("nan")):
        after = perturbed(batch, *documents[chosen], value, seed).run(attention_with_lse, **options)
        for d, (rows, keys) in enumerate(documents):
            if d != chosen:
                pairs = zip(NAMES, part(after, rows, keys), part(before, rows, keys))
                found += [
                    f"{name} of document {d} when {chosen} became {value}"
                    for name, x, y in pairs
                    if not torch.equal(x, y)
                ]
    return found


def alone(batch: Packed, rows: slice, keys: slice) -> Packed:
    """The batch of one document."""
    return replace(
        batch,
        q=batch.q[rows],
        k=batch.k[keys],
        v=batch.v[keys],
        dout=batch.dout[rows],
        cu_seqlens=borders([rows.stop - rows.start]),
        cu_seqlens_k=borders([keys.stop - keys.start]),
    )


def reordered(batch: Packed, order: list[int]) -> Packed:
    """The same documents in another order."""
    documents = [batch.documents()[d] for d in order]
    rows = torch.cat([torch.arange(rows.start, rows.stop) for rows, _ in documents])
    keys = torch.cat([torch.arange(keys.start, keys.stop) for _, keys in documents])
    lengths, lengths_k = ([x.stop - x.start for x in side] for side in zip(*documents))
    cu_k = None if batch.cu_seqlens_k is None else borders(lengths_k)
    return replace(
        batch,
        q=batch.q[rows],
        k=batch.k[keys],
        v=batch.v[keys],
        dout=batch.dout[rows],
        cu_seqlens=borders(lengths),
        cu_seqlens_k=cu_k,
    )


def assert_same_documents(
    got: list[torch.Tensor], other: Packed, expected: list[torch.Tensor], order: list[int], batch
):
    """Results of `other`, the documents of `batch` in `order`, hold the bits of `expected` for each document."""
    for place, d in enumerate(order):
        assert same_bits(part(got, *other.documents()[place]), part(expected, *batch.documents()[d])), d


@pytest.mark.parametrize("seed", DEFAULT_SEEDS)
def test_random_packing(seed):
    batch, options = random_case(seed)
    whole = batch.run(attention_with_lse, **options)
    assert all(x.isfinite().all() for x in (whole[0], *whole[2:]))
    for rows, keys in batch.documents():
        assert same_bits(part(whole, rows, keys), alone(batch, rows, keys).run(attention_with_lse, **options)[:5])
    assert leaks(batch, seed, **options) == []


@pytest.mark.parametrize("seed", DEFAULT_SEEDS)
def test_order_of_the_documents_changes_no_bit(seed):
    batch, options = random_case(seed)
    whole = batch.run(attention_with_lse, **options)
    rng, order = random.Random(seed), list(range(len(batch.documents())))
    for _ in range(3):
        rng.shuffle(order)
        other = reordered(batch, order)
        got = other.run(attention_with_lse, **options)
        assert_same_documents(got, other, whole, order, batch)
        if batch.sinks is not None:  # a sum over all documents
            torch.testing.assert_close(got[5], whole[5], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("seed", range(50))
def test_control_without_the_document_mask_leaks(seed):
    """One document of everything, looked at by the old borders: the check above must find it out."""
    batch, options = random_case(seed)
    lengths = [rows.stop - rows.start for rows, _ in batch.documents()]
    if sum(length > 0 for length in lengths) < 2:
        lengths = [4, 4]
    batch = packed(lengths, batch.q.dtype, (2, 1), 8, sinks=batch.sinks is not None, seed=seed)
    options = {"causal": False, "softcap": options["softcap"]}
    unmasked = borders([sum(lengths)])

    def without_mask(q, k, v, cu_seqlens, *, cu_seqlens_k=None, **more):
        return attention_with_lse(q, k, v, unmasked, **more)

    documents = batch.documents()
    before = batch.run(without_mask, **options)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    for value in (None, float("nan")):
        after = perturbed(batch, *documents[longest], value, seed).run(without_mask, **options)
        for d in range(len(lengths)):
            if d != longest and lengths[d] > 0:
                for name, x, y in zip(NAMES, part(after, *documents[d]), part(before, *documents[d])):
                    assert not torch.equal(x, y), name
                    assert value is None or not x.isfinite().all(), name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(10))
def test_order_and_threads_and_repetition_change_no_bit(seed, dtype, isa, with_threads):
    repeats_with_threads(seed, dtype, isa, with_threads, repeats=3)


@pytest.mark.full
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_repetitions_change_no_bit(seed, dtype, isa, with_threads):
    repeats_with_threads(seed, dtype, isa, with_threads, repeats=100)


def repeats_with_threads(seed, dtype, isa, with_threads, repeats):
    """Documents enough for two threads, among them one that is cut in the backward pass."""
    rng = random.Random(seed)
    lengths = [300, *(rng.randint(0, 90) for _ in range(4)), 140]
    order = list(range(len(lengths)))
    batch = packed(lengths, dtype, (4, 2), rng.choice([16, 40, 64]), sinks=seed % 2 == 1, seed=seed)
    options = {
        "causal": seed % 3 != 0,
        "window_size": (200, 30) if seed % 5 > 2 else (-1, -1),
        "softcap": seed % 4 * 1.5,
    }
    with forced_isa(isa):
        expected = batch.run(attention_with_lse, **options)
        assert_bound(batch, expected, **options)
        for repeat in range(repeats):
            with_threads(1 + repeat % 2)
            if repeat % 10 == 0:
                rng.shuffle(order)
                other = reordered(batch, order)
                again = other.run(attention_with_lse, **options)
            got = other.run(attention_with_lse, **options)
            assert same_bits(got, again)  # dsinks too
            assert_same_documents(got, other, expected, order, batch)


def test_borders_decide_not_content():
    """Documents with equal content do not attend to each other: each gives what it gives alone."""
    one = packed([21], torch.float32, (2, 1), 16)
    twice = Packed(*(torch.cat([x, x]) for x in (one.q, one.k, one.v, one.dout)), borders([21, 21]))
    whole, single = twice.run(attention_with_lse), one.run(attention_with_lse)
    assert same_bits(part(whole, slice(0, 21), slice(0, 21)), single)
    assert same_bits(part(whole, slice(21, 42), slice(21, 42)), single)
