"""Schedules end, keep their order, and have the bubble and the memory that theory gives them."""

import itertools
from xml.etree import ElementTree

import pytest

from herdkern.cli import main
from herdkern.parallel import (
    Action,
    PipelineDeadlock,
    PipelineSchedule,
    best_group_size,
    interleaved_schedule,
    layers_of_stages,
    simulate,
)
from herdkern.parallel.pipeline_schedule import _with_extra

GRID = [(pp, v, m, n) for pp, v, m in itertools.product((2, 4), (1, 2, 3), range(1, 10)) for n in range(1, m + 1)]


def twin(schedule: PipelineSchedule, forward: float, backward: float, latency: float) -> float:
    """The makespan by going through time event by event, every rank looked at anew."""
    done: dict[tuple, float] = {}
    at = [0] * schedule.pp_size
    clock = [0.0] * schedule.pp_size
    last = schedule.num_stages - 1
    while any(at[r] < len(schedule.actions[r]) for r in range(schedule.pp_size)):
        startable = []
        for rank, actions in enumerate(schedule.actions):
            if at[rank] == len(actions):
                continue
            kind, stage, m = actions[at[rank]]
            if kind == "F":
                needs = [("F", stage - 1, m)] if stage else []
            else:
                needs = [("F", stage, m)] + ([("B", stage + 1, m)] if stage < last else [])
            if all(need in done for need in needs):
                arrivals = [done[need] + (latency if need[1] != stage else 0.0) for need in needs]
                startable.append((max([clock[rank], *arrivals]), rank, (kind, stage, m)))
        assert startable, "deadlock"
        begin, rank, key = min(startable)
        done[key] = clock[rank] = begin + (forward if key[0] == "F" else backward)
        at[rank] += 1
    return max(done.values())


@pytest.mark.parametrize(("pp", "v"), [*itertools.product((2, 4), (1, 2, 3))])
def test_every_schedule_ends_and_computes_everything_once(pp, v):
    for _, _, m, n in (case for case in GRID if case[:2] == (pp, v)):
        schedule = interleaved_schedule(pp, v, m, n)
        for rank, actions in enumerate(schedule.actions):
            wanted = {Action(k, c * pp + rank, i) for k in "FB" for c in range(v) for i in range(m)}
            assert len(actions) == len(wanted)
            assert set(actions) == wanted
            places = {action: i for i, action in enumerate(actions)}
            assert all(places[a._replace(kind="F")] < i for a, i in places.items() if a.kind == "B")
        found = simulate(schedule, forward_time=1.0, backward_time=1.0)
        assert found.makespan == pytest.approx(twin(schedule, 1.0, 1.0, 0.0), abs=1e-9)
        if n >= pp and m % n == 0:
            assert schedule.extra == 0
            assert found.bubble == pytest.approx(schedule.ideal_bubble, abs=1e-9)
        for warmup, peak in zip(schedule.warmup, found.peak_activations, strict=True):
            assert peak == min(warmup + 1, v * m)


def test_makespan_with_latency_and_unequal_times_equals_the_twin():
    for pp, v, m, n in [(2, 1, 5, 2), (4, 2, 10, 5), (4, 3, 7, 4), (3, 2, 8, 8), (1, 2, 3, 1)]:
        schedule = interleaved_schedule(pp, v, m, n)
        found = simulate(schedule, forward_time=1.5, backward_time=2.5, p2p_latency=0.25)
        assert found.makespan == pytest.approx(twin(schedule, 1.5, 2.5, 0.25 if pp > 1 else 0.0), abs=1e-9)


@pytest.mark.parametrize(
    ("pp", "v", "m", "n", "extra", "bubble"),
    [
        (4, 2, 10, 5, 0, 0.150),
        (4, 2, 9, 5, 0, 1 / 6),
        (4, 2, 10, 4, 0, 0.300),
        (4, 2, 3, 3, 0, 2 / 3),
        (4, 2, 8, 2, 9, 0.6875),
    ],
)
def test_known_bubbles(pp, v, m, n, extra, bubble):
    schedule = interleaved_schedule(pp, v, m, n)
    assert schedule.extra == extra
    assert simulate(schedule, backward_time=1.0).bubble == pytest.approx(bubble, abs=1e-9)


def test_usual_warmup_deadlocks_and_the_blocking_actions_are_named():
    with pytest.raises(PipelineDeadlock, match="rank 3 at B") as caught:
        simulate(_with_extra(4, 2, 8, 2, 0))
    schedule = _with_extra(4, 2, 8, 2, 0)
    for rank, (action, need) in caught.value.waiting.items():
        assert action in schedule.actions[rank]
        assert need.stage % 4 != rank or need.kind == "F"


def test_more_than_pp_micro_batches_in_a_group_hide_the_latency():
    tight = simulate(interleaved_schedule(4, 2, 12, 4), p2p_latency=0.5)
    loose = simulate(interleaved_schedule(4, 2, 12, 6), p2p_latency=0.5)
    assert loose.makespan < tight.makespan
    assert max(loose.peak_activations) - max(tight.peak_activations) == (2 - 1) * (6 - 4)


def test_waiting_for_sends_takes_longer():
    schedule = interleaved_schedule(4, 2, 8, 4)
    waits = simulate(schedule, p2p_latency=0.5, overlap_p2p=False)
    assert waits.makespan > simulate(schedule, p2p_latency=0.5).makespan > simulate(schedule).makespan


def test_best_group_size():
    assert best_group_size(4, 2, 3) == 3
    assert best_group_size(4, 2, 8) == 4
    assert best_group_size(4, 2, 10) == 5
    assert best_group_size(4, 2, 9) == 5
    for m in range(1, 14):
        chosen = simulate(interleaved_schedule(4, 2, m), backward_time=1.0).bubble
        others = [simulate(interleaved_schedule(4, 2, m, n), backward_time=1.0).bubble for n in range(1, m + 1)]
        assert chosen == pytest.approx(min(others))


def test_first_and_last_stage_hold_one_layer_fewer():
    stages = layers_of_stages(126, 16, 8)
    assert [len(stage) for stage in stages] == [0, *[1] * 126, 0]
    assert layers_of_stages(30, 4) == [range(0, 7), range(7, 15), range(15, 23), range(23, 30)]
    assert [len(stage) for stage in layers_of_stages(32, 4)] == [7, 9, 9, 7]
    assert layers_of_stages(5, 1) == [range(0, 5)]
    for layers, pp, v in itertools.product(range(2, 20), (1, 2, 3), (1, 2)):
        if layers + 2 >= pp * v:
            assert [i for stage in layers_of_stages(layers, pp, v) for i in stage] == list(range(layers))


def test_command_shows_and_draws(tmp_path, capsys):
    picture = tmp_path / "schedule.svg"
    arguments = f"pipeline show --pp 4 --v 2 --m 10 --n 5 --backward-time 1 --layers 126 --out {picture}".split()
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "bubble 0.150; (pp - 1) / (v m) = 0.150" in text
    rows = [line.split()[2] for line in text.splitlines() if line.startswith("rank ")]
    assert len(rows) == 4
    assert rows[0].startswith("0")
    assert rows[3].startswith(".")
    assert rows[0].endswith("j")
    assert "stage 0 on rank 0: embedding, layers 0 to 14" in text
    root = ElementTree.parse(picture).getroot()
    boxes = [box for box in root.iter("{http://www.w3.org/2000/svg}rect") if len(box)]
    assert len(boxes) == 4 * 2 * 10 * 2
    assert main(["pipeline", "draw"]) == 2
    assert main(["pipeline", "show", "--pp", "0", "--m", "2"]) == 1
    assert "pp_size must be at least 1, got 0" in capsys.readouterr().err


def test_wrong_numbers_are_refused():
    for arguments in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            interleaved_schedule(*arguments)
    with pytest.raises(ValueError, match=r"group_size must lie in \[1, num_microbatches = 4\], got 5"):
        interleaved_schedule(2, 1, 4, 5)
    with pytest.raises(ValueError, match="at most num_layers \\+ 2 = 5, got 8"):
        layers_of_stages(3, 4, 2)
    with pytest.raises(ValueError, match="one time for each of 4 stages, got 2"):
        simulate(interleaved_schedule(2, 2, 2), forward_time=[1.0, 2.0])
    with pytest.raises(ValueError, match="p2p_latency must be at least 0"):
        simulate(interleaved_schedule(2, 2, 2), p2p_latency=-1)
