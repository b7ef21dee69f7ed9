"""Decisions about documents, made where all of them are seen, carried out shard by shard."""

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from herdkern import _text
from herdkern.data.decompress import CHUNK_BYTES
from herdkern.data.document import DocumentWriter, read_documents, with_meta
from herdkern.dedup.cluster_stages import DECISION, KEPT, REASONS, load_rows, shard_decisions
from herdkern.dedup.minhash_config import MinHashConfig
from herdkern.dedup.pieces import line_reader, read_pieces
from herdkern.dedup.sign_stage import NAMES

LEVEL = 1  # of zstd, for what the next stage reads, unless settings["level"] says another


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

    def write_lines(self, parts: Iterable[bytes | memoryview]) -> None:
        """Append whole lines that `write` would have written, in parts that may begin and end anywhere."""
        for part in parts:
            if part:
                self._pending.append(part)
                self._pending_bytes += len(part)
        if self._pending_bytes >= CHUNK_BYTES:
            self._flush()


def drop_members(inputs: list[Path], out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Stage: carry out the decisions of `resolve_members`. inputs: [documents, signed shard, its labels, resolved, …].

    Writes documents.jsonl.zst, dropped.jsonl.zst (unless it is not wanted) and clusters.npy.
    """
    config: MinHashConfig = settings["config"]
    level = settings.get("level", LEVEL)
    path, rows = inputs[0], load_rows(inputs[1])
    shard = int(inputs[2].name.rpartition("-")[2])
    dealer = _text.DocumentDealer(rows["is_plain"].astype(np.uint8), config.write_dropped, *line_reader(path))
    clusters = np.zeros(len(rows), np.uint64)
    is_dropped = np.zeros(len(rows), bool)
    reasons = [REASONS.get(number, "") for number in range(max(REASONS) + 1)]
    dropped: dict[str, int] = {}
    for folder in inputs[3:]:
        decisions = shard_decisions(folder, shard)
        in_shard = (decisions["place"] & np.uint64(0xFFFFFFFF)).astype(np.int64)
        clusters[in_shard] = decisions["cluster"]
        goes = decisions["reason"] != KEPT
        decisions, in_shard = decisions[goes], in_shard[goes]
        is_dropped[in_shard] = True
        dealer.drop(in_shard, decisions.view(np.uint8).reshape(-1, DECISION.itemsize), reasons, str(folder / NAMES))
        for reason in REASONS:
            if count := int((decisions["reason"] == reason).sum()):
                dropped[REASONS[reason]] = dropped.get(REASONS[reason], 0) + count
    np.save(out / "clusters.npy", clusters, allow_pickle=False)
    with contextlib.ExitStack() as stack:
        kept_writer = stack.enter_context(LineWriter(out / "documents.jsonl.zst", level=level))
        aside = LineWriter(out / "dropped.jsonl.zst", level=level) if config.write_dropped else None
        if aside is not None:
            stack.enter_context(aside)
        for piece, last in read_pieces(path, dealer):
            kept, gone = dealer.deal(piece, last)
            kept_writer.write_lines(kept)
            if aside is not None:
                aside.write_lines([gone])
        if dealer.num_documents != len(rows):
            raise ValueError(f"drop_members: {path} must hold {len(rows)} documents as when signed, got another number")
    text_bytes = rows["text_bytes"].astype(np.int64)
    return {
        "docs_in": len(rows),
        "docs_out": len(rows) - int(is_dropped.sum()),
        "bytes_in": int(text_bytes.sum()),
        "bytes_out": int(text_bytes[~is_dropped].sum()),
        "dropped": dropped,
    }
