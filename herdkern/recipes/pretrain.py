"""The whole job, top to bottom: raw records, documents, token shards, a trained model, its report.

Data stages run on the engine and training on its checkpoints, so the same call goes on wherever a run was stopped, and
does nothing that is done. A stage whose settings or inputs changed runs again, with those behind it.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from herdkern.data.corpus import make_package_documents
from herdkern.data.extract import extract_shard
from herdkern.data.filter import filter_shard
from herdkern.data.language import language_shard
from herdkern.data.pack import pack_shard
from herdkern.data.sources import expand_inputs, group_inputs
from herdkern.dedup.containment import drop_contained
from herdkern.dedup.documents import dedup_minhash
from herdkern.dedup.lines import dedup_lines
from herdkern.dedup.urls import dedup_urls
from herdkern.engine import Run, SerialExecutor, make_executor, read_json, write_json_atomic
from herdkern.recipes.config import Recipe
from herdkern.recipes.console import Console, changes, summary
from herdkern.recipes.data_stages import (
    SplitConfig,
    VocabularyConfig,
    crawl_documentation,
    hash_shard,
    learn_vocabulary,
    split_shard,
)
from herdkern.recipes.publish import publish
from herdkern.report import write_report
from herdkern.tokenizer import Tokenizer

DOCUMENTS = "documents.jsonl.zst"
NUM_STAGES = 17
Shards = list[list[Path]]  # the files of each shard


def run_recipe(recipe: Recipe, run_dir: Path) -> Path:
    """Do what is not done yet of `recipe` in `run_dir`; returns the path of the report.

    Raises: ValueError or FileNotFoundError for settings and inputs that cannot work; StageError if a data stage fails;
    RuntimeError if another process works in run_dir; OSError if it cannot be written.
    """
    _open_run_folder(recipe, run_dir)
    console = Console(run_dir, NUM_STAGES)
    with ExitStack() as stack:
        workers = recipe.data.num_workers or len(os.sched_getaffinity(0))
        executor = stack.enter_context(make_executor("processes" if workers > 1 else "serial", workers))
        run = stack.enter_context(Run(run_dir, executor=executor))
        raw = read_raw(recipe, run, console)
        documents = clean(recipe, run, raw, console)
        documents = dedup(recipe, run, documents, console)
        tokenizer = make_tokens(recipe, run, documents, console)
    train_and_judge(recipe, run_dir, tokenizer, console)
    with console.stage("report") as line:
        report = write_report(run_dir)
        line.done(text=str(report), skipped=not console.did_something)
    _say_goodbye(recipe, run_dir, report, console)
    return report


@contextmanager
def in_this_process(run: Run) -> Iterator[None]:
    """The stages in this block run here: they are single tasks with threads and a bar of their own."""
    workers, run.executor = run.executor, SerialExecutor()
    run_bar, run.progress = run.progress, False
    try:
        yield
    finally:
        run.executor, run.progress = workers, run_bar


def read_raw(recipe: Recipe, run: Run, console: Console) -> Shards:
    """The files to read, one group a task: those of --data.inputs, or a crawl of this Python's documentation."""
    with console.stage("crawl") as line:
        if recipe.data.inputs:
            files = expand_inputs(recipe.data.inputs)
            line.done(text=f"{len(files):,} files given", skipped=True)
            return group_inputs(files)
        with in_this_process(run):
            crawled = run.once("crawl", crawl_documentation, [], config=recipe.data.crawl)
        line.done(crawled)
        return group_inputs(sorted(crawled.tasks[0].glob("*.warc.gz")), max_group_bytes=1)


def clean(recipe: Recipe, run: Run, raw: Shards, console: Console) -> list[Path]:
    """Document files: main text, language and quality rules applied, in one task for each group of raw files."""
    data = recipe.data
    with console.stage("extract") as line:
        extracted = run.map("extract", extract_shard, raw, config=data.extract)
        line.done(extracted)
    files = extracted.files(DOCUMENTS)
    with console.stage("corpus") as line:
        if data.inputs:
            line.done(text="nothing added to the given files", skipped=True)
        else:
            added = run.once("corpus", make_package_documents, [], config=data.corpus)
            line.done(added)
            files += added.files(DOCUMENTS)
    with console.stage("language") as line:
        named = run.map("language", language_shard, files, config=data.language)
        line.done(named)
    with console.stage("filter") as line:
        filtered = run.map("filter", filter_shard, named.files(DOCUMENTS), config=data.filter)
        line.done(filtered)
    return filtered.files(DOCUMENTS)


def dedup(recipe: Recipe, run: Run, files: list[Path], console: Console) -> list[Path]:
    """Document files without copies: by URL, by MinHash over all documents, then by line."""
    data = recipe.data
    with console.stage("dedup_urls") as line:
        urls = dedup_urls(run, files, data.urls)
        line.done(urls)
    with console.stage("dedup_minhash") as line:
        documents = dedup_minhash(run, urls.files(DOCUMENTS), data.minhash)
        line.done(documents)
    with console.stage("dedup_lines") as line:
        lines = dedup_lines(run, documents.files(DOCUMENTS), data.lines)
        line.done(lines)
    return lines.files(DOCUMENTS)


def make_tokens(recipe: Recipe, run: Run, files: list[Path], console: Console) -> Tokenizer:
    """Hold out, learn the vocabulary on the rest, pack: RUN/tokenizer and RUN/tokens/<train|heldout>/<source>."""
    with console.stage("split") as line:
        split = SplitConfig(heldout_share=recipe.data.heldout_share, seed=recipe.data.seed)
        smallest = run.map("split.hashes", hash_shard, files, config=split).counters.get("smallest", [])
        split = dataclasses.replace(split, smallest_hash=min(smallest, default=-1))
        parts = run.map("split", split_shard, files, config=split)
        line.done(parts)
    by_name = _by_split_and_source(parts.tasks)
    _check_split(by_name, recipe, parts.counters)
    with console.stage("heldout") as line:
        heldout, train = (_of_split(by_name, name) for name in ("heldout", "train"))
        kept = drop_contained(run, heldout, train, recipe.data.containment)
        line.done(kept)
    train_only = {name: paths for name, paths in by_name.items() if name.startswith("train/")}
    by_name = _by_split_and_source(kept.tasks) | train_only
    with console.stage("tokenizer") as line:
        vocabulary = VocabularyConfig(
            vocab_size=recipe.tokenizer.vocab_size, max_text_bytes=recipe.tokenizer.max_text_bytes
        )
        with in_this_process(run):
            learned = run.once("tokenizer", learn_vocabulary, train, config=vocabulary)
        line.done(learned)
    folder = learned.tasks[0] / "tokenizer"
    with console.stage("pack") as line:
        packed = run.map("pack", pack_shard, [[folder, *paths] for paths in by_name.values()], config=recipe.data.pack)
        line.done(packed, f"{packed.counters['tokens']:,} tokens, {packed.counters['docs_out']:,} documents")
    publish(folder, run.run_dir / "tokenizer")
    publish(dict(zip(by_name, packed.tasks)), run.run_dir / "tokens")
    return Tokenizer.load(folder)


def _by_split_and_source(tasks: Sequence[Path]) -> dict[str, list[Path]]:
    """ "train/web" -> its files, in the order of the tasks."""
    found: dict[str, list[Path]] = {}
    for task in tasks:
        for path in sorted(task.glob("*/*.jsonl.zst")):
            found.setdefault(f"{path.parent.name}/{path.name.removesuffix('.jsonl.zst')}", []).append(path)
    return dict(sorted(found.items()))


def _of_split(by_name: dict[str, list[Path]], split: str) -> list[Path]:
    return [path for name, paths in by_name.items() if name.startswith(f"{split}/") for path in paths]


def _check_split(by_name: dict[str, list[Path]], recipe: Recipe, counters: dict[str, Any]) -> None:
    """Fail early, and say what to change, when nothing is left to train on or to measure with."""
    num_documents = counters.get("docs_out", 0)
    for split in ("train", "heldout"):
        if not any(name.startswith(f"{split}/") for name in by_name):
            raise ValueError(
                f"run_recipe: the {split} documents must be at least one, got none of the {num_documents} that the "
                f"filters left, with heldout_share={recipe.data.heldout_share}; give more input, loosen --data.filter, "
                "or change --data.heldout-share"
            )


def train_and_judge(recipe: Recipe, run_dir: Path, tokenizer: Tokenizer, console: Console) -> None:
    """Train, average, export; then held-out bits per byte and samples."""
    from herdkern.env import environment
    from herdkern.recipes import model_stages as stages

    write_json_atomic(run_dir / "environment.json", environment())
    with console.stage("train") as line:
        done, trained = stages.train_model(recipe, run_dir, tokenizer, console.note)
        line.done(text=f"{trained.step:,} steps, {trained.tokens:,} tokens", skipped=not done)
    config = stages.final_config(recipe, tokenizer)
    tokens = run_dir / "tokens"
    with Run(run_dir) as run:
        with console.stage("export") as line:
            exported = run.once(
                "export", stages.export_stage, [trained.checkpoint, run_dir / "tokenizer"], config=config
            )
            line.done(exported, f"{config.model.num_params:,} parameters")
        with console.stage("evaluate") as line:
            inputs = [trained.checkpoint, run_dir / "tokenizer", tokens / "train", tokens / "heldout"]
            judged = run.once("evaluate", stages.evaluate_stage, inputs, config=config)
            found = judged.counters
            line.done(
                judged,
                f"{found['bits_per_byte']:.3f} bits/byte held out, unigram {found['unigram_bits_per_byte']:.3f}",
            )
        with console.stage("samples") as line:
            sampled = run.once("samples", stages.samples_stage, [exported.tasks[0] / "hf"], config=config)
            line.done(sampled, f"{sampled.counters['num_tokens']:,} tokens")
    publish(exported.tasks[0] / "hf", run_dir / "hf")
    publish(judged.tasks[0] / "evaluation.json", run_dir / "evaluation.json")
    publish(sampled.tasks[0] / "samples.jsonl", run_dir / "samples.jsonl")


def _open_run_folder(recipe: Recipe, run_dir: Path) -> None:
    """Make the folder, say what differs from the run that is in it, and write the resolved configuration."""
    if run_dir.exists() and not run_dir.is_dir():
        raise NotADirectoryError(f"run_recipe: the run folder must be a folder, got the file {run_dir}")
    config = run_dir / "config.json"
    resolved = dataclasses.asdict(recipe)
    if config.is_file():
        differences = changes(read_json(config), resolved)
        for line in differences[:12]:
            print(f"changed since the last run: {line}")
        if len(differences) > 12:
            print(f"changed since the last run: {len(differences) - 12} more settings")
        if differences:
            print("what depends on these settings is done again, the rest is kept", flush=True)
    elif run_dir.exists() and any(run_dir.iterdir()) and not (run_dir / "journal.jsonl").exists():
        raise FileExistsError(
            f"run_recipe: the run folder must be new, empty or that of an earlier run, got {run_dir}, which holds "
            "other files; name another with --out"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json_atomic(config, resolved)


def _say_goodbye(recipe: Recipe, run_dir: Path, report: Path, console: Console) -> None:
    """The summary at the end of the run."""
    evaluation = read_json(run_dir / "evaluation.json")
    rates = sorted(row["tokens_per_s"] for row in _metrics(run_dir) if row.get("tokens_per_s"))
    ours, unigram = evaluation["bits_per_byte"], evaluation["unigram_bits_per_byte"]
    rows = [
        ("held-out bits per byte", f"{ours:.3f}  (unigram baseline {unigram:.3f})"),
        ("training", f"{rates[len(rates) // 2]:,.0f} tokens/s (median)" if rates else "no step logged"),
        ("model", f"{run_dir / 'hf'}  ({evaluation['num_parameters']:,} parameters, Hugging Face folder)"),
        ("time of all stages", f"{sum(console.timings.values()):.0f} s"),
        ("report", str(report.resolve())),
    ]
    if not console.did_something:
        print(f"everything was done before; `herdkern run {recipe.name} --out DIR` starts another run")
    print(summary(rows), flush=True)


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    from herdkern.train.metrics import MetricsLog

    return MetricsLog(run_dir / "metrics.jsonl").read()
