"""Attention on 2, 3 and 4 ranks against one: results, gradients, bytes, leaks and errors."""

import dataclasses
import re

import context_jobs
import numpy as np
import pytest
import torch
from context_jobs import Case
from ranks import Ranks

from herdkern.parallel import ContextPlan

pytestmark = pytest.mark.distributed

CASES = [
    Case(name="one_document", lengths=(1024,)),
    Case(name="not_divisible", lengths=(701,)),
    Case(name="crosses_every_border", lengths=(90, 333, 1, 257, 0, 1, 130, 95)),
    Case(name="length_1", lengths=(1,) * 37),
    Case(name="short_and_long", lengths=(3, 640, 5, 7, 2)),
    Case(name="fewer_tokens_than_ranks", lengths=(1, 1)),
    Case(name="one_head", lengths=(200, 300), heads=(1, 1, 16)),
    Case(name="gqa_8", lengths=(150, 410), heads=(8, 1, 24)),
    Case(name="gqa_3", lengths=(600, 210), heads=(6, 2, 16)),
    Case(name="window", lengths=(900, 40, 300), window=70),
    Case(name="window_0", lengths=(300, 100), window=0),
    Case(name="both_ways", lengths=(300, 500), causal=False),
    Case(name="softcap_sinks", lengths=(320, 190), softcap=3.0, sinks=True),
    Case(name="keep", lengths=(320, 190, 77), keep=True),
]
MODES = ["needed", "allgather"]


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as started:
        yield started


def attend(ranks, case, size, change=None):
    return ranks.run(context_jobs.attend, size, case, change)[:size]


def relative(found, expected):
    if expected.size == 0:
        return 0.0
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


def assert_as_one_rank(case, answers):
    expected = context_jobs.one_rank(case)
    found = context_jobs.together(case, answers)
    if case.mode == "needed":
        np.testing.assert_array_equal(found[0], expected[0])
    assert relative(found[0], expected[0]) <= 1e-6
    for name, got, want in zip(("dq", "dk", "dv", "dsinks"), found[1:], expected[1:], strict=True):
        if want is not None:
            assert relative(got, want) <= 1e-5, name


def every_way():
    """Each case in each mode on 2, 3 and 4 ranks; by default each once, and the first ones always."""
    ways = []
    for i, case in enumerate(CASES):
        for way in range(6):
            mode, size = MODES[way % 2], 2 + way // 2
            marks = [] if i < 3 or way in (i % 6, (i + 3) % 6) else [pytest.mark.full]
            ways.append(pytest.param(case, mode, size, id=f"{case.name}-{mode}-{size}", marks=marks))
    return ways


@pytest.mark.parametrize(("case", "mode", "size"), every_way())
def test_as_one_rank(ranks, case, mode, size):
    case = dataclasses.replace(case, mode=mode)
    answers = attend(ranks, case, size)
    assert_as_one_rank(case, answers)
    for rank, (_, said, seen) in enumerate(answers):
        assert said == seen == context_jobs.expected_traffic(case, size, rank)


@pytest.mark.full
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(60))
def test_random_cases_as_one_rank(ranks, seed, size):
    case = context_jobs.random_case(seed)
    answers = attend(ranks, case, size)
    assert_as_one_rank(case, answers)
    for rank, (_, said, seen) in enumerate(answers):
        assert said == seen == context_jobs.expected_traffic(case, size, rank)


@pytest.mark.parametrize("mode", MODES)
def test_one_rank_alone(ranks, mode):
    case = Case(name="alone", lengths=(70, 0, 130), mode=mode)
    answers = attend(ranks, case, 1)
    assert_as_one_rank(case, answers)
    assert answers[0][1] == answers[0][2] == context_jobs.expected_traffic(case, 1, 0)


def test_bits_do_not_depend_on_how_the_plan_is_cut(ranks):
    """Cuts anywhere else change bits: the promise hangs on the alignment, and the comparison can fail."""
    case = Case(name="aligned", lengths=(997, 400))
    expected = context_jobs.one_rank(case)[0]
    aligned = context_jobs.together(case, attend(ranks, case, 4))[0]
    np.testing.assert_array_equal(aligned, expected)
    anywhere = dataclasses.replace(case, align=1)
    assert (anywhere.plan(4).pieces.begin % 16).any()
    found = context_jobs.together(anywhere, attend(ranks, anywhere, 4))[0]
    assert (found != expected).any()
    assert relative(found, expected) <= 1e-6


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_16_bit_loses_no_more_than_one_rank(ranks, mode, size):
    """Gradients of keys are summed in fp32 over ranks and rounded once."""
    case = Case(name="bf16", lengths=(310, 1, 123), heads=(4, 2, 32), dtype=torch.bfloat16, mode=mode)
    gold = context_jobs.one_rank(case, torch.float64)
    one = context_jobs.one_rank(case)
    found = context_jobs.together(case, attend(ranks, case, size))
    if mode == "needed":
        np.testing.assert_array_equal(found[0], one[0])
    for name, got, ref, best in zip(("out", "dq", "dk", "dv"), found, one, gold):
        assert relative(got, best) <= 1.05 * relative(ref, best), name


@pytest.mark.parametrize("mode", MODES)
def test_slope_of_the_error_against_the_number_of_ranks_is_not_above_zero(ranks, mode):
    """Least squares of the error against fp64 over 1 to 4 ranks: no slope beyond two of its standard errors."""
    errors = {name: [] for name in ("out", "dq", "dk", "dv")}
    for seed in range(4):
        case = Case(name="flat", lengths=(230, 1, 100), mode=mode, seed=seed)
        gold = context_jobs.one_rank(case, torch.float64)
        found = [context_jobs.together(case, attend(ranks, case, size)) for size in (1, 2, 3, 4)]
        for i, name in enumerate(errors):
            scale = np.abs(gold[i]).max()
            errors[name].append([np.sqrt(np.square(x[i] - gold[i]).mean()) / scale for x in found])
    for name, rows in errors.items():
        of_one = np.array(rows) / np.array(rows)[:, :1]
        slopes = ((np.arange(4) - 1.5) * of_one).sum(1) / 5
        assert slopes.mean() <= 2 * slopes.std(ddof=1) / np.sqrt(len(slopes)) + 1e-4, (name, slopes)


@pytest.mark.parametrize("value", [float("nan"), pytest.param(1e30, marks=pytest.mark.full)])
@pytest.mark.parametrize("mode", MODES)
def test_no_document_reaches_another(ranks, mode, value):
    case = Case(name="leak", lengths=(90, 333, 1, 257, 130), mode=mode)
    clean = context_jobs.together(case, attend(ranks, case, 3))
    borders = np.cumsum([0, *case.lengths])
    for document in range(len(case.lengths)):
        answers = attend(ranks, case, 3, context_jobs.Poison(document, case.lengths, value))
        own = slice(borders[document], borders[document + 1])
        for found, expected in zip(context_jobs.together(case, answers)[:4], clean):
            np.testing.assert_array_equal(found[own], expected[own])


def test_a_dropped_border_is_seen_as_a_leak(ranks):
    """The same test on a plan that takes two documents for one: what it must find is there to be found."""
    case = Case(name="leaky", lengths=(90, 590, 131))
    poisoned = context_jobs.Poison(1, (90, 333, 257, 131), float("nan"))
    answers = attend(ranks, case, 3, poisoned)
    out = context_jobs.together(case, answers)[0]
    assert np.isnan(out[90 + 333 : 90 + 590]).any()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("mode", MODES)
def test_whole_model_as_one_rank(ranks, mode, size):
    lengths = (301, 1, 44, 130, 37)
    loss, gradients = context_jobs.model_loss(lengths)
    keep = size == 3
    answers = ranks.run(context_jobs.model_loss_on_ranks, size, lengths, mode, keep)[:size]
    expected = [
        context_jobs.expected_traffic(Case(name="model", lengths=lengths, mode=mode, keep=keep), size, rank)
        for rank in range(size)
    ]
    for (found, found_gradients, traffic), one in zip(answers, expected, strict=True):
        assert abs(found - loss) <= 1e-6 * abs(loss)
        for name, gradient in gradients.items():
            assert relative(found_gradients[name], gradient) <= 1e-5, name
        assert dataclasses.astuple(traffic) == tuple(3 * count for count in dataclasses.astuple(one))


PLAN = ContextPlan.make([0, 100, 300], 2)
WRONG = {
    "group": ({"plan": ContextPlan.make([0, 100, 300], 3)}, "group must have the 3 ranks of plan, got 2"),
    "tokens": ({"tokens": 7}, "q and k must have the 1[0-9]+ tokens of rank 0 .of 300 in cu_seqlens., got 7 and 7"),
    "borders_of_plan": ({"cu_seqlens": [0, 100, 301], "plan": PLAN}, "borders of plan, up to 300, got 3 up to 301"),
    "total": ({"cu_seqlens": [0, 100, 500]}, "q and k must have the 2[0-9]+ tokens of rank 0 .of 500 in cu_seqlens"),
    "start": ({"cu_seqlens": [5, 100, 300]}, "cu_seqlens must start with 0, got 5"),
    "decrease": ({"cu_seqlens": [0, 400, 300]}, r"cu_seqlens must not decrease \(entry 2 follows 400\), got 300"),
    "int64": ({"dtype": torch.int64}, "cu_seqlens must be int32, got int64"),
    "mode": ({"mode": "ring"}, "mode must be one of needed, allgather, got 'ring'"),
    "window_both_ways": ({"causal": False, "window_size": (3, -1)}, r"window_size must be \(-1, -1\) where causal"),
    "plan_window": ({"plan": PLAN, "window_size": (3, -1)}, "plan must be made for causal=True and window_left=3"),
    "plan_causal": ({"plan": PLAN, "causal": False}, "plan must be made for causal=False and window_left=-1"),
    "keep": ({"keep_gathered": "yes"}, "keep_gathered must be True or False, got 'yes'"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_errors_name_what_is_wrong(ranks, fault):
    changes, message = WRONG[fault]
    said = ranks.run(context_jobs.error_of, changes)[0]
    assert said.startswith(("context_parallel_attention: ", "ContextPlan: "))
    assert re.search(message, said), said


def test_every_rank_says_its_number_when_tokens_are_wrong(ranks):
    said = ranks.run(context_jobs.error_of, {"tokens": 7})
    assert ["of rank 0" in said[0], "of rank 1" in said[1], said[2], said[3]] == [True, True, None, None]
