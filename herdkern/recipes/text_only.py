"""The first half of the text side by itself: clean documents from raw records, in a run folder of its own."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from herdkern.data.extract import ExtractConfig, extract_shard
from herdkern.data.filter import FilterConfig, filter_shard
from herdkern.data.language import LanguageConfig, language_shard
from herdkern.data.sources import expand_inputs, group_inputs
from herdkern.engine import Run, make_executor
from herdkern.recipes.console import Console
from herdkern.report import write_report

DOCUMENTS = "documents.jsonl.zst"


def extract_documents(
    inputs: Sequence[Path], out: Path, languages: tuple[str, ...], rules: tuple[str, ...]
) -> list[Path]:
    """Clean document files from raw files of any kind: main text, language, quality rules; and a report in `out`.

    Raises: as expand_inputs and Run.map do.
    """
    groups = group_inputs(expand_inputs(inputs))
    console = Console(out, 3)
    with ExitStack() as stack:
        run = _open(stack, out)
        with console.stage("extract") as line:
            result = run.map("extract", extract_shard, groups, config=ExtractConfig())
            line.done(result)
        with console.stage("language") as line:
            result = run.map(
                "language", language_shard, result.files(DOCUMENTS), config=LanguageConfig(languages=languages)
            )
            line.done(result)
        with console.stage("filter") as line:
            result = run.map("filter", filter_shard, result.files(DOCUMENTS), config=FilterConfig(rules=rules))
            line.done(result)
    write_report(out)
    return result.files(DOCUMENTS)


def _open(stack: ExitStack, out: Path) -> Run:
    workers = len(os.sched_getaffinity(0))
    executor = stack.enter_context(make_executor("processes" if workers > 1 else "serial", workers))
    return stack.enter_context(Run(out, executor=executor))
