"""Our dedup as blocks of a datatrove pipeline, on its Document objects (datatrove is not installed along with us).

`Dedup` is the whole of it where one task sees all documents. Dedup is global, and the tasks of a datatrove executor
cannot wait for each other; with many tasks it is three executors, each depending on the one before, as datatrove's own
dedup is: `WriteShard` in every task, `DedupShards` in one, `ReadShard` in every task.
"""

import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document as TroveDocument
from datatrove.pipeline.base import PipelineStep

from herdkern.data.document import Document, clean_text, read_documents, write_documents
from herdkern.dedup.documents import MinHashConfig, dedup_minhash
from herdkern.dedup.exact import ExactDedupConfig, dedup_exact
from herdkern.dedup.lines import LineDedupConfig, dedup_lines
from herdkern.dedup.urls import UrlDedupConfig, dedup_urls
from herdkern.engine import Run, StageResult, make_executor, read_json, write_json_atomic

Config = UrlDedupConfig | ExactDedupConfig | MinHashConfig | LineDedupConfig
STAGES: dict[type, tuple[str, Callable[..., StageResult]]] = {
    UrlDedupConfig: ("dedup_urls", dedup_urls),
    ExactDedupConfig: ("dedup_exact", dedup_exact),
    MinHashConfig: ("dedup_minhash", dedup_minhash),
    LineDedupConfig: ("dedup_lines", dedup_lines),
}
DOCUMENTS, KEPT = "documents.jsonl.zst", "kept.json"


def to_document(document: TroveDocument) -> Document:
    """Our record of a datatrove document: its metadata is `meta`, of which url, language and date are also fields.

    Raises: ValueError if it has media, or metadata that JSON cannot hold.
    """
    if document.media:
        raise ValueError(f"to_document: document {document.id!r} must have no media, got {len(document.media)}")
    metadata = document.metadata
    made = Document(
        id=clean_text(document.id),
        text=clean_text(document.text),
        url=clean_text(str(metadata.get("url") or "")),
        lang=clean_text(str(metadata.get("language") or "")),
        timestamp=_timestamp(metadata),
        meta=dict(metadata),
    )
    try:
        made.to_json().encode()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"to_document: the metadata of document {document.id!r} must be what JSON can hold, got {error}"
        ) from error
    return made


def _timestamp(metadata: dict[str, Any]) -> int:
    """Seconds since 1970 of metadata["timestamp"], a whole number, or of "date", ISO 8601; 0 for neither."""
    seconds = metadata.get("timestamp")
    if isinstance(seconds, int) and not isinstance(seconds, bool):
        return seconds
    try:
        date = datetime.datetime.fromisoformat(str(metadata.get("date", "")).replace("Z", "+00:00"))
    except ValueError:
        return 0
    date = date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)
    return int(date.timestamp())


def from_document(document: Document) -> TroveDocument:
    """The datatrove document of our record: text, id and `meta` as metadata."""
    return TroveDocument(text=document.text, id=document.id, metadata=dict(document.meta))


class WriteShard(PipelineStep):
    """Writes what a task sees to FOLDER/in/<rank>.jsonl.zst; nothing goes on to the next block."""

    type = "DEDUP"
    name = "herdkern: write shard"

    def __init__(self, folder: str | Path):
        super().__init__()
        self.folder = Path(folder)

    def run(self, data: Iterable[TroveDocument], rank: int = 0, world_size: int = 1) -> Iterator[TroveDocument]:
        """Write the documents of this task; yields none."""
        path = self.folder / "in" / f"{rank:05d}.jsonl.zst"
        self.stat_update("written", value=write_documents(path, map(to_document, data or ())), unit="shard")
        yield from ()


class DedupShards(PipelineStep):
    """Runs the steps of dedup over the shards of FOLDER/in, in task 0.

    steps: configurations, in the order in which they run: UrlDedupConfig, ExactDedupConfig, MinHashConfig,
    LineDedupConfig.  num_shards: how many `WriteShard` tasks there were, so that one that is missing is seen.
    workers: processes of the dedup itself.
    """

    type = "DEDUP"
    name = "herdkern: dedup"

    def __init__(self, folder: str | Path, steps: Sequence[Config], *, num_shards: int, workers: int = 1):
        super().__init__()
        for step in steps:
            if type(step) not in STAGES:
                known = ", ".join(kind.__name__ for kind in STAGES)
                raise ValueError(f"DedupShards: steps must be of {known}, got {type(step).__name__}")
        if not steps or len({type(step) for step in steps}) < len(steps):
            raise ValueError(f"DedupShards: steps must be at least one, each kind once, got {len(steps)}")
        self.folder, self.steps = Path(folder), list(steps)
        self.num_shards, self.workers = num_shards, workers

    def run(self, data: Iterable[TroveDocument], rank: int = 0, world_size: int = 1) -> Iterator[TroveDocument]:
        """Deduplicate all shards if this is task 0; yields nothing. Raises: FileNotFoundError for a missing shard."""
        if rank == 0:
            with self.track_time("dedup"):
                self._dedup()
        yield from ()

    def _dedup(self) -> None:
        files = [self.folder / "in" / f"{rank:05d}.jsonl.zst" for rank in range(self.num_shards)]
        for path in files:
            if not path.is_file():
                raise FileNotFoundError(f"DedupShards: {path} must exist; run WriteShard in {self.num_shards} tasks")
        kind = "processes" if self.workers > 1 else "serial"
        with make_executor(kind, self.workers) as executor, Run(self.folder / "run", executor=executor) as run:  # type: ignore[arg-type]
            for config in self.steps:
                name, stage = STAGES[type(config)]
                result = stage(run, files, config)
                files = result.files(DOCUMENTS)
                self.stat_update(f"{name}: kept", value=result.counters["docs_out"], unit="corpus")
                for reason, count in sorted((result.counters.get("dropped") or {}).items()):
                    self.stat_update(f"dropped: {reason}", value=count, unit="corpus")
        names = [str(path.relative_to(self.folder)) for path in files]
        write_json_atomic(self.folder / KEPT, names)


class ReadShard(PipelineStep):
    """Yields the documents that `DedupShards` has kept: task `rank` those of shards rank, rank + world_size, ..."""

    type = "DEDUP"
    name = "herdkern: read shard"

    def __init__(self, folder: str | Path):
        super().__init__()
        self.folder = Path(folder)

    def run(
        self, data: Iterable[TroveDocument] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[TroveDocument]:
        """The documents of this task, behind those of the blocks before.

        Raises: FileNotFoundError if DedupShards has not run.
        """
        yield from data or ()
        if not (self.folder / KEPT).is_file():
            raise FileNotFoundError(f"ReadShard: {self.folder / KEPT} must exist; run DedupShards first")
        for name in read_json(self.folder / KEPT)[rank::world_size]:
            for document in read_documents(self.folder / name):
                made = from_document(document)
                self.update_doc_stats(made)
                yield made


class Dedup(PipelineStep):
    """Dedup in the middle of a pipeline of one task: takes all documents, yields those that are kept.

    folder, steps, workers: as in DedupShards; the folder keeps the run, which a second run goes on from.
    """

    type = "DEDUP"
    name = "herdkern"

    def __init__(self, folder: str | Path, steps: Sequence[Config], *, workers: int = 1):
        super().__init__()
        self.write, self.read = WriteShard(folder), ReadShard(folder)
        self.dedup = DedupShards(folder, steps, num_shards=1, workers=workers)
        self.dedup.stats = self.read.stats = self.write.stats = self.stats

    def run(self, data: Iterable[TroveDocument], rank: int = 0, world_size: int = 1) -> Iterator[TroveDocument]:
        """The documents that are kept. Raises: ValueError with more than one task."""
        if world_size != 1:
            raise ValueError(
                f"Dedup: world_size must be 1, got {world_size}; with many tasks use WriteShard, DedupShards, ReadShard"
            )
        yield from self.write.run(data)
        yield from self.dedup.run(())
        yield from self.read.run()
