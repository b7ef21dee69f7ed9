"""Commands about a run: `launch` starts it under supervision, `flight` says which rank broke it, `top` shows it live,
`tensorboard` writes its event files.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from herdkern.command import UsageError, parse

_LAUNCH = """usage: herdkern launch --run RUN [--nproc N] [LIMITS] [TORCHRUN'S OPTIONS] -- COMMAND ...

Starts COMMAND on N ranks as torchrun does, and watches them: a rank that died or hangs is named within 30 s, all are
ended, and the run goes on from its last checkpoint. RUN/restarts.jsonl keeps the log, RUN/flight/ the evidence.

  herdkern launch --run runs/a --nproc 2 -- python train.py
  herdkern launch --run /shared/a --nproc 8 --nnodes 4 --rdzv-backend c10d --rdzv-endpoint host:29400 -- python train.py
"""


def launch(args: list[str]) -> int:
    """`herdkern launch`: the exit status is 0 if all ranks finished, or a signal came and they ended by themselves."""
    parser = argparse.ArgumentParser("herdkern launch", usage=_LAUNCH, allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="the run folder, on a file system that all nodes see")
    parser.add_argument("--nproc", default="", help="ranks on this node (torchrun's --nproc-per-node)")
    parser.add_argument("--hang-after", type=float, default=20.0, help="seconds without a beat (default 20)")
    parser.add_argument(
        "--start-after", type=float, default=600.0, help="seconds until the end of the first step (600)"
    )
    parser.add_argument("--long-after", type=float, default=900.0, help="seconds in a save or an evaluation (900)")
    parser.add_argument("--grace", type=int, default=120, help="seconds to write a checkpoint after SIGTERM (120)")
    parser.add_argument("--fork", action="store_true", help="fork ranks from this process: restarts take a second")
    split = args.index("--") if "--" in args else len(args)
    own, others = parser.parse_known_args(args[:split])
    if not args[split + 1 :]:
        raise UsageError("launch: COMMAND must stand behind --, got none; e.g. herdkern launch --run R -- python x.py")
    from herdkern.train.supervisor import WatchConfig, launch

    limits = {name: getattr(own, name) for name in ("hang_after", "start_after", "long_after", "grace", "fork")}
    nproc = ["--nproc-per-node", own.nproc] if own.nproc else []
    return launch(own.run, [*nproc, *others, *args[split:]], WatchConfig(**limits))


def flight(args: list[str]) -> int:
    """`herdkern flight`."""

    def flight(folder: Path, /) -> int:
        """One line: which rank left the order of collectives, and where. Status 1 if one did.

        Args:
            folder: A run (its last failure, or its ranks as they are now), or a folder with rank-N.ring files.
        """
        from herdkern.parallel.flight_ring import read_rings, ring_folder
        from herdkern.parallel.flight_verdict import judge

        kept = sorted((folder / "flight").glob("[0-9]*"), key=lambda path: int(path.name))
        for place in (folder, ring_folder(folder), *reversed(kept)):
            rings = read_rings(place)
            if rings:
                break
        else:
            raise UsageError(f"flight: folder must be a run of several ranks or hold rank-N.ring files, got {folder}")
        said = place / "verdict.txt"  # it knows who was killed
        verdict = judge(rings)
        print(said.read_text().strip() if said.exists() else verdict.line)
        return 1 if said.exists() or verdict.kind != "none" else 0

    return parse(flight, args, "flight")


def top(args: list[str]) -> int:
    """`herdkern top`."""

    def top(run: Path, /, once: bool = False, every: float = 1.0) -> int:
        """A run, live: loss, speed, ranks and their beats, restarts, effective training time, stragglers.

        Args:
            run: The run folder; the run itself is not asked.
            once: Print one frame and stop, as without a terminal.
            every: Seconds between two frames.
        """
        from herdkern.train.live_view import watch

        watch(run, once=once, every=every)
        return 0

    return parse(top, args, "top")


def tensorboard(args: list[str]) -> int:
    """`herdkern tensorboard`."""

    def tensorboard(run: Path, /, out: Path | None = None, follow: bool = False, every: float = 5.0) -> int:
        """Write a run's metrics.jsonl as TensorBoard's event files.

        Args:
            run: The run folder.
            out: The folder of the event files; RUN/tensorboard by default.
            follow: Go on as the run does, until Ctrl-C.
            every: Seconds between two looks with --follow.
        """
        import time

        from herdkern.train.tensorboard import TensorBoardLog

        with TensorBoardLog(run, out) as log:
            print(f"{log.update()} steps in {log.folder}")
            while follow:
                time.sleep(every)
                log.update()
        return 0

    return parse(tensorboard, args, "tensorboard")


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "flight": flight,
    "launch": launch,
    "tensorboard": tensorboard,
    "top": top,
}


def main(command: str, args: list[str]) -> int:
    """Run one of COMMANDS."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return COMMANDS[command](args)
