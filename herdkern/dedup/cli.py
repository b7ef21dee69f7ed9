"""`herdkern dedup ACTION ...`: all, url, exact, minhash, lines, semantic, add, report; each is one function.

Nothing heavy is imported before an action has its command line. Steps are told on stderr, the files that hold the kept
documents on stdout.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from herdkern.command import UsageError, near, to_bytes

if TYPE_CHECKING:
    from herdkern.dedup.minhash_config import MinHashConfig
    from herdkern.engine import Run, StageResult

USAGE = """usage: herdkern dedup ACTION INPUTS --out DIR [OPTIONS]

  all       URLs, documents (MinHash) and lines, one after the other; also without its name: herdkern dedup INPUTS
  url       of every URL the newest document
  exact     of documents of the same text one
  minhash   of near-duplicates one, by MinHash over all documents
  lines     remove lines that occur more than six times in a bucket of documents
  semantic  of documents of like embeddings one; the embeddings are yours
  add       drop from new documents what an index of earlier ones has, and add the rest to the index
  report    write the HTML report of a run folder again

INPUTS are JSONL (plain, .gz, .zst), Parquet, text, WARC or HTML files, or folders of them; of WARC and HTML the main
text is taken. The same command again goes on where a killed one stopped. `herdkern dedup ACTION --help` tells more."""

DOCUMENTS = "documents.jsonl.zst"
Keep = Literal["newest", "longest", "best_score", "smallest_id"]
LEAST_TASK_MEMORY = 128 << 20


@dataclass(frozen=True, kw_only=True)
class Job:
    """Where the work is done and what is written.

    Args:
        out: The run folder; a run that was stopped goes on from there.
        executor: Who runs the tasks. MPI: mpiexec -n 9 python -m mpi4py.futures -m herdkern dedup ... --executor mpi
        workers: Tasks at a time; 0 takes the usable cores.
        max_memory: What all tasks may hold together, as in 8GB; none given allows 1 GiB to each.
        format: parquet writes documents.parquet beside the JSON lines.
        write_duplicates: Write what is dropped, with its reason, to dropped.jsonl.zst.
    """

    out: Path
    executor: Literal["serial", "threads", "processes", "mpi", "ray", "dask"] = "processes"
    workers: int = 0
    max_memory: str = ""
    format: Literal["jsonl", "parquet"] = "jsonl"
    write_duplicates: bool = True


@dataclass(frozen=True, kw_only=True)
class Near:
    """What near-duplicates are.

    Args:
        preset: Bands, rows, shingles and threshold of llama3 (20 x 6, ours), fineweb (14 x 8) or curator (20 x 13).
        num_bands: 0 takes what the preset has; so do the others.
        rows_per_band: Two documents are compared with probability 1 - (1 - similarity^rows)^bands.
        ngram_size: Words (or characters, by the preset) in a shingle.
        min_similarity: Jaccard similarity from which on two documents are near-duplicates.
        verify: Compare the sets of shingles (exact), the signatures, or nothing.
        across_languages: Documents of different languages may be near-duplicates.
    """

    preset: Literal["llama3", "fineweb", "curator"] = "llama3"
    num_bands: int = 0
    rows_per_band: int = 0
    ngram_size: int = 0
    min_similarity: float = 0.0
    verify: Literal["preset", "exact", "signature", "none"] = "preset"
    across_languages: bool = False


def main(args: list[str]) -> int:
    """Run one action; returns the exit status. Raises: UsageError, and what the action raises."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if args else 2
    if args[0] in ACTIONS:
        return ACTIONS[args[0]](args[1:])
    if args[0].startswith("-") or Path(args[0]).exists():  # as it was before there were actions
        return ACTIONS["all"](args)
    known = ", ".join(ACTIONS)
    raise UsageError(
        f"dedup: the action must be one of {known}, or inputs that exist, got {args[0]!r}{near(args[0], list(ACTIONS))}"
    )


def _parse(function: Callable[..., int], args: list[str], action: str) -> int:
    import tyro

    return tyro.cli(function, args=args, prog=f"herdkern dedup {action}", config=(tyro.conf.OmitArgPrefixes,))


class _Steps:
    """The steps of one command in one run folder: inputs, configurations, what is told about each, the report."""

    def __init__(self, action: str, inputs: tuple[Path, ...], job: Job, num_steps: int):
        if not inputs:
            raise UsageError(f"dedup {action}: inputs must have at least one file or folder, got none")
        self.action, self.inputs, self.job, self.num_steps = action, inputs, job, num_steps
        self.number = 0
        self.configs: dict[str, Any] = {}
        self.files: list[Path] = []
        self.run: Run

    def settings(self, config_type: type, **values: Any) -> Any:
        """A configuration with the job's share of memory and its wish for duplicates, where it has a place for them."""
        from herdkern.dedup.minhash_config import RESERVE_BYTES, MinHashConfig

        names = {field.name for field in fields(config_type)}
        if "write_dropped" in names:
            values["write_dropped"] = self.job.write_duplicates
        if "max_memory" in names and self.job.max_memory:  # MinHashConfig counts the process too, the others tables
            values["max_memory"] = self.task_memory() - (0 if config_type is MinHashConfig else RESERVE_BYTES)
        return config_type(**values)

    def task_memory(self) -> int:
        """Bytes for each task. Raises: UsageError if they are too few."""
        share = to_bytes(self.job.max_memory, "dedup") // self.num_workers()
        if share < LEAST_TASK_MEMORY:
            raise UsageError(
                f"dedup {self.action}: max_memory must be at least 128 MiB for each of {self.num_workers()} workers, "
                f"got {self.job.max_memory}; raise it or take fewer workers"
            )
        return share

    def num_workers(self) -> int:
        """Tasks at a time."""
        import os

        return 1 if self.job.executor == "serial" else self.job.workers or len(os.sched_getaffinity(0))

    @contextmanager
    def opened(self) -> Iterator["_Steps"]:
        """The run folder, open, and the documents of the inputs."""
        from herdkern.data.sources import expand_inputs
        from herdkern.engine import Run, make_executor

        if self.job.workers < 0:
            raise UsageError(f"dedup {self.action}: workers must be at least 0, got {self.job.workers}")
        budget = to_bytes(self.job.max_memory, "dedup") if self.job.max_memory else None
        files = expand_inputs(self.inputs)
        with ExitStack() as stack:
            executor = stack.enter_context(make_executor(self.job.executor, self.num_workers()))
            self.run = stack.enter_context(Run(self.job.out, executor=executor, max_memory=budget))
            self.files = self._documents(files)
            yield self

    def _documents(self, files: list[Path]) -> list[Path]:
        """Document files: WARC and HTML through extraction, the others as they are, in the order of the inputs."""
        from herdkern.data.document import document_kind
        from herdkern.data.extract import ExtractConfig, extract_shard

        raw = []
        for path in files:
            try:
                document_kind(path)
            except ValueError:
                raw.append(path)
        if not raw:
            return files
        self.num_steps += 1
        result = self.step("extract", lambda: self.run.map("extract", extract_shard, raw, config=ExtractConfig()), None)
        extracted = dict(zip(raw, result.files(DOCUMENTS), strict=True))
        return [extracted.get(path, path) for path in files]

    def step(self, name: str, do: Callable[[], "StageResult"], config: Any) -> "StageResult":
        """Run one step and tell how it went."""
        from herdkern.engine import write_json_atomic

        self.number += 1
        started = time.perf_counter()
        self.configs[name] = asdict(config) if config is not None else {}
        inputs = [str(path) for path in self.inputs]
        record = {"name": f"dedup {self.action}", "inputs": inputs, "steps": self.configs}
        write_json_atomic(self.job.out / "config.json", record)
        result = do()
        when = "done before" if result.skipped else f"{time.perf_counter() - started:.1f} s"
        place = f"[{self.number}/{self.num_steps}]"
        line = f"{place} {name.replace('_', ' '):15} {_counts(result.counters)}"
        print(f"{line:96} {when:>11}", file=sys.stderr, flush=True)
        if result.files(DOCUMENTS):
            self.files = result.files(DOCUMENTS)
        return result

    def finish(self) -> int:
        """Write what the job asks for beside the documents, and the report; print where the documents are."""
        if self.job.format == "parquet":
            from herdkern.dedup.parquet import to_parquet

            last = [name for name in self.configs if name != "extract"][-1]
            written = self.run.map(f"{last}.parquet", to_parquet, self.files, config={})
            self.files = written.files("documents.parquet")
        from herdkern.report.dedup import write_dedup_report

        print(f"report: {write_dedup_report(self.job.out)}", file=sys.stderr)
        print("\n".join(map(str, self.files)))
        return 0


def _counts(counters: dict[str, Any]) -> str:
    """ "470 of 500 documents, 6.1 MB; duplicate url 30" from a stage's counters."""
    kept = counters.get("docs_out", 0)
    line = f"{kept:,} of {counters.get('docs_in', kept):,} documents"
    size = counters.get("bytes_out") or counters.get("text_bytes") or 0
    line += f", {size / 1e6:.1f} MB" if size else ""
    if counters.get("lines_removed"):
        line += f", {counters['lines_removed']:,} lines removed"
    dropped = sorted((counters.get("dropped") or {}).items(), key=lambda item: (-item[1], item[0]))
    return line + "".join(f"; {reason.replace('_', ' ')} {count:,}" for reason, count in dropped[:2])


def _url(steps: _Steps) -> None:
    from herdkern.dedup.urls import UrlDedupConfig, dedup_urls

    config = steps.settings(UrlDedupConfig)
    steps.step("dedup_urls", lambda: dedup_urls(steps.run, steps.files, config), config)


def _minhash_config(steps: _Steps, near_by: Near, keep: Keep, score_key: str) -> "MinHashConfig":
    from herdkern.dedup.minhash_config import MinHashConfig

    wanted: dict[str, Any] = {"keep": keep, "score_key": score_key, "within_language": not near_by.across_languages}
    names = ("num_bands", "rows_per_band", "ngram_size", "min_similarity")
    wanted |= {name: getattr(near_by, name) for name in names if getattr(near_by, name)}
    if near_by.verify != "preset":
        wanted["verify"] = near_by.verify
    plain = steps.settings(MinHashConfig)
    wanted |= {"write_dropped": plain.write_dropped, "max_memory": plain.max_memory}
    return MinHashConfig.preset(near_by.preset, **wanted)


def _minhash(steps: _Steps, config: "MinHashConfig") -> None:
    from herdkern.dedup.curve import curve_text
    from herdkern.dedup.documents import dedup_minhash

    print(curve_text(num_bands=config.num_bands, rows_per_band=config.rows_per_band), file=sys.stderr)
    steps.step("dedup_minhash", lambda: dedup_minhash(steps.run, steps.files, config), config)


def _all(args: list[str]) -> int:
    def dedup_all(
        inputs: tuple[Path, ...],
        /,
        job: Job,
        near: Near,
        skip_urls: bool = False,
        skip_documents: bool = False,
        skip_lines: bool = False,
        keep: Keep = "newest",
        score_key: str = "score",
    ) -> int:
        """Drop copies from documents: the same URL, near-duplicate text, lines that repeat across documents.

        Args:
            inputs: JSONL, Parquet, text, WARC or HTML files, or folders of them.
            job: Where the work is done.
            near: What near-duplicates are.
            skip_urls: Do not drop older documents of the same URL.
            skip_documents: Do not drop near-duplicates (MinHash).
            skip_lines: Do not remove lines that occur more than six times.
            keep: Which of near-duplicates stays.
            score_key: The number in a document's meta that decides with --keep best_score.
        """
        skipped = skip_urls + skip_documents + skip_lines
        if skipped == 3:
            raise UsageError("dedup all: one of the three steps must be left, all are skipped")
        steps = _Steps("all", inputs, job, 3 - skipped)
        config = None if skip_documents else _minhash_config(steps, near, keep, score_key)
        with steps.opened():
            if not skip_urls:
                _url(steps)
            if config is not None:
                _minhash(steps, config)
            if not skip_lines:
                _lines(steps, {})
            return steps.finish()

    return _parse(dedup_all, args, "all")


def _url_action(args: list[str]) -> int:
    def url(inputs: tuple[Path, ...], /, job: Job) -> int:
        """Keep one document of every URL: the newest, then the longest, then the one of the smallest id.

        Args:
            inputs: JSONL, Parquet, text, WARC or HTML files, or folders of them.
            job: Where the work is done.
        """
        with _Steps("url", inputs, job, 1).opened() as steps:
            _url(steps)
            return steps.finish()

    return _parse(url, args, "url")


def _exact_action(args: list[str]) -> int:
    def exact(
        inputs: tuple[Path, ...],
        /,
        job: Job,
        normalize: bool = False,
        keep: Keep = "newest",
        score_key: str = "score",
    ) -> int:
        """Keep one of the documents that have the same text, by a 128-bit hash.

        Args:
            inputs: JSONL, Parquet, text, WARC or HTML files, or folders of them.
            job: Where the work is done.
            normalize: Case and the kind and number of white space do not count (NFC, case folded).
            keep: Which of them stays.
            score_key: The number in a document's meta that decides with --keep best_score.
        """
        from herdkern.dedup.exact import ExactDedupConfig, dedup_exact

        steps = _Steps("exact", inputs, job, 1)
        config = steps.settings(ExactDedupConfig, normalize=normalize, keep=keep, score_key=score_key)
        with steps.opened():
            steps.step("dedup_exact", lambda: dedup_exact(steps.run, steps.files, config), config)
            return steps.finish()

    return _parse(exact, args, "exact")


def _minhash_action(args: list[str]) -> int:
    def minhash(
        inputs: tuple[Path, ...],
        /,
        job: Job,
        near: Near,
        keep: Keep = "newest",
        score_key: str = "score",
        save_index: Path | None = None,
    ) -> int:
        """Keep one document of every cluster of near-duplicates.

        Args:
            inputs: JSONL, Parquet, text, WARC or HTML files, or folders of them.
            job: Where the work is done.
            near: What near-duplicates are.
            keep: Which of a cluster stays.
            score_key: The number in a document's meta that decides with --keep best_score.
            save_index: A folder for an index of what is kept, for `herdkern dedup add`.
        """
        steps = _Steps("minhash", inputs, job, 1)
        config = _minhash_config(steps, near, keep, score_key)
        with steps.opened():
            files = steps.files
            _minhash(steps, config)
            if save_index is not None:
                _save_index(steps, save_index, files, config)
            return steps.finish()

    return _parse(minhash, args, "minhash")


def _save_index(steps: _Steps, folder: Path, files: list[Path], config: "MinHashConfig") -> None:
    """Index what this run kept, unless it has done so. Raises: FileExistsError if the index is another run's."""
    from herdkern.dedup.index import INDEX, save_index
    from herdkern.engine import write_json_atomic

    marker = steps.job.out / "index.json"
    if marker.is_file() and (folder / INDEX).is_file():
        return
    save_index(steps.run, folder, files, config)
    write_json_atomic(marker, {"index": str(folder)})
    print(f"index: {folder}", file=sys.stderr)


def _add_action(args: list[str]) -> int:
    def add(inputs: tuple[Path, ...], /, job: Job, index: Path) -> int:
        """Drop from new documents what an index has, and near-duplicates among them; add the rest to the index.

        Args:
            inputs: JSONL, Parquet, text, WARC or HTML files, or folders of them.
            job: Where the work is done; each crawl needs a run folder of its own.
            index: The folder that `dedup minhash --save-index` wrote; its settings hold.
        """
        steps = _Steps("add", inputs, job, 1)
        config = _index_config(steps, index)
        with steps.opened():
            _add(steps, index, config)
            return steps.finish()

    return _parse(add, args, "add")


def _index_config(steps: _Steps, index: Path) -> "MinHashConfig":
    """The settings of an index. Raises: OSError if there is none; ValueError if it is another version's."""
    from herdkern.dedup.index import INDEX, INDEX_VERSION
    from herdkern.dedup.minhash_config import MinHashConfig
    from herdkern.engine import read_json

    values = read_json(index / INDEX)
    if not isinstance(values, dict) or values.get("version") != INDEX_VERSION:
        raise ValueError(f"dedup add: index must be of version {INDEX_VERSION}, got {index}; make it anew")
    rules = {name: value for name, value in values["rules"].items() if name != "spec"}
    config: MinHashConfig = steps.settings(MinHashConfig, **rules)
    return config


def _add(steps: _Steps, index: Path, config: "MinHashConfig") -> None:
    """Add once: a second time, all that was added would be dropped for itself."""
    from herdkern.dedup.index import INDEX, add_to_index
    from herdkern.engine import read_json, write_json_atomic

    begun, done = steps.job.out / "add.json", steps.job.out / "added.json"
    if done.is_file():
        files = [path for path in map(Path, read_json(done)["files"]) if path.is_file()]
        print(f"[1/1] dedup add: done before, in {index}", file=sys.stderr)
        steps.configs["dedup_add"], steps.files = {}, files
        return
    segments = len(read_json(index / INDEX)["segments"])
    if begun.is_file() and read_json(begun)["segments"] != segments:
        raise ValueError(
            f"dedup add: the index {index} must be as it was when this run began "
            f"({read_json(begun)['segments']} segments), it has {segments}; begin again in a new folder"
        )
    write_json_atomic(begun, {"index": str(index), "segments": segments})
    result = steps.step("dedup_add", lambda: add_to_index(steps.run, index, steps.files, config), config)
    write_json_atomic(done, {"index": str(index), "files": [str(path) for path in result.files(DOCUMENTS)]})


def _lines(steps: _Steps, values: dict[str, Any]) -> None:
    from herdkern.dedup.lines import LineDedupConfig, dedup_lines

    config = steps.settings(LineDedupConfig, **values)
    steps.step("dedup_lines", lambda: dedup_lines(steps.run, steps.files, config), config)


def _lines_action(args: list[str]) -> int:
    def lines(
        inputs: tuple[Path, ...],
        /,
        job: Job,
        max_count: int = 6,
        bucket_size: int = 30_000_000,
        count: Literal["occurrence", "document"] = "occurrence",
        keep_first: int = 0,
        code_aware: bool = True,
    ) -> int:
        """Remove the lines that occur too often in a bucket of documents.

        Args:
            inputs: JSONL, Parquet, text, WARC or HTML files, or folders of them.
            job: Where the work is done.
            max_count: A line that occurs more often goes.
            bucket_size: Documents in a bucket.
            count: Every occurrence, or every document that holds the line.
            keep_first: So many of the occurrences (or documents) keep the line.
            code_aware: Lines that look like code, formulas or table rows stay.
        """
        values = {"max_count": max_count, "bucket_size": bucket_size, "count": count}
        values |= {"keep_first": keep_first, "code_aware": code_aware}
        with _Steps("lines", inputs, job, 1).opened() as steps:
            _lines(steps, values)
            return steps.finish()

    return _parse(lines, args, "lines")


def _semantic_action(args: list[str]) -> int:
    def semantic(
        inputs: tuple[Path, ...],
        /,
        job: Job,
        embeddings: tuple[str, ...] = (),
        min_similarity: float = 0.95,
        num_clusters: int = 0,
        keep: Literal["newest", "longest", "best_score", "smallest_id", "outermost"] = "newest",
        column: str = "embedding",
    ) -> int:
        """Keep one of the documents whose embeddings are alike (SemDeDup).

        Args:
            inputs: JSONL, Parquet or text files, or folders of them.
            job: Where the work is done.
            embeddings: A .npy file (documents, dimensions) for each input, in order; or one MODULE:FUNCTION that makes
                an array of a list of texts; none given reads a column of Parquet inputs.
            min_similarity: Cosine from which on two documents are duplicates.
            num_clusters: Clusters of k-means; only documents of one cluster are compared. 0: one for 8192 documents.
            keep: Which of them stays; outermost: the farthest from the centroid, as SemDeDup.
            column: Of Parquet inputs: lists of numbers.
        """
        from herdkern.dedup.semantic import SemanticDedupConfig, dedup_semantic, load_function

        steps = _Steps("semantic", inputs, job, 1)
        values = {"min_similarity": min_similarity, "num_clusters": num_clusters, "keep": keep, "column": column}
        config = steps.settings(SemanticDedupConfig, **values)
        source: Any = [Path(path) for path in embeddings] or None
        if len(embeddings) == 1 and ":" in embeddings[0] and not Path(embeddings[0]).exists():
            source = load_function(embeddings[0])
        with steps.opened():
            steps.step("dedup_semantic", lambda: dedup_semantic(steps.run, steps.files, source, config), config)
            return steps.finish()

    return _parse(semantic, args, "semantic")


def _report_action(args: list[str]) -> int:
    def report(run: Path, /, out: Path | None = None, picture: Path | None = None) -> int:
        """Write the HTML report of a dedup run: funnel, clusters, S-curve, examples, lines and URLs.

        Args:
            run: The run folder.
            out: Where to write it; RUN/report.html by default.
            picture: Also write the figures alone to this SVG file.
        """
        from herdkern.report.dedup import write_dedup_report
        from herdkern.report.dedup_picture import write_dedup_picture

        print(write_dedup_report(run, out))
        if picture is not None:
            print(write_dedup_picture(run, picture))
        return 0

    return _parse(report, args, "report")


ACTIONS: dict[str, Callable[[list[str]], int]] = {
    "all": _all,
    "url": _url_action,
    "exact": _exact_action,
    "minhash": _minhash_action,
    "lines": _lines_action,
    "semantic": _semantic_action,
    "add": _add_action,
    "report": _report_action,
}
