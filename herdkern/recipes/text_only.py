"""The text side by itself: clean documents from raw records, and dedup of documents, each in its own run folder."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from herdkern.data.extract import ExtractConfig, extract_shard
from herdkern.data.filter import FilterConfig, filter_shard
from herdkern.data.language import LanguageConfig, language_shard
from herdkern.data.sources import expand_inputs, group_inputs
from herdkern.dedup.documents import MinHashConfig, dedup_minhash
from herdkern.dedup.lines import LineDedupConfig, dedup_lines
from herdkern.dedup.urls import UrlDedupConfig, dedup_urls
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


def dedup_documents(
    inputs: Sequence[Path], out: Path, *, urls: bool, minhash: MinHashConfig | None, lines: bool
) -> list[Path]:
    """Document files without copies, and a report in `out`; each of the three steps can be left out.

    Raises: as expand_inputs and the dedup stages do.
    """
    files = expand_inputs(inputs)
    console = Console(out, urls + (minhash is not None) + lines)
    with ExitStack() as stack:
        run = _open(stack, out)
        if urls:
            with console.stage("dedup_urls") as line:
                result = dedup_urls(run, files, UrlDedupConfig())
                line.done(result)
            files = result.files(DOCUMENTS)
        if minhash is not None:
            with console.stage("dedup_minhash") as line:
                result = dedup_minhash(run, files, minhash)
                line.done(result)
            files = result.files(DOCUMENTS)
        if lines:
            with console.stage("dedup_lines") as line:
                result = dedup_lines(run, files, LineDedupConfig())
                line.done(result)
            files = result.files(DOCUMENTS)
    write_report(out)
    return files


def _open(stack: ExitStack, out: Path) -> Run:
    workers = len(os.sched_getaffinity(0))
    executor = stack.enter_context(make_executor("processes" if workers > 1 else "serial", workers))
    return stack.enter_context(Run(out, executor=executor))
