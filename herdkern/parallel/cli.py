"""`herdkern pipeline show`: a schedule before any device is rented."""

import shutil
import sys
from pathlib import Path

from herdkern.command import UsageError, near, parse

USAGE = """usage: herdkern pipeline show --pp RANKS --m MICROBATCHES [--v CHUNKS] [--n GROUP] [--out FILE.svg]

Shows the interleaved pipeline schedule: when each rank computes what, its bubble, and what it has to keep.
`herdkern pipeline show --help` tells more."""


def main(args: list[str]) -> int:
    """Run `herdkern pipeline ...`; returns the exit status."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if args else 2
    if args[0] != "show":
        raise UsageError(f"pipeline: the word after it must be show, got {args[0]!r}{near(args[0], ['show'])}")
    return parse(show, args[1:], "pipeline show")


def show(
    *,
    pp: int,
    m: int,
    v: int = 1,
    n: int | None = None,
    layers: int | None = None,
    backward_time: float = 2.0,
    p2p_latency: float = 0.0,
    out: Path | None = None,
) -> int:
    """Show an interleaved pipeline schedule with its bubble and memory.

    Args:
        pp: Ranks of the pipeline.
        m: Micro-batches of a batch, any number.
        v: Chunks (virtual stages) on each rank.
        n: Consecutive micro-batches of a stage; by default the number with the smallest bubble.
        layers: Also list which of so many layers each stage holds.
        backward_time: Time of the backward pass of a micro-batch through a stage; its forward pass takes 1.
        p2p_latency: Time of a send.
        out: Write the picture to this SVG file.
    """
    from herdkern.parallel.pipeline_picture import as_svg, as_text
    from herdkern.parallel.pipeline_schedule import interleaved_schedule, layers_of_stages
    from herdkern.parallel.pipeline_simulation import simulate

    schedule = interleaved_schedule(pp, v, m, n)
    found = simulate(schedule, backward_time=backward_time, p2p_latency=p2p_latency)
    width = max(20, min(160, shutil.get_terminal_size((120, 24)).columns - 45)) if sys.stdout.isatty() else 80
    print(as_text(schedule, found, width=width))
    print("digits: forward passes of the micro-batch that ends in it; letters: backward (a is 0); dots: waiting")
    added = f" ({schedule.extra} of them so that it does not deadlock)" if schedule.extra else ""
    print(f"group size {schedule.group_size}; warm-up forwards {', '.join(map(str, schedule.warmup))}{added}")
    print(f"time {found.makespan:g}, bubble {found.bubble:.3f}; (pp - 1) / (v m) = {schedule.ideal_bubble:.3f}")
    if layers is not None:
        for stage, held in enumerate(layers_of_stages(layers, pp, v)):
            parts = ["embedding"] * (stage == 0)
            parts += [f"layers {held.start} to {held.stop - 1}"] * (len(held) > 0)
            parts += ["head"] * (stage == schedule.num_stages - 1)
            print(f"stage {stage} on rank {stage % pp}: {', '.join(parts)}")
    if out is not None:
        from herdkern.engine import atomic_file

        with atomic_file(out, "w") as f:
            f.write(as_svg(schedule, found))
        print(out)
    return 0
