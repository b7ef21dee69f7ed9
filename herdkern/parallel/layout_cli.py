"""`herdkern plan`: which layouts fit, how fast they would be, and why the others do not, before devices are rented."""

from collections.abc import Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

from herdkern.command import UsageError, near, parse

USAGE = """usage: herdkern plan MODEL --gpus N [--seq-len TOKENS] [--batch-tokens TOKENS] [--cluster h100|h200] [--json]
                     [--tp N] [--cp N] [--pp N] [--dp N] [--chunks N] [--recompute none|swiglu|block]

Lists the layouts [TP, CP, PP, DP] of a training step that fit, fastest first by projection, and why the others do not;
memory by rank, time by part, and how often to save. MODEL: nano, micro, mini, llama3-8b, llama3-70b, llama3-405b."""


def main(args: list[str]) -> int:
    """Run `herdkern plan ...`; returns the exit status."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if args else 2
    import tyro

    def plan(model: str, /, arguments: Annotated[PlanArguments, tyro.conf.arg(name="")]) -> int:
        """Plan the training of a model on so many devices.

        Args:
            model: nano, micro, mini, llama3-8b, llama3-70b or llama3-405b.
            arguments: What to plan.
        """
        return run_plan(model, arguments)

    return parse(plan, args, "plan")


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """What to plan.

    Args:
        gpus: Devices in all.
        seq_len: Tokens of a sequence.
        batch_tokens: Tokens of a step on all devices.
        cluster: The described machine: h100 (Llama 3's) or h200.
        document_tokens: Length of the documents in a sequence, which attention does not leave; 0: one fills it.
        tp: Only layouts with so many tensor ranks; 0: any.
        cp: Only layouts with so many context ranks; 0: any.
        pp: Only layouts with so many pipeline ranks; 0: any.
        dp: Only layouts with so many data ranks; 0: any.
        chunks: Only so many virtual stages on a pipeline rank; 0: any.
        recompute: Only so much computed again in the backward pass; any: as little as fits.
        top: How many layouts to list.
        json: Print everything as JSON: all layouts, and the sources of the cluster's numbers.
        out: Draw memory and times into this SVG file.
    """

    gpus: int
    seq_len: int = 8192
    batch_tokens: int = 16_777_216
    cluster: str = "h100"
    document_tokens: int = 0
    tp: int = 0
    cp: int = 0
    pp: int = 0
    dp: int = 0
    chunks: int = 0
    recompute: Literal["any", "none", "swiglu", "block"] = "any"
    top: int = 8
    json: bool = False
    out: Path | None = None


def run_plan(model: str, given: PlanArguments) -> int:
    """Search, print, draw; returns the exit status."""
    from herdkern.model.config import PRESETS
    from herdkern.parallel.clusters import CLUSTERS
    from herdkern.parallel.layout_report import as_text, as_values
    from herdkern.parallel.layout_search import Task, search

    _check_word("MODEL", model, list(PRESETS))
    _check_word("cluster", given.cluster, list(CLUSTERS))
    if given.gpus < 1 or given.top < 1:
        raise UsageError(f"plan: gpus and top must be at least 1, got {given.gpus}, {given.top}")
    axes = {"tp": given.tp, "cp": given.cp, "pp": given.pp, "dp": given.dp, "num_chunks": given.chunks}
    task = Task(
        model=PRESETS[model](),
        cluster=CLUSTERS[given.cluster](),
        devices=given.gpus,
        seq_len=given.seq_len,
        batch_tokens=given.batch_tokens,
        document_tokens=given.document_tokens,
        fixed=tuple((name, value) for name, value in axes.items() if value),
        recompute=given.recompute,
    )
    found = search(task)
    print(dumps(as_values(found, model), indent=1) if given.json else as_text(found, model, top=given.top))
    if given.out is not None:
        from herdkern.engine import atomic_file
        from herdkern.parallel.layout_picture import as_svg

        with atomic_file(given.out, "w") as f:
            f.write(as_svg(found, top=given.top))
        if not given.json:
            print(given.out)
    return 0


def _check_word(name: str, word: str, known: Sequence[str]) -> None:
    if word not in known:
        raise UsageError(f"plan: {name} must be one of {', '.join(known)}, got {word!r}{near(word, known)}")
