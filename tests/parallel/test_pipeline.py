"""The pipeline on real ranks equals one process, keeps no more than its schedule says, and ends when a rank does."""

import dataclasses
import datetime
import gc
import itertools
import os
import signal
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from pipeline_cases import make_batches, make_model, one_process, worst_difference
from ranks import RankFailure, Ranks
from torch.multiprocessing.reductions import StorageWeakRef

from herdkern.parallel import (
    Action,
    Pipeline,
    PipelineDeadlock,
    PipelineError,
    interleaved_schedule,
    simulate,
    stages_of_rank,
)

pytestmark = pytest.mark.distributed
BOUND = 1e-6

# PP, V, M, N: odd M, one micro-batch, N below and above PP, a small last group, further warm-up forwards
CASES = [
    (2, 1, 5, 2),
    (2, 2, 3, 1),
    (2, 2, 7, 7),
    (2, 3, 7, 4),
    (4, 1, 1, 1),
    (4, 1, 7, 3),
    (4, 2, 9, 5),
    (4, 2, 8, 2),
    (4, 2, 3, 3),
    (4, 3, 5, 4),
]
ALL = [(pp, v, m, n) for pp, v, m in itertools.product((2, 4), (1, 2, 3), range(1, 10)) for n in range(1, m + 1)]


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as started:
        yield started


_groups = {}


def group_of(rank, pp):
    """The pipeline of this rank: all four ranks, or two pipelines of two."""
    if pp not in _groups:
        groups = [dist.new_group(list(range(begin, begin + pp))) for begin in range(0, dist.get_world_size(), pp)]
        _groups[pp] = groups[rank // pp]
    return _groups[pp]


def build(rank, pp, v, n=None, *, tied=False, model=None, **options):
    group = group_of(rank, pp)
    stages = stages_of_rank(model or make_model(tied), pp, dist.get_rank(group), v)
    return Pipeline(stages, group, group_size=n, **options)


def compare(rank, cases, tied, overlap):
    """The worst difference of loss and gradients, and how many tensors have other bits."""
    worst, others = 0.0, 0
    for pp, v, m, n in cases:
        pipeline = build(rank, pp, v, n, tied=tied, overlap=overlap)
        reference = make_model(tied)
        batches = make_batches(m, seed=m)
        loss, wanted = pipeline.step(batches), one_process(reference, batches)
        worst = max(worst, worst_difference(loss, wanted))
        others += not torch.equal(loss, wanted)
        expected = dict(reference.named_parameters())
        if tied:
            expected["lm_head.weight"] = expected["embed_tokens.weight"]
        for name, param in pipeline.named_parameters().items():
            difference = worst_difference(param.grad, expected[name].grad)
            assert difference <= BOUND, f"{name} of {pp, v, m, n}: {difference}"
            worst = max(worst, difference)
            others += not torch.equal(param.grad, expected[name].grad)
    return worst, others


def test_losses_and_gradients_are_those_of_one_process(ranks):
    for worst, others in ranks.run(compare, CASES, False, True):
        assert worst <= BOUND
        assert others == 0  # the same bits: micro-batches are summed in the same order


def test_tied_embeddings(ranks):
    found = ranks.run(compare, [(2, 1, 5, 2), (4, 2, 9, 5)], True, True)
    assert max(worst for worst, _ in found) <= BOUND


def test_waiting_for_sends_changes_no_bit(ranks):
    assert [others for _, others in ranks.run(compare, [(2, 2, 5, 3), (4, 1, 6, 3)], False, False)] == [0] * 4


@pytest.mark.full
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("pp", [2, 4])
def test_every_schedule(ranks, pp, tied):
    found = ranks.run(compare, [case for case in ALL if case[0] == pp], tied, True, seconds=280)
    assert max(worst for worst, _ in found) <= BOUND
    assert tied or max(others for _, others in found) == 0


def several_steps(rank):
    """Steps of different numbers of micro-batches, evaluations between, and a plain optimizer."""
    pipeline, reference = build(rank, 4, 2), make_model()
    ours = torch.optim.SGD(pipeline.parameters(), lr=0.1)
    theirs = torch.optim.SGD(reference.parameters(), lr=0.1)
    differences = []
    for step, m in enumerate((3, 8, 5, 1)):
        batches, held_out = make_batches(m, seed=step), make_batches(6, seed=100 + step)
        differences.append(worst_difference(pipeline.step(batches), one_process(reference, batches)))
        ours.step(), theirs.step()
        ours.zero_grad(), theirs.zero_grad()
        with torch.no_grad():
            wanted = one_process(reference, held_out, backward=False)
        differences.append(worst_difference(pipeline.evaluate(held_out), wanted))
        assert all(param.grad is None for param in pipeline.parameters())
    return max(differences)


def test_steps_of_any_number_of_micro_batches_and_evaluation(ranks):
    assert max(ranks.run(several_steps)) <= BOUND


def in_sixteen_bits(rank):
    """The worst difference to an fp64 sum over 64 micro-batches: of a step's gradients, and of a sum in bf16."""
    model = make_model(num_layers=2, compute_dtype=torch.bfloat16)
    for param in model.parameters():
        param.data = param.data.bfloat16()
    pipeline = build(rank, 4, 1, model=model)
    params = pipeline.parameters()
    batches = make_batches(64, seed=3)
    num_targets = sum(batch.num_targets for batch in batches)
    sums = [torch.zeros(param.shape, dtype=torch.float64) for param in params]
    narrow = [torch.zeros_like(param) for param in params]
    for batch in batches:
        if batch.num_targets:
            pipeline.step([batch], num_targets=num_targets)
            for param, wide, small in zip(params, sums, narrow, strict=True):
                wide += param.grad
                small += param.grad.bfloat16()
                param.grad = None
    pipeline.step(batches)
    assert all(param.grad.dtype == torch.float32 for param in params)
    found = ([param.grad for param in params], narrow)
    return [max(worst_difference(*pair) for pair in zip(some, sums, strict=True)) for some in found]


def test_gradients_of_sixteen_bit_parameters_add_up_in_fp32(ranks):
    for ours, narrow in ranks.run(in_sixteen_bits):
        assert ours <= 1e-3
        assert narrow >= 10 * ours


class Live:
    """Counts the tensors that autograd keeps, by the forward pass that saved them."""

    def __init__(self):
        self.tokens, self.most = weakref.WeakSet(), 0

    def track(self, stage):
        class Token:
            pass

        class Kept:
            def __init__(self, tensor, token):
                self.tensor, self.token = tensor, token

        current = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: Kept(t, current[-1]), lambda kept: kept.tensor)

        def begin(module, args):
            token = Token()
            current.append(token)
            self.tokens.add(token)
            hooks.__enter__()

        def end(module, args, out):
            hooks.__exit__(None, None, None)
            current.clear()
            self.most = max(self.most, len(self.tokens))

        stage.register_forward_pre_hook(begin)
        stage.register_forward_hook(end)


def memory(rank):
    """The most forward passes that were kept, and whether outputs went away while their graph was still needed."""
    pipeline = build(rank, 4, 2, 5)
    batches = make_batches(10)
    live, outputs, late = Live(), [], []

    def watch(module, args, out):
        for output in outputs:  # all earlier ones are on their way; what is sent must go, the graph stays
            until = time.monotonic() + 10
            while not output.expired() and time.monotonic() < until:
                time.sleep(0.001)
            late.append(not output.expired())
        outputs.clear()
        if not module.is_last:
            outputs.append(StorageWeakRef(out.untyped_storage()))
            assert not outputs[0].expired()

    for stage in pipeline.stages:
        live.track(stage)
        stage.register_forward_hook(watch)
    gc.disable()  # nothing may wait for the collector
    try:
        pipeline.step(batches)
        gone = len(live.tokens) == 0
    finally:
        gc.enable()
    return live.most, len(late), any(late), gone


def test_live_memory(ranks):
    bounds = simulate(interleaved_schedule(4, 2, 10, 5)).peak_activations
    found = ranks.run(memory)
    assert [most for most, *_ in found] == list(bounds)
    for rank, (_, num_watched, late, gone) in enumerate(found):
        assert num_watched == (10 if rank == 3 else 19), "every output but that of the last forward pass"
        assert not late, "an output that was sent is still there"
        assert gone, "something was kept after the step"


def refused(rank):
    """Messages of what must not work, without a broken group."""
    said = []
    model = make_model()
    stages = stages_of_rank(model, 4, rank, 2)
    schedule = interleaved_schedule(4, 2, 3)
    lists = [list(actions) for actions in schedule.actions]
    one, other = lists[0].index(Action("F", 4, 1)), lists[0].index(Action("B", 4, 0))
    lists[0][one], lists[0][other] = lists[0][other], lists[0][one]  # rank 1 needs that forward pass before it answers
    swapped = dataclasses.replace(schedule, actions=tuple(map(tuple, lists)))
    lists = [list(actions) for actions in schedule.actions]
    lists[1][0] = lists[1][1]
    twice = dataclasses.replace(schedule, actions=tuple(map(tuple, lists)))
    lists = [list(actions) for actions in schedule.actions]
    lists[3].reverse()
    reverse = dataclasses.replace(schedule, actions=tuple(map(tuple, lists)))
    calls = [
        lambda: Pipeline(stages, schedule=swapped),
        lambda: Pipeline(stages, schedule=twice),
        lambda: Pipeline(stages, schedule=reverse),
        lambda: Pipeline(stages, schedule=interleaved_schedule(4, 1, 3)),
        lambda: Pipeline(stages[::-1]),
        lambda: Pipeline(stages, schedule=schedule).step(make_batches(2)),
        lambda: Pipeline(stages).step([]),
        lambda: stages_of_rank(model, 4, 4),
    ]
    for call in calls:
        try:
            call()
            said.append("nothing")
        except (ValueError, PipelineDeadlock) as error:
            said.append(f"{type(error).__name__}: {error}")
    batch = make_batches(1)[0]
    batch.targets.fill_(-100)
    batch.num_targets = 0
    try:
        Pipeline(stages).step([batch])
    except ValueError as error:
        said.append(str(error))
    return said


def test_wrong_schedules_stages_and_batches_are_refused(ranks):
    wanted = [
        "PipelineDeadlock: the schedule cannot end",
        "ValueError: Pipeline: schedule must have every action of rank 1 once",
        "of rank 3 behind its forward pass",
        "schedule must be for 4 ranks with 2 chunks, got 4 with 1",
        "ValueError: Pipeline: stages must be (index, of how many) [(",
        "microbatches must be 3, as in the schedule, got 2",
        "microbatches must have at least one, got none",
        "pp_rank must lie in [0, pp_size = 4), got 4",
        "must have a target that counts, got none",
    ]
    for said in ranks.run(refused):
        assert len(said) == len(wanted)
        for text, part in zip(said, wanted, strict=True):
            assert part in text


def differ(rank, what):
    """One rank does something else."""
    odd = rank == 2
    pipeline = build(rank, 4, 2, 3 if what == "schedule" and odd else 4)
    batches = make_batches(5 if what == "number" and odd else 4)
    if what == "batches" and odd:
        batches[1].tokens[0] += 1
    try:
        pipeline.evaluate(batches) if what == "call" and odd else pipeline.step(batches)
    except PipelineError as error:
        first = str(error)
        try:
            pipeline.step(batches)
        except PipelineError as again:
            return first, str(again)
    return "nothing", ""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("schedule", "must have the same schedule, got something else on ranks 2 than on rank 0"),
        ("number", "must have the same schedule"),
        ("batches", "must have the same micro-batches, got something else on ranks 2"),
        ("call", "must have the same call"),
    ],
)
def test_ranks_that_differ_are_told(ranks, what, message):
    for first, again in ranks.run(differ, what):
        assert message in first
        assert "the pipeline broke before" in again


def lose(rank, how):
    """Rank 2 ends, or stops, in its third forward pass."""
    pipeline = build(rank, 4, 1, 4, timeout=datetime.timedelta(seconds=60 if how == "dies" else 4))
    if rank == 2:
        passes = itertools.count()
        sign = signal.SIGKILL if how == "dies" else signal.SIGSTOP
        hook = lambda *_: os.kill(os.getpid(), sign) if next(passes) == 2 else None  # noqa: E731
        pipeline.stages[0].register_forward_pre_hook(hook)
    pipeline.step(make_batches(8))


@pytest.mark.parametrize("how", ["dies", "stops"])
def test_when_a_rank_is_lost_the_others_end(how):
    with Ranks(4) as ranks:
        try:
            with pytest.raises(RankFailure) as caught:
                ranks.run(lose, how, lost=(2,))
        finally:
            if how == "stops":
                os.kill(ranks.processes[2].pid, signal.SIGKILL)
    said = caught.value.said
    assert set(said) == {0, 1, 3}
    for rank, text in said.items():
        assert f"PipelineError: Pipeline: rank {rank} of the pipeline could not" in text
    assert all("rank 2: " in said[rank] for rank in (1, 3))
