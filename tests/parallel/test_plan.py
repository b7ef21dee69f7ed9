"""The layout search, the projection, and `herdkern plan`."""

import dataclasses
import json
import math
import random
import xml.etree.ElementTree as ElementTree

import pytest

from herdkern import cli
from herdkern.model.config import llama3_8b, llama3_405b, micro
from herdkern.parallel.checkpoint_interval import (
    effective_time,
    mean_time_between_failures,
    young_daly_interval,
)
from herdkern.parallel.clusters import Link, collective_seconds, h100, h200
from herdkern.parallel.config import ParallelConfig
from herdkern.parallel.layout import Layout
from herdkern.parallel.layout_report import paper_rows, saving
from herdkern.parallel.layout_search import Fit, Refusal, Task, fullest_rank, judge, search, simulated
from herdkern.parallel.memory_estimate import estimate_memory, peak_rank
from herdkern.parallel.projection import PARTS, project

PAPER = Task(model=llama3_405b(), cluster=h100(), devices=16_384)
FREE = Link(bytes_per_s=1e30, latency_s=0.0)
IDEAL = dataclasses.replace(
    h100(),
    processors=1,
    gemm_flops=1e15,
    attention_forward_flops=1e15,
    attention_backward_flops=1.25e15,  # five products at 5/4 of the rate take twice the time of two
    memory_bytes_per_s=1e30,
    node_link=FREE,
    network=FREE,
)


@pytest.mark.parametrize("devices", [8192, 16_384])
def test_the_papers_layouts_fit_and_are_projected_above_what_was_reached(devices):
    rows = paper_rows(dataclasses.replace(PAPER, devices=devices), "llama3-405b")
    assert [row.tflops for row, _ in rows] == ([430] if devices == 8192 else [400, 380])
    for row, judged in rows:
        assert isinstance(judged, Fit), judged
        assert judged.memory.total <= PAPER.cluster.usable_bytes
        # nothing is fitted: slow devices, contention and power limits are not in it, so it lies above, and not far
        assert 1.0 < judged.projection.flops_per_device / 1e12 / row.tflops < 1.25


def test_one_pipeline_stage_for_405b_does_not_fit():
    refused = judge(PAPER, 8, 1, 1, 2048)
    assert isinstance(refused, Refusal)
    assert refused.reason == "memory"
    assert refused.excess > 200 * 2**30
    assert "207.7 too many; gradients alone 189.0" in refused.text


@pytest.mark.parametrize(
    ("axes", "reason", "text"),
    [
        ((16, 1, 16, 64), "heads", "8 KV heads do not divide by tp 16, and 16 leave the node"),
        ((1, 1, 1, 16_384), "batch", "2048 sequences a step on 16384 data ranks: fewer than one each"),
        ((8, 16, 16, 8), "batch", "8192 tokens on 16 context ranks"),
        ((1, 1, 256, 64), "layers", "256 stages are more than 126 layers"),
        ((4, 1, 2, 2048), "memory", "50.3 too many; parameters alone 94.5"),
    ],
)
def test_a_refusal_names_its_reason(axes, reason, text):
    refused = judge(PAPER, *axes)
    assert isinstance(refused, Refusal)
    assert refused.reason == reason
    assert text in refused.text


def test_every_division_of_the_devices_is_judged():
    found = search(Task(model=llama3_8b(), cluster=h100(), devices=24, batch_tokens=24 * 8192))
    axes = [(f.layout.tp, f.layout.cp, f.layout.pp, f.layout.dp) for f in found.fits] + [r.axes for r in found.refusals]
    assert len(set(axes)) == len(axes)
    want = {
        (tp, cp, pp, 24 // tp // cp // pp)
        for tp in range(1, 17)
        for cp in (1, 2, 4, 8)
        for pp in range(1, 25)
        if 24 % (tp * cp * pp) == 0
    }
    assert set(axes) == want
    assert {r.reason for r in found.refusals} == {"heads"}  # tp 3, 6, 12
    speeds = [fit.projection.step_s for fit in found.fits]
    assert speeds == sorted(speeds)


def test_recomputation_only_where_nothing_else_fits():
    task = Task(model=llama3_8b(), cluster=h100(), devices=64)
    fit = judge(task, 1, 1, 1, 64)
    assert isinstance(fit, Fit)
    assert fit.layout.recompute == "swiglu"
    roomy = judge(dataclasses.replace(task, cluster=h200()), 1, 1, 1, 64)
    assert isinstance(roomy, Fit)
    assert roomy.layout.recompute == "none"
    refused = judge(dataclasses.replace(task, recompute="none"), 1, 1, 1, 64)
    assert isinstance(refused, Refusal)


@pytest.mark.parametrize("num_microbatches", [40, 64])
@pytest.mark.parametrize(("pp", "num_chunks"), [(4, 1), (4, 2), (8, 4)])
def test_fewer_microbatches_stand_for_many(pp, num_chunks, num_microbatches):
    axes = ParallelConfig(tp=8, pp=pp, num_chunks=num_chunks, dp=2)
    layout = Layout(axes, micro_batch_tokens=8192, num_microbatches=num_microbatches)
    model = dataclasses.replace(llama3_405b(), num_layers=pp * num_chunks * 2 - 2)
    short = layout.shortened()
    assert short.num_microbatches < num_microbatches
    whole = peak_rank(estimate_memory(model, layout))
    some = fullest_rank(model, layout)
    assert some.total + 24 * 8192 * (num_microbatches - short.num_microbatches) == whole.total  # token ids of the rest
    exact = project(model, layout, h100(), seq_len=8192)
    times = short.cut(microbatches_in_flight=0)
    assert exact.step_s > project(model, times, h100(), seq_len=8192).step_s


def test_extrapolation_equals_the_whole_simulation(monkeypatch):
    layout = Layout(ParallelConfig(tp=8, pp=4, num_chunks=2), micro_batch_tokens=8192, num_microbatches=38)
    model = dataclasses.replace(llama3_405b(), num_layers=22)
    short = project(model, layout, h100(), seq_len=8192)
    monkeypatch.setattr(Layout, "shortened", lambda self: self)
    assert project(model, layout, h100(), seq_len=8192).step_s == pytest.approx(short.step_s, rel=1e-9)


def test_an_ideal_cluster_takes_as_long_as_its_flops():
    model = llama3_8b()
    layout = Layout(ParallelConfig(dp=2), micro_batch_tokens=8192, num_microbatches=4)
    found = project(model, layout, IDEAL, seq_len=8192)
    tiles = math.prod((8192 / 128, 4096 / 256))
    assert tiles == int(tiles)  # whole tiles: one processor loses nothing
    per_token = model.flops_per_token(8192)  # 6 N and causal attention
    # attention alone has 4 + 4 x 2.5 products' time where the count of FLOPs has 12: 2.5 x / 1.25 = 2 x
    assert found.step_s == pytest.approx(4 * 8192 * per_token / 1e15, rel=1e-9)
    assert found.tokens == 2 * 4 * 8192
    assert found.mfu == pytest.approx(1e15 / IDEAL.peak_flops)
    assert found.flops_per_device_full > found.flops_per_device


def test_documents_make_attention_cheaper_and_nothing_else():
    layout = Layout(micro_batch_tokens=8192, num_microbatches=1)
    one, eight = (project(llama3_8b(), layout, h100(), seq_len=8192, document_tokens=n) for n in (0, 1024))
    assert eight.seconds["attention"] == pytest.approx(one.seconds["attention"] / 8)
    assert all(eight.seconds[part] == one.seconds[part] for part in PARTS if part != "attention")


def test_each_axis_pays_on_its_link():
    axes = ParallelConfig(tp=8, cp=2, pp=4, dp=4, num_chunks=2)
    base = Layout(axes, micro_batch_tokens=8192, num_microbatches=8)
    model = llama3_405b()
    slow_node = dataclasses.replace(h100(), node_link=Link(bytes_per_s=180e9, latency_s=20e-6))
    slow_net = dataclasses.replace(h100(), network=Link(bytes_per_s=21.25e9, latency_s=60e-6))
    fast, node, net = (project(model, base, c, seq_len=8192).seconds for c in (h100(), slow_node, slow_net))
    assert node["tensor communication"] == pytest.approx(2 * fast["tensor communication"])
    assert net["tensor communication"] == fast["tensor communication"]
    assert net["context communication"] == pytest.approx(2 * fast["context communication"])
    assert net["data communication"] > fast["data communication"]
    assert net["pipeline waits"] > fast["pipeline waits"]
    for part in ("matrix products", "attention", "memory-bound"):
        assert node[part] == net[part] == fast[part]


def test_the_pipeline_waits_as_its_formula_says_with_equal_stages():
    model = dataclasses.replace(llama3_8b(vocab_size=256), num_layers=30)
    layout = Layout(ParallelConfig(pp=4, num_chunks=2), micro_batch_tokens=4096, num_microbatches=16)
    # the embedding and the head count as a layer but cost next to nothing: the ends wait, the others set the pace
    found = project(model, layout, IDEAL, seq_len=4096)
    ideal = layout.schedule().ideal_bubble
    assert 0.5 * ideal < found.bubble < ideal
    roughly = project(model, layout, IDEAL, seq_len=4096, roughly=True)
    assert roughly.step_s == pytest.approx(found.step_s, rel=0.1)
    assert found.seconds["matrix products"] == roughly.seconds["matrix products"]


@pytest.mark.parametrize("axes", [{"dp": 4}, {"tp": 4}, {"cp": 2, "dp": 2}])
def test_ranks_that_share_cores_share_their_rates(axes):
    layout = Layout(ParallelConfig(**axes), micro_batch_tokens=4096, num_microbatches=4)
    alone, two, four, many = (
        project(llama3_8b(), layout, dataclasses.replace(IDEAL, cores=cores), seq_len=4096).step_s
        for cores in (0, 2, 4, 8)
    )
    assert four == many == pytest.approx(alone)
    assert two == pytest.approx(2 * alone)


def test_a_pipeline_on_shared_cores_takes_at_least_what_all_its_ranks_compute():
    model = dataclasses.replace(llama3_8b(vocab_size=256), num_layers=30)
    layout = Layout(ParallelConfig(pp=4, num_chunks=2), micro_batch_tokens=4096, num_microbatches=16)
    one = Layout(micro_batch_tokens=4096, num_microbatches=16)
    whole = project(model, one, IDEAL, seq_len=4096).step_s
    free, two, one_core = (
        project(model, layout, dataclasses.replace(IDEAL, cores=cores), seq_len=4096).step_s for cores in (0, 2, 1)
    )
    assert free < whole / 2  # waits fill the cores that others leave
    assert two == pytest.approx(whole / 2, rel=1e-6)
    assert one_core == pytest.approx(whole, rel=1e-6)


def test_on_shared_cores_no_transfer_is_hidden():
    layout = Layout(ParallelConfig(dp=2), micro_batch_tokens=8192, num_microbatches=16)
    slow = Link(bytes_per_s=200e9, latency_s=0.0)
    hidden, shown, reduced = (
        project(llama3_8b(), layout, dataclasses.replace(h100(), node_link=link, cores=cores), seq_len=8192)
        for cores, link in ((0, slow), (2, slow), (2, dataclasses.replace(slow, scatters_by_reducing=True)))
    )
    params = llama3_8b().num_params
    gathered, scattered = params * 2 / 2 / 200e9, params * 4 / 2 / 200e9
    assert hidden.seconds["data communication"] < 0.1 * (gathered + scattered)
    assert shown.seconds["data communication"] == pytest.approx(gathered + scattered, rel=0.01)
    assert reduced.seconds["data communication"] == pytest.approx(gathered + 2 * scattered, rel=0.01)


def test_context_ranks_move_what_documents_need():
    layout = Layout(ParallelConfig(cp=4), micro_batch_tokens=32_768, num_microbatches=1)
    times = [
        project(llama3_8b(), layout, h100(), seq_len=32_768, document_tokens=n).seconds["context communication"]
        for n in (0, 8192, 1024)
    ]
    assert times[0] > 2 * times[1] > 8 * times[2] > 0


def test_recomputing_blocks_costs_a_forward_pass():
    layout = Layout(micro_batch_tokens=8192, num_microbatches=2)
    kept = project(llama3_8b(vocab_size=256), layout, IDEAL, seq_len=8192)
    again = project(llama3_8b(vocab_size=256), dataclasses.replace(layout, recompute="block"), IDEAL, seq_len=8192)
    assert again.step_s / kept.step_s == pytest.approx(4 / 3, rel=1e-3)


def test_collectives_by_bytes_and_latency():
    link = Link(bytes_per_s=1e9, latency_s=0.0)
    assert collective_seconds(link, 4, 4e9, "all_gather") == pytest.approx(3.0)
    assert collective_seconds(link, 4, 4e9, "all_reduce") == pytest.approx(6.0)
    assert collective_seconds(link, 1, 4e9, "reduce_scatter") == 0.0
    assert Link(bytes_per_s=1e9, latency_s=1e-3).seconds(1e6) == pytest.approx(2e-3)


def test_young_and_daly():
    mtbf = mean_time_between_failures(16_384, 466 / 54 / 16_384)
    assert mtbf == pytest.approx(54 * 86_400 / 466)
    assert young_daly_interval(30.0, mtbf) == pytest.approx(math.sqrt(2 * 30 * mtbf))
    assert young_daly_interval(100.0, 150.0) == 150.0
    given = saving(PAPER)
    assert given.interval_s == pytest.approx(math.sqrt(2 * 12 * 405_853_388_800 / 2e12 * mtbf))
    best = effective_time(given.interval_s, given.save_s, mtbf)
    assert best == pytest.approx(given.effective)
    for factor in (0.5, 2.0):
        assert effective_time(factor * given.interval_s, given.save_s, mtbf) < best


def test_effective_time_is_that_of_a_run_with_failures():
    rng, interval, save, mtbf, restart = random.Random(0), 100.0, 10.0, 400.0, 30.0
    clock = done = 0.0
    while done < 200_000:
        life = rng.expovariate(1 / mtbf)
        stretches = int(life // (interval + save))
        done += stretches * interval
        clock += life + restart
    assert done / clock == pytest.approx(effective_time(interval, save, mtbf, restart), rel=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": 0}, "devices must be at least 1"),
        ({"seq_len": 0}, "seq_len must be at least 1"),
        ({"batch_tokens": 100}, "batch_tokens must be at least seq_len = 8192"),
        ({"fixed": (("tp", 3),)}, "tp must divide the 16384 devices, got 3"),
        ({"document_tokens": -1}, "document_tokens must not be negative"),
    ],
)
def test_wrong_tasks_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PAPER, **change)


@pytest.mark.parametrize(
    "call", [(young_daly_interval, (0, 1)), (effective_time, (1, 1, 0)), (mean_time_between_failures, (0, 1))]
)
def test_wrong_times_are_named(call):
    function, arguments = call
    with pytest.raises(ValueError, match=f"{function.__name__}: .* must be positive"):
        function(*arguments)


def test_help_answers(capsys):
    assert cli.main(["plan", "--help"]) == 0
    assert "usage: herdkern plan MODEL --gpus N" in capsys.readouterr().out
    assert cli.main(["plan"]) == 2


def test_command_prints_the_plan_and_draws_it(capsys, tmp_path):
    out = tmp_path / "plan.svg"
    arguments = "plan llama3-405b --gpus 8192 --tp 8 --cp 1 --pp 16 --out".split()
    assert cli.main([*arguments, str(out)]) == 0
    text = capsys.readouterr().out
    assert "1 of 1 layouts fit 77.6 GiB" in text
    assert "430 in the paper" in text
    assert "place 1 above" in text
    assert "best every" in text
    root = ElementTree.fromstring(out.read_text())
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "rank 15" in words
    assert "tp 8 cp 1 pp 16 dp 64" in words


def test_json_holds_fits_refusals_and_sources(capsys):
    assert cli.main("plan llama3-70b --gpus 64 --pp 1 --cp 1 --batch-tokens 524288 --json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert {refusal["reason"] for refusal in found["refusals"]} == {"memory", "heads"}
    assert all(sum(fit["memory_terms"].values()) == fit["memory_bytes"] for fit in found["fits"])
    assert all(refusal["text"] for refusal in found["refusals"])
    assert any("H100" in source for source in found["sources"])
    assert found["paper"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("lama3-8b --gpus 8", "did you mean 'llama3-8b'?"),
        ("llama3-8b --gpus 8 --cluster h10", "did you mean 'h100'?"),
        ("llama3-8b --gpus 0", "gpus and top must be at least 1, got 0"),
    ],
)
def test_wrong_words_are_told(arguments, message, capsys):
    assert cli.main(["plan", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_no_layout_at_all_is_told(capsys, tmp_path):
    assert cli.main("plan llama3-405b --gpus 8 --top 1".split()) == 0
    text = capsys.readouterr().out
    assert "0 of" in text
    assert "the nearest" in text
    out = tmp_path / "x.svg"
    assert cli.main(["plan", "llama3-405b", "--gpus", "8", "--out", str(out)]) == 1
    assert "no layout fits" in capsys.readouterr().err
    assert not out.exists()


def test_a_tiny_model_fits_anywhere():
    found = search(Task(model=micro(), cluster=h100(), devices=4, seq_len=1024, batch_tokens=16 * 1024))
    assert found.fits
    assert simulated(found.task, found.fits[0]) is found.fits[0]
