"""A pipeline schedule to look at: as text for a terminal, as SVG for a page."""

from herdkern.parallel.pipeline_schedule import PipelineSchedule
from herdkern.parallel.pipeline_simulation import Simulation

FORWARD = ("#9fc5e8", "#5b9bd5", "#2f6da8", "#1c4670")  # by chunk, the last for all that follow
BACKWARD = ("#f6c89f", "#ed9b54", "#c9701f", "#8a4a10")


def as_text(schedule: PipelineSchedule, simulation: Simulation, *, width: int = 100) -> str:
    """One line a rank, time from left to right in `width` columns: the last digit of the micro-batch where it runs
    forward, the letter of that digit (a for 0) where it runs backward, a dot where the rank waits."""
    step = simulation.makespan / width
    lines = []
    for rank, actions in enumerate(schedule.actions):
        cells = ["."] * width
        for action, begin, end in zip(actions, simulation.begins[rank], simulation.ends[rank], strict=True):
            digit = action.microbatch % 10
            for column in range(width):
                if begin <= (column + 0.5) * step < end:
                    cells[column] = str(digit) if action.kind == "F" else "abcdefghij"[digit]
        peak = simulation.peak_activations[rank]
        idle = 1 - simulation.busy[rank] / simulation.makespan
        lines.append(f"rank {rank:<3} {''.join(cells)}  idle {idle:4.0%}, at most {peak} activations")
    return "\n".join(lines)


def as_svg(schedule: PipelineSchedule, simulation: Simulation, *, width: int = 960) -> str:
    """An SVG: one row a rank, blue forward, orange backward, darker for later chunks, numbers are micro-batches."""
    left, top, row, gap = 64, 34, 26, 6
    scale = (width - left - 10) / simulation.makespan
    height = top + schedule.pp_size * (row + gap) + 30
    title = (
        f"{schedule.pp_size} ranks, {schedule.num_chunks} chunks each, {schedule.num_microbatches} micro-batches "
        f"in groups of {schedule.group_size}: bubble {simulation.bubble:.3f}"
    )
    parts = [f'<text x="{left}" y="20">{title}</text>']
    for rank, actions in enumerate(schedule.actions):
        y = top + rank * (row + gap)
        parts.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">rank {rank}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{scale * simulation.makespan:.1f}" height="{row}" fill="#eee"/>')
        for action, begin, end in zip(actions, simulation.begins[rank], simulation.ends[rank], strict=True):
            chunk = min(action.stage // schedule.pp_size, len(FORWARD) - 1)
            colour = (FORWARD if action.kind == "F" else BACKWARD)[chunk]
            x, wide = left + begin * scale, (end - begin) * scale
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{row}" fill="{colour}" stroke="#fff">'
                f"<title>{action}, {begin:g} to {end:g}</title></rect>"
            )
            if wide >= 9:
                ink = "#fff" if chunk >= 2 else "#222"
                parts.append(
                    f'<text x="{x + wide / 2:.1f}" y="{y + 17}" text-anchor="middle" fill="{ink}">'
                    f"{action.microbatch}</text>"
                )
    foot = top + schedule.pp_size * (row + gap) + 16
    parts.append(
        f'<text x="{left}" y="{foot}">blue: forward, orange: backward, darker: later chunks, grey: waiting</text>'
    )
    style = "<style>text{font:12px system-ui,sans-serif}</style>"
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{white}{"".join(parts)}</svg>\n'
