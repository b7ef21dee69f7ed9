"""Plans of context parallelism, without ranks: what is cut where, how even it is, what travels, what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from context_jobs import random_case

from herdkern.ops import attention
from herdkern.ops.backend import available_isas, forced_isa
from herdkern.parallel import ContextPlan, context_balance, query_alignment
from herdkern.parallel.context_balance import Work

MODES = ["needed", "allgather"]


def borders(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def random_lengths(seed):
    rng = np.random.default_rng(seed)
    kind = seed % 4
    if kind == 0:
        return rng.integers(0, 5, size=rng.integers(1, 30))
    if kind == 1:
        return rng.lognormal(5, 1.5, size=rng.integers(1, 60)).astype(np.int64)
    if kind == 2:
        return rng.integers(1, 2000, size=rng.integers(1, 4))
    return np.full(rng.integers(1, 50), rng.integers(1, 300))


def naive_work(plan, rank):
    """Pairs of a query and a key that it sees, counted one by one."""
    lengths = np.diff(plan.cu_seqlens)
    document = np.repeat(np.arange(len(lengths)), lengths)
    tokens = plan.tokens_of(rank).numpy()
    positions = tokens - plan.cu_seqlens[document[tokens]]
    if not plan.causal:
        return int(lengths[document[tokens]].sum())
    seen = positions + 1
    return int((np.minimum(seen, plan.window_left + 1) if plan.window_left >= 0 else seen).sum())


def naive_needs(plan, rank):
    """Tokens of other ranks that some query of `rank` sees, as a set of rows of the batch."""
    own = set(plan.tokens_of(rank).tolist())
    lengths = np.diff(plan.cu_seqlens)
    document = np.repeat(np.arange(len(lengths)), lengths)
    needed = set()
    for token in own:
        begin, end = plan.cu_seqlens[document[token]], plan.cu_seqlens[document[token] + 1]
        if plan.causal:
            begin, end = begin if plan.window_left < 0 else max(begin, token - plan.window_left), token + 1
        needed |= set(range(begin, end))
    return needed - own


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_the_naive_twin(mode, seed):
    lengths = random_lengths(seed)[:20] % 400
    size = 1 + seed % 5
    causal = seed % 3 != 0
    window = [-1, 7, 0][seed // 4 % 3] if causal else -1
    plan = ContextPlan.make(borders(lengths), size, mode=mode, causal=causal, window_left=window, align=1 + seed % 7)
    everything = torch.cat([plan.tokens_of(rank) for rank in range(size)])
    assert sorted(everything.tolist()) == list(range(lengths.sum()))
    positions = np.concatenate([np.arange(n) for n in lengths] or [[]])
    for rank in range(size):
        tokens = plan.tokens_of(rank)
        assert len(tokens) == plan.num_tokens[rank]
        assert plan.positions_of(rank).tolist() == positions[tokens.numpy()].astype(int).tolist()
        assert plan.work[rank] == naive_work(plan, rank)
        assert plan.rows_needed(rank) == len(naive_needs(plan, rank))
    assert sum(map(plan.rows_sent, range(size))) == sum(map(plan.rows_received, range(size)))
    x = torch.arange(lengths.sum())
    assert torch.equal(plan.unshard([plan.shard(x, rank) for rank in range(size)]), x)


@pytest.mark.skipif(context_balance._native is None, reason="herdkern._ops is not built, or has no planner")
@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 2000), marks=pytest.mark.full)], ids=["some", "many"]
)
def test_native_plans_are_those_of_numpy(seeds):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        lengths = random_lengths(seed)
        if seed % 5 == 0:  # many, with a tail
            lengths = rng.lognormal(rng.uniform(3, 8), rng.uniform(0.1, 2.5), int(2 ** rng.uniform(0, 12)))
            lengths = lengths.astype(np.int64)
        elif seed % 5 == 1:  # millions of tokens
            lengths = rng.integers(0, 1 << 22, rng.integers(1, 9))
        size, align = int(rng.choice([1, 2, 3, 5, 8, 16, 64])), int(rng.choice([1, 7, 8, 32, 170, 512]))
        causal = bool(rng.random() < 0.75)
        work = Work(causal, int(rng.choice([0, 1, 8, 300])) if causal else 0)
        (ours, cuts), (numpys, expected) = (
            make(lengths, size, align, work)
            for make in (context_balance.segments_and_cuts, context_balance.segments_and_cuts_reference)
        )
        assert cuts == expected, seed
        for column in ("document", "offset", "borders"):
            one, other = getattr(ours, column), getattr(numpys, column)
            assert one.dtype == other.dtype
            assert np.array_equal(one, other), (seed, column)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_one_document_is_cut_as_the_paper_cuts_it(size):
    """Rank i holds chunks i and 2 * size - 1 - i of equal length; moving what is needed is no more than all of it."""
    total = 2 * size * 1024
    paper = ContextPlan.make([0, total], size, mode="allgather")
    ours = ContextPlan.make([0, total], size)
    chunks = torch.arange(total).view(2 * size, 1024)
    for rank in range(size):
        expected = torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
        assert torch.equal(paper.tokens_of(rank), expected)
        assert torch.equal(ours.tokens_of(rank), expected)
        assert ours.rows_received(rank) <= paper.rows_received(rank)
    assert paper.work_imbalance <= 1.01
    assert ours.work_imbalance <= 1.01


LAYOUTS = {
    "one": np.array([131072]),
    "two": np.array([65536, 65536]),
    "skew16": (131072 * np.arange(1, 17) ** -1.25 / (np.arange(1, 17) ** -1.25).sum()).astype(np.int64),
    "short128": np.random.default_rng(0).lognormal(6.8, 0.6, 128).astype(np.int64),
    "web": np.random.default_rng(1).lognormal(5.9, 1.3, 133).astype(np.int64),
    "uniform4096": np.full(4096, 32),
    "one_and_many": np.array([40000, *[37] * 2000]),
    "tail4096": np.random.default_rng(3).lognormal(3, 1.0, 4096).astype(np.int64),
}


@pytest.mark.parametrize("size", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_work_is_even_on_every_layout(name, size):
    plan = ContextPlan.make(borders(LAYOUTS[name]), size, align=8)
    assert plan.work_imbalance <= 1.05
    assert plan.token_imbalance <= 1.1


@pytest.mark.full
@pytest.mark.parametrize("seed", range(400))
def test_work_is_even_on_random_layouts(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(rng.uniform(3, 8), rng.uniform(0.1, 2.5), size=int(2 ** rng.uniform(0, 12)))
    lengths = np.maximum(1, lengths * 131072 / lengths.sum()).astype(np.int64)
    for size in (2, 4, 8, 16):
        plan = ContextPlan.make(borders(lengths), size, align=8)
        assert plan.work_imbalance <= 1.05, (size, lengths.max())


def test_only_needed_rows_travel_and_few_of_them():
    """At most .35 of all-gather where the longest document is shorter than half of the batch."""
    for name, lengths in LAYOUTS.items():
        for size in (8, 16):
            plan = ContextPlan.make(borders(lengths), size)
            rows = sum(map(plan.rows_received, range(size)))
            assert rows == sum(map(plan.rows_needed, range(size)))
            share = rows / ((size - 1) * lengths.sum())
            assert share <= (0.35 if lengths.max() < lengths.sum() / 2 else 1), name


def test_bytes_are_rows_of_keys_and_of_gradients():
    plan = ContextPlan.make([0, 512], 2)
    assert [plan.rows_received(0), plan.rows_received(1)] == [256, 128]
    found = plan.bytes_of(0, num_kv_heads=3, head_dim=10, dtype=torch.bfloat16)
    assert (found.forward_sent, found.forward_received) == (128 * 120, 256 * 120)
    assert (found.backward_sent, found.backward_received) == (256 * 240 + 128 * 120, 128 * 240 + 256 * 120)
    kept = plan.bytes_of(0, num_kv_heads=3, head_dim=10, dtype=torch.float32, keep_gathered=True)
    assert (kept.backward_sent, kept.backward_received) == (256 * 240, 128 * 240)
    gathered = ContextPlan.make([0, 512], 2, mode="allgather").bytes_of(0, num_kv_heads=3, head_dim=10)
    assert gathered.forward_sent == gathered.forward_received == 256 * 120


def test_documents_are_cut_where_tiles_begin():
    lengths = random_lengths(1) + 300
    for align in (32, 170):
        plan = ContextPlan.make(borders(lengths), 7, align=align)
        assert (plan.pieces.begin % align == 0).all()
        assert len(plan.pieces.begin) > len(lengths)


@pytest.mark.parametrize(
    ("heads", "window", "expected"),
    [((8, 8, 64), False, 32), ((32, 8, 128), False, 8), ((6, 2, 64), False, 170), ((12, 2, 256), False, 42),
     ((8, 8, 64), True, 512), ((8, 1, 192), True, 32), ((6, 2, 64), True, 170)],
)  # fmt: skip
def test_alignment_follows_the_tiles_of_the_kernel(heads, window, expected):
    assert query_alignment(*heads, window=window) == expected


def test_every_rank_makes_the_same_plan_whatever_holds_the_borders():
    lengths = random_lengths(5)
    as_tensor = torch.from_numpy(borders(lengths)).int()
    plans = [ContextPlan.make(x, 3) for x in (borders(lengths), as_tensor, as_tensor.tolist())]
    assert plans[0].cuts == plans[1].cuts == plans[2].cuts
    assert [plan.tokens_of(1).tolist() for plan in plans] == [plans[0].tokens_of(1).tolist()] * 3


WRONG = {
    "start": (([1, 2], 2), {}, "ContextPlan: cu_seqlens must start with 0, got 1"),
    "decrease": (([0, 5, 3], 2), {}, "ContextPlan: cu_seqlens must not decrease (entry 2 follows 5), got 3"),
    "shape": ((np.zeros((2, 2), int), 2), {}, "ContextPlan: cu_seqlens must be (num_docs + 1,) integers, got (2, 2)"),
    "dtype": (([0.0, 5.0], 2), {}, "ContextPlan: cu_seqlens must be (num_docs + 1,) integers, got (2,) float64"),
    "cp_size": (([0, 5], 0), {}, "ContextPlan: cp_size must be at least 1, got 0"),
    "mode": (([0, 5], 2), {"mode": "ring"}, "ContextPlan: mode must be one of needed, allgather, got 'ring'"),
    "align": (([0, 5], 2), {"align": 0}, "ContextPlan: align must be at least 1, got 0"),
    "window": (([0, 5], 2), {"causal": False, "window_left": 3}, "ContextPlan: window_left must be -1 where causal"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_errors_name_what_is_wrong(fault):
    arguments, options, message = WRONG[fault]
    with pytest.raises(ValueError) as caught:
        ContextPlan.make(*arguments, **options)
    assert str(caught.value).startswith(message)


def test_wrong_rows_and_ranks_are_refused():
    plan = ContextPlan.make([0, 100], 2)
    with pytest.raises(ValueError, match=r"x must have 100 rows, got shape \(99,\)"):
        plan.shard(torch.zeros(99), 0)
    with pytest.raises(ValueError, match=r"parts must have \[\d+, \d+\] rows, got \[1, 2\]"):
        plan.unshard([torch.zeros(1), torch.zeros(2)])
    with pytest.raises(ValueError, match="rank must be 0 to 1, got 2"):
        plan.tokens_of(2)


@pytest.mark.parametrize("seed", [*range(16), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(16, 400))])
def test_divided_documents_keep_every_bit_at_every_isa(seed):
    """The promise of mode "needed", without ranks: what a rank calls for its piece against the whole batch."""
    case = dataclasses.replace(random_case(seed), mode="needed", dtype=(torch.float32, torch.bfloat16)[seed % 3 == 0])
    q, k, v, _, sinks = case.tensors()
    for isa in available_isas():
        with forced_isa(isa):
            whole = attention(q, k, v, case.cu_seqlens(), sinks=sinks, **case.options())
            for size in (2, 5):
                plan = case.plan(size)
                for piece in (piece for rank in range(size) for piece in plan.pieces.divided(rank)):
                    start = int(plan.cu_seqlens[piece.document])
                    rows = slice(start + piece.begin, start + piece.end)
                    keys = slice(start + piece.keys_begin, start + piece.keys_end)
                    borders = (torch.tensor([0, n], dtype=torch.int32) for n in (len(q[rows]), len(k[keys])))
                    cu_q, cu_k = borders
                    options = {"cu_seqlens_k": cu_k, "sinks": sinks, **case.options()}
                    assert torch.equal(attention(q[rows], k[keys], v[keys], cu_q, **options), whole[rows])
