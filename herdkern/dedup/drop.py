"""Decisions about documents, made where all of them are seen, carried out shard by shard."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from herdkern import _text
from herdkern.data.decompress import CHUNK_BYTES
from herdkern.data.document import Document, DocumentWriter, document_kind, read_documents, with_meta
from herdkern.dedup.cluster_stages import (
    COPY_LINES,
    HAND_OUT_LINE,
    REASONS,
    SKIP_LINE,
    kept_names,
    load_rows,
    shard_decisions,
)
from herdkern.dedup.minhash_config import MinHashConfig
from herdkern.dedup.sign_stage import line_document, read_pieces


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Drop the document at `row` of a shard for `reason`; `meta` is what was measured."""

    row: int
    reason: str
    meta: dict[str, Any] = field(default_factory=dict)


def write_decisions(path: Path, decisions: Iterable[Decision]) -> None:
    """Write the decisions about one shard in row order, one JSON object a line."""
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        for decision in sorted(decisions, key=lambda d: d.row):
            line = {"row": decision.row, "reason": decision.reason, "meta": decision.meta}
            f.write(json.dumps(line, ensure_ascii=True, sort_keys=True) + "\n")


def read_decisions(paths: Iterable[Path]) -> dict[int, Decision]:
    """The decisions in several files about one shard, by row."""
    decisions: dict[int, Decision] = {}
    for path in paths:
        with open(path, encoding="utf-8") as f:
            for line in f:
                decision = Decision(**json.loads(line))
                decisions[decision.row] = decision
    return decisions


def drop_documents(inputs: list[Path], out: Path, config: Any) -> dict[str, Any]:
    """Stage function: carry out decisions. inputs: a shard of documents, then the files of decisions about it.

    Writes out/documents.jsonl.zst and out/dropped.jsonl.zst (with "reason" and, in meta, what was measured).
    """
    decisions = read_decisions(inputs[1:])
    dropped: dict[str, int] = {}
    num_documents = 0
    with (
        DocumentWriter(out / "documents.jsonl.zst") as kept_writer,
        DocumentWriter(out / "dropped.jsonl.zst") as dropped_writer,
    ):
        for row, document in enumerate(read_documents(inputs[0])):
            num_documents += 1
            decision = decisions.get(row)
            if decision is None:
                kept_writer.write(document)
            else:
                dropped_writer.write(with_meta(document, **decision.meta), reason=decision.reason)
                dropped[decision.reason] = dropped.get(decision.reason, 0) + 1
    return {
        "docs_in": num_documents,
        "docs_out": kept_writer.num_documents,
        "bytes_in": kept_writer.text_bytes + dropped_writer.text_bytes,
        "bytes_out": kept_writer.text_bytes,
        "dropped": dropped,
    }


class LineWriter(DocumentWriter):
    """A DocumentWriter that also takes lines as they are."""

    def write_lines(self, lines: bytes) -> None:
        """Append whole lines that `write` would have written."""
        self._pending.append(lines)
        self._pending_bytes += len(lines)
        if self._pending_bytes >= CHUNK_BYTES:
            self._flush()


def _decisions(folders: list[Path], shard: int) -> Iterator[tuple[NDArray[np.void], list[tuple[str, str]]]]:
    for folder in folders:
        decisions = shard_decisions(folder, shard)
        if len(decisions):
            yield decisions, kept_names(folder, decisions)


def drop_members(inputs: list[Path], out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Stage: carry out the decisions of `resolve_members`. inputs: [documents, signed shard, its labels, resolved, …].

    Writes documents.jsonl.zst, dropped.jsonl.zst (unless it is not wanted) and clusters.npy.
    """
    config: MinHashConfig = settings["config"]
    path, rows = inputs[0], load_rows(inputs[1])
    clusters = np.zeros(len(rows), np.uint64)
    dropped: dict[int, tuple[int, str, str, float]] = {}  # row -> reason, id and URL of the kept one, similarity to it
    for decisions, names in _decisions(inputs[3:], int(inputs[2].name.rpartition("-")[2])):
        in_shard = (decisions["place"] & np.uint64(0xFFFFFFFF)).astype(np.int64)
        clusters[in_shard] = decisions["cluster"]
        values = zip(in_shard.tolist(), decisions[["reason", "similarity"]].tolist(), names, strict=True)
        dropped |= {row: (reason, *name, similarity) for row, (reason, similarity), name in values if reason}
    np.save(out / "clusters.npy", clusters, allow_pickle=False)
    is_dropped = np.zeros(len(rows), bool)
    is_dropped[list(dropped)] = True
    with contextlib.ExitStack() as stack:
        kept_writer = LineWriter(out / "documents.jsonl.zst")
        stack.enter_context(kept_writer)
        aside = stack.enter_context(DocumentWriter(out / "dropped.jsonl.zst")) if config.write_dropped else None
        for segment in _segments(path, rows, is_dropped, aside is not None):
            if isinstance(segment, bytes):
                kept_writer.write_lines(segment)
            elif segment[0] not in dropped:
                kept_writer.write(segment[1])
            elif aside is not None:
                reason, kept_id, kept_url, similarity = dropped[segment[0]]
                meta = {"kept_id": kept_id, "kept_url": kept_url, "similarity": round(similarity, 6)}
                aside.write(with_meta(segment[1], **meta), reason=REASONS[reason])
    reasons = [REASONS[entry[0]] for entry in dropped.values()]
    text_bytes = rows["text_bytes"].astype(np.int64)
    return {
        "docs_in": len(rows),
        "docs_out": len(rows) - len(dropped),
        "bytes_in": int(text_bytes.sum()),
        "bytes_out": int(text_bytes[~is_dropped].sum()),
        "dropped": {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)},
    }


def _segments(
    path: Path, rows: NDArray[np.void], is_dropped: NDArray[np.bool_], with_dropped: bool
) -> Iterator[bytes | tuple[int, Document]]:
    """Lines that are kept as they are, and (row, document) of all else that is wanted, in order."""
    if document_kind(path) != "jsonl":
        yield from ((row, document) for row, document in enumerate(read_documents(path)))
        return
    kept = np.where(rows["is_plain"] != 0, COPY_LINES, HAND_OUT_LINE)
    actions = np.where(is_dropped, HAND_OUT_LINE if with_dropped else SKIP_LINE, kept).astype(np.uint8)
    lines = _text.DocumentLines("", False)
    for piece, last in read_pieces(path, lines):
        for segment in lines.deal(piece, last, actions):
            if isinstance(segment, bytes):
                yield segment
            else:
                yield segment[0], line_document(segment[2], path, segment[1])
    if lines.num_documents != len(rows):
        raise ValueError(f"drop_members: {path} must hold {len(rows)} documents as when signed, got another number")
