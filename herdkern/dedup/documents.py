"""Document dedup over the whole data set: exact copies by hash, near-duplicates by MinHash, one of each cluster kept.

Source: The Llama 3 Herd of Models, section 3.1.1 (arXiv:2407.21783), which gives no parameters; those here are ours.
Stages (docs/dedup.md explains them and their cost):
1. sign: signatures of every shard, and columns of all that decides besides the text.
2. number: the documents of all shards get numbers in the order in which they are to be kept.
3. bands: records (band key, number) on disk, dealt by key and sorted; documents of one key are linked.
4. components: what is linked, directly or through others.
5. members: the documents of every component come together; each is dropped for the first kept one it is similar to.
6. cluster: what was found, for people to read.  7. drop.
The result does not depend on the order of documents or shards, on threads, workers or memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herdkern.dedup import cluster_stages as stages
from herdkern.dedup.drop import drop_members
from herdkern.dedup.minhash_config import MinHashConfig
from herdkern.dedup.sign_stage import sign
from herdkern.engine import Run, StageResult

__all__ = ["MinHashConfig", "dedup_minhash"]

BAND_RECORDS = 1 << 22  # about so many in a partition of the bands
MEMBERS = 1 << 16  # and at most so many documents in one of the members
MAX_PARTITIONS = 512


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of an index: its folder, the first number of its documents, how many they are."""

    folder: Path
    first: int
    num_docs: int


@dataclass(frozen=True, kw_only=True)
class DedupRun:
    """What the stages of one dedup left: enough to make an index of."""

    files: list[Path]
    signed: list[Path]  # folders of `sign`
    numbered: Path
    labels: list[Path]
    resolved: list[Path]


def _partitions(count: int, size: int) -> int:
    return max(2, min(MAX_PARTITIONS, -(-count // size)))


def cluster_signed(
    run: Run,
    segments: Sequence[Segment],
    signed: Sequence[Path],
    config: MinHashConfig,
    *,
    name: str,
    files: Sequence[Path] = (),
) -> DedupRun:
    """The stages from numbers to decisions, with the documents of an index before those of the signed shards.

    files: the document files of the shards; needed for verification "exact", and for examples of what was found.
    """
    num_docs = sum(segment.num_docs for segment in segments)
    base: dict[str, Any] = {
        "config": config,
        "first": num_docs,
        "num_shards": len(signed),
        "offsets": {segment.folder.name: segment.first for segment in segments},
        "segments": [(segment.folder.name, segment.num_docs) for segment in segments],
    }
    numbered = run.once(f"{name}.number", stages.number, signed, config=base)
    num_docs += numbered.counters["numbered_documents"]
    numbers = [numbered.tasks[0] / f"numbers-{shard:05d}" for shard in range(len(signed))]
    old = [segment.folder for segment in segments]
    linked = run.exchange(
        f"{name}.bands",
        stages.partition_bands,
        stages.link_bands,
        [*([folder] for folder in old), *([a, b] for a, b in zip(signed, numbers, strict=True))],
        num_partitions=_partitions(num_docs * config.num_bands, BAND_RECORDS),
        config=base,
    )
    edges = linked.files(stages.EDGES)
    labelled = run.once(f"{name}.components", stages.components, [numbered.tasks[0], *edges], config=base)
    labels = [labelled.tasks[0] / f"labels-{shard:05d}" for shard in range(len(signed) + len(old))]
    groups = [[folder, label] for folder, label in zip(old, labels[len(signed) :], strict=True)]
    for shard, folder in enumerate(signed):
        groups.append([folder, labels[shard], numbers[shard], *files[shard : shard + 1]])
    members = run.exchange(
        f"{name}.members",
        stages.partition_members,
        stages.resolve_members,
        groups,
        num_partitions=_partitions(labelled.counters.get("linked_documents", 0), MEMBERS),
        config=base,
    )
    found = {**base, "candidate_pairs": linked.counters.get("candidate_pairs", 0), "has_files": len(files) > 0}
    run.once(f"{name}.cluster", stages.describe_clusters, [*members.tasks, *signed, *files], config=found)
    return DedupRun(
        files=list(files), signed=list(signed), numbered=numbered.tasks[0], labels=labels, resolved=members.tasks
    )


def dedup_against(
    run: Run, segments: Sequence[Segment], inputs: Sequence[Path], config: MinHashConfig, *, name: str
) -> tuple[StageResult, DedupRun]:
    """The stages of `dedup_minhash`, with the documents of an index before those of the inputs."""
    files = [Path(path) for path in inputs]
    signed = run.map(f"{name}.sign", sign, files, config=config)
    found = cluster_signed(run, segments, signed.tasks, config, name=name, files=files)
    shards = [[path, found.signed[i], found.labels[i], *found.resolved] for i, path in enumerate(files)]
    return run.map(name, drop_members, shards, config={"config": config, "level": config.compression_level}), found


def dedup_minhash(
    run: Run, inputs: Sequence[Path], config: MinHashConfig | None = None, *, name: str = "dedup_minhash"
) -> StageResult:
    """Keep one document of every cluster of exact copies and near-duplicates.

    inputs: document files.  The result's task folders, one per input, hold documents.jsonl.zst, dropped.jsonl.zst
    (reasons "exact_duplicate" and "near_duplicate"; meta names the kept document and the similarity to it) and
    clusters.npy, uint64 (num_docs,): the cluster of every document of the input, 0 for none.
    RUN/data/<name>.cluster/task-00000 holds clusters.jsonl, pairs.jsonl and sizes.json.
    Raises: StageError if an input cannot be read.
    """
    return dedup_against(run, [], inputs, config or MinHashConfig(), name=name)[0]
