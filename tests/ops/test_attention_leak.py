"""No document sees another: 200 random packings, and a control that the checks do catch a leak.

Equality is bitwise: how a document is cut into tiles depends on the document alone.
"""

import random

import pytest
import torch
from attention_cases import HEADS, NAMES, Packed, attention_with_lse, borders, packed


@pytest.fixture(autouse=True)
def _one_thread(with_threads):
    with_threads(1)


def random_case(seed: int) -> tuple[Packed, bool]:
    rng = random.Random(seed)
    longest = rng.choice([3, 20, 80, 200])
    lengths = [rng.choice([0, 1, rng.randint(1, longest)]) for _ in range(rng.randint(2, 9))] + [
        rng.randint(1, longest)
    ]
    rng.shuffle(lengths)
    lengths_k = None
    if rng.random() < 0.4:
        lengths_k = [max(0, n + rng.randint(-5, 60)) for n in lengths]
    dtype = rng.choice([torch.float32, torch.bfloat16])
    head_dim = rng.choice([1, 8, 16, 24, 33, 64])
    return packed(lengths, dtype, rng.choice(HEADS), head_dim, lengths_k=lengths_k, seed=seed), rng.random() < 0.7


def documents(batch: Packed) -> list[tuple[slice, slice]]:
    """The rows of q and of k of each document."""
    cu_k = batch.cu_seqlens if batch.cu_seqlens_k is None else batch.cu_seqlens_k
    q, k = batch.cu_seqlens.tolist(), cu_k.tolist()
    return [(slice(q[d], q[d + 1]), slice(k[d], k[d + 1])) for d in range(len(q) - 1)]


def part(results: list[torch.Tensor], rows: slice, keys: slice) -> list[torch.Tensor]:
    out, lse, dq, dk, dv = results
    return [out[rows], lse[:, rows], dq[rows], dk[keys], dv[keys]]


def same_bits(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def perturbed(batch: Packed, rows: slice, keys: slice, value: float | None, seed: int) -> Packed:
    """The batch with one document's tensors replaced: by other numbers, or all by `value`."""
    generator = torch.Generator().manual_seed(seed + 10_000)

    def replaced(x: torch.Tensor, at: slice) -> torch.Tensor:
        y = x.clone()
        y[at] = torch.randn(y[at].shape, generator=generator).to(y.dtype) if value is None else value
        return y

    return Packed(
        replaced(batch.q, rows),
        replaced(batch.k, keys),
        replaced(batch.v, keys),
        replaced(batch.dout, rows),
        batch.cu_seqlens,
        batch.cu_seqlens_k,
    )


def leaks(batch: Packed, seed: int, **options) -> list[str]:
    """Which results of other documents change, by as much as one bit, when one document's content changes."""
    chosen = random.Random(seed).choice(
        [d for d, (q, k) in enumerate(documents(batch)) if q.stop > q.start or k.stop > k.start]
    )
    before = batch.run(attention_with_lse, **options)
    found = []
    for value in (None, float("inf"), float("nan")):
        after = perturbed(batch, *documents(batch)[chosen], value, seed).run(attention_with_lse, **options)
        for d, (rows, keys) in enumerate(documents(batch)):
            if d != chosen:
                pairs = zip(NAMES, part(after, rows, keys), part(before, rows, keys), strict=True)
                found += [
                    f"{name} of document {d} when {chosen} became {value}"
                    for name, x, y in pairs
                    if not torch.equal(x, y)
                ]
    return found


@pytest.mark.parametrize("seed", range(200))
def test_random_packing(seed):
    batch, causal = random_case(seed)
    whole = batch.run(attention_with_lse, causal=causal)
    for rows, keys in documents(batch):
        alone = Packed(
            batch.q[rows],
            batch.k[keys],
            batch.v[keys],
            batch.dout[rows],
            borders([rows.stop - rows.start]),
            borders([keys.stop - keys.start]),
        )
        assert same_bits(part(whole, rows, keys), alone.run(attention_with_lse, causal=causal))
    assert leaks(batch, seed, causal=causal) == []


@pytest.mark.parametrize("seed", range(20))
def test_control_without_the_document_mask_leaks(seed):
    """One document of everything, looked at by the old borders: the check above must find it out."""
    batch, _ = random_case(seed)
    lengths = [rows.stop - rows.start for rows, _ in documents(batch)]
    if sum(length > 0 for length in lengths) < 2:
        lengths = [4, 4]
    batch = packed(lengths, batch.q.dtype, (2, 1), 8, seed=seed)
    unmasked = borders([sum(lengths)])

    def without_mask(q, k, v, cu_seqlens, *, cu_seqlens_k=None, **options):
        return attention_with_lse(q, k, v, unmasked, **options)

    before = batch.run(without_mask, causal=False)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    after = perturbed(batch, *documents(batch)[longest], None, seed).run(without_mask, causal=False)
    others = [d for d in range(len(lengths)) if d != longest and lengths[d] > 0]
    for d in others:
        rows, keys = documents(batch)[d]
        for name, x, y in zip(NAMES, part(after, rows, keys), part(before, rows, keys), strict=True):
            assert not torch.equal(x, y), name


def test_borders_decide_not_content():
    """Documents with equal content do not attend to each other: each gives what it gives alone."""
    one = packed([21], torch.float32, (2, 1), 16)
    twice = Packed(*(torch.cat([x, x]) for x in (one.q, one.k, one.v, one.dout)), borders([21, 21]))
    whole, alone = twice.run(attention_with_lse), one.run(attention_with_lse)
    assert same_bits(part(whole, slice(0, 21), slice(0, 21)), alone)
    assert same_bits(part(whole, slice(21, 42), slice(21, 42)), alone)
