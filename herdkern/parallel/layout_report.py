"""A plan as text and as JSON values: the layouts that fit, the paper's, why the others do not, memory, time, failures.

Source of the paper's layouts: Llama 3 (arXiv:2407.21783), Table 4.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from herdkern.parallel.checkpoint_interval import effective_time, mean_time_between_failures, young_daly_interval
from herdkern.parallel.clusters import GIB, Cluster
from herdkern.parallel.layout_search import Fit, Found, Refusal, Task, judge, simulated
from herdkern.parallel.memory_estimate import as_table, estimate_memory

CHECKPOINT_BYTES = 12  # a parameter: fp32 value and two moments
SHOWN_RANKS = 6


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A row of Table 4 of Llama 3 405B."""

    devices: int
    tp: int
    cp: int
    pp: int
    dp: int
    seq_len: int
    tflops: float
    remark: str = ""


PAPER_ROWS = (
    PaperRow(devices=8192, tp=8, cp=1, pp=16, dp=64, seq_len=8192, tflops=430),
    PaperRow(devices=16_384, tp=8, cp=1, pp=16, dp=128, seq_len=8192, tflops=400),
    PaperRow(
        devices=16_384,
        tp=8,
        cp=16,
        pp=16,
        dp=8,
        seq_len=131_072,
        tflops=380,
        remark="the table prints dp 4, which would be 8,192 devices and 8.4 M tokens a step, not its 16,384 and 16 M",
    ),
)


def paper_rows(task: Task, model_name: str) -> list[tuple[PaperRow, Fit | Refusal]]:
    """Each of the paper's layouts of so many devices, judged on the task's cluster; none for other models."""
    if model_name != "llama3-405b":
        return []
    rows = [row for row in PAPER_ROWS if row.devices == task.devices]
    found = []
    for row in rows:
        own = replace(task, seq_len=row.seq_len, batch_tokens=16_777_216, fixed=(), document_tokens=0)
        judged = judge(own, row.tp, row.cp, row.pp, row.dp)
        found.append((row, simulated(own, judged) if isinstance(judged, Fit) else judged))
    return found


@dataclass(frozen=True, kw_only=True)
class Saving:
    """How often to save on a cluster, and what failures cost."""

    mtbf_s: float
    save_s: float
    interval_s: float
    effective: float
    checkpoint_bytes: int


def saving(task: Task) -> Saving:
    """The interval of Young and Daly for all of the optimizer's state at the cluster's rates."""
    cluster: Cluster = task.cluster
    size = CHECKPOINT_BYTES * task.model.num_params
    save_s = size / cluster.checkpoint_bytes_per_s
    mtbf_s = mean_time_between_failures(task.devices, cluster.failures_per_device_day)
    interval_s = young_daly_interval(save_s, mtbf_s)
    share = effective_time(interval_s, save_s, mtbf_s)
    return Saving(mtbf_s=mtbf_s, save_s=save_s, interval_s=interval_s, effective=share, checkpoint_bytes=size)


def as_text(found: Found, model_name: str, *, top: int = 8) -> str:
    """The plan for a terminal."""
    task = found.task
    lines = [
        f"{model_name}: {task.model.num_params / 1e9:.2f} B parameters on {task.devices:,} devices of "
        f"{task.cluster.name} ({task.cluster.about})",
        f"a step: {task.sequences:,} sequences of {task.seq_len:,} tokens",
        "",
        f"{len(found.fits)} of {len(found.fits) + len(found.refusals)} layouts fit "
        f"{task.cluster.usable_bytes / GIB:.1f} GiB a device" + ("; the fastest by projection" if found.fits else ""),
    ]
    if found.fits:
        lines += _table_of_fits(found.fits[:top])
    rows = paper_rows(task, model_name)
    if rows:
        lines += ["", "the paper's layouts of so many devices (Table 4)", *(_paper_line(found, *row) for row in rows)]
    lines += ["", *_why_not(found)]
    lines += ["", *_closer_look(found)]
    lines += ["", *_saving_lines(task)]
    return "\n".join(lines)


def _table_of_fits(fits: tuple[Fit, ...]) -> list[str]:
    head = "  tp   cp   pp    dp  v     m  recompute    GiB  step s  TFLOP/s    MFU  waits  comm."
    lines = [head]
    for fit in fits:
        layout, projected = fit.layout, fit.projection
        lines.append(
            f"{layout.tp:4} {layout.cp:4} {layout.pp:4} {layout.dp:5} {layout.num_chunks:2} "
            f"{layout.num_microbatches:5}  {layout.recompute:9} {fit.memory.total / GIB:6.1f} "
            f"{projected.step_s:7.2f} {projected.flops_per_device / 1e12:8.0f} {projected.mfu:6.1%} "
            f"{projected.bubble:6.1%} {_communication(fit):6.1%}"
        )
        lines += [f"     {note}" for note in fit.notes]
    return lines


def _communication(fit: Fit) -> float:
    seconds = fit.projection.seconds
    return sum(time for part, time in seconds.items() if part.endswith("communication")) / fit.projection.step_s


def _paper_line(found: Found, row: PaperRow, judged: Fit | Refusal) -> str:
    name = f"  tp {row.tp} cp {row.cp} pp {row.pp} dp {row.dp}, {row.seq_len:,} tokens: "
    remark = f"\n    ({row.remark})" if row.remark else ""
    if isinstance(judged, Refusal):
        return f"{name}does not fit: {judged.text}{remark}"
    projected = judged.projection.flops_per_device / 1e12
    text = (
        f"fits in {judged.memory.total / GIB:.1f} GiB with {judged.layout.num_chunks} chunks, recompute "
        f"{judged.layout.recompute}; {projected:.0f} TFLOP/s projected, {row.tflops:.0f} in the paper "
        f"({projected / row.tflops - 1:+.0%})"
    )
    axes = (row.tp, row.cp, row.pp, row.dp)
    places = [
        place
        for place, fit in enumerate(found.fits, start=1)
        if (fit.layout.tp, fit.layout.cp, fit.layout.pp, fit.layout.dp) == axes and row.seq_len == found.task.seq_len
    ]
    return f"{name}{text}{f'; place {places[0]} above' if places else ''}{remark}"


def _why_not(found: Found) -> list[str]:
    if not found.refusals:
        return ["no layout was refused"]
    lines = ["why the others do not"]
    for reason in ("memory", "heads", "batch", "layers"):
        refused = [refusal for refusal in found.refusals if refusal.reason == reason]
        if not refused:
            continue
        refused.sort(key=lambda refusal: refusal.excess)
        lines.append(f"  {reason}: {len(refused)} layouts")
        shown = refused if len(refused) <= 4 else [*refused[:3], refused[len(refused) // 2]]
        for refusal in shown:
            tp, cp, pp, dp = refusal.axes
            lines.append(f"    tp {tp} cp {cp} pp {pp} dp {dp}: {refusal.text}")
    return lines


def _closer_look(found: Found) -> list[str]:
    """Memory by rank and time by part of the fastest layout; without one, the memory of the nearest."""
    model = found.task.model
    if found.fits:
        fit = found.fits[0]
        layout, title = fit.layout, "the fastest"
        seconds = fit.projection.seconds
        parts = [f"{part} {time / fit.projection.step_s:.1%}" for part, time in seconds.items() if time > 0]
        full = fit.projection.flops_per_device_full / 1e12
        tail = [
            f"its step of {fit.projection.step_s:.2f} s: {', '.join(parts)}",
            f"{fit.projection.tokens_per_s:,.0f} tokens/s; {full:.0f} TFLOP/s if every pair of a sequence counts",
        ]
    else:
        near = [refusal for refusal in found.refusals if refusal.layout is not None]
        if not near:
            return ["nothing to look at: no layout can be cut"]
        smallest = min(near, key=lambda refusal: refusal.excess).layout
        assert smallest is not None
        layout, title, tail = smallest, "the nearest", []
    estimates = estimate_memory(model, layout.shortened(), _some_ranks(layout.pp))
    return [f"{title}: {layout}, {layout.num_microbatches} micro-batches", as_table(estimates), *tail]


def _some_ranks(pp: int) -> list[int]:
    if pp <= SHOWN_RANKS:
        return list(range(pp))
    return sorted({0, 1, 2, pp // 2, pp - 2, pp - 1})


def _saving_lines(task: Task) -> list[str]:
    given = saving(task)
    return [
        f"failures: one in {given.mtbf_s / 3600:.1f} h at {task.cluster.failures_per_device_day * 1000:.2f} a day and "
        "1,000 devices",
        f"checkpoints: {given.checkpoint_bytes / 1e12:.2f} TB in {given.save_s:.1f} s, best every "
        f"{given.interval_s:.0f} s (Young, Daly): {given.effective:.1%} of the time trains, restarts not counted",
    ]


def as_values(found: Found, model_name: str) -> dict[str, Any]:
    """The plan as JSON values: all fits and refusals."""
    task = found.task
    given = saving(task)
    return {
        "model": model_name,
        "parameters": task.model.num_params,
        "devices": task.devices,
        "seq_len": task.seq_len,
        "batch_tokens": task.batch_tokens,
        "document_tokens": task.document_tokens,
        "cluster": task.cluster.name,
        "usable_bytes": task.cluster.usable_bytes,
        "sources": list(task.cluster.sources),
        "fits": list(map(_fit_values, found.fits)),
        "refusals": list(map(_refusal_values, found.refusals)),
        "paper": list(_paper_values(task, model_name)),
        "checkpoints": {
            "bytes": given.checkpoint_bytes,
            "seconds": given.save_s,
            "seconds_between_failures": given.mtbf_s,
            "interval_seconds": given.interval_s,
            "effective_time": given.effective,
        },
    }


def _fit_values(fit: Fit) -> dict[str, Any]:
    layout, projected = fit.layout, fit.projection
    return {
        "tp": layout.tp,
        "cp": layout.cp,
        "pp": layout.pp,
        "dp": layout.dp,
        "num_chunks": layout.num_chunks,
        "num_microbatches": layout.num_microbatches,
        "recompute": layout.recompute,
        "memory_bytes": fit.memory.total,
        "memory_terms": dict(fit.memory.terms),
        "fullest_pp_rank": fit.memory.pp_rank,
        "step_seconds": projected.step_s,
        "seconds": dict(projected.seconds),
        "flops_per_device": projected.flops_per_device,
        "flops_per_device_full": projected.flops_per_device_full,
        "mfu": projected.mfu,
        "tokens_per_second": projected.tokens_per_s,
        "is_simulated": fit.is_simulated,
        "notes": list(fit.notes),
    }


def _refusal_values(refusal: Refusal) -> dict[str, Any]:
    tp, cp, pp, dp = refusal.axes
    values: dict[str, Any] = {"tp": tp, "cp": cp, "pp": pp, "dp": dp, "reason": refusal.reason, "text": refusal.text}
    if refusal.memory is not None:
        values |= {"excess_bytes": refusal.excess, "memory_terms": dict(refusal.memory.terms)}
    return values


def _paper_values(task: Task, model_name: str) -> Iterator[dict[str, Any]]:
    for row, judged in paper_rows(task, model_name):
        fits = isinstance(judged, Fit)
        values = _fit_values(judged) if isinstance(judged, Fit) else _refusal_values(judged)
        yield {"fits": fits, "seq_len": row.seq_len, "paper_tflops": row.tflops, **values}
