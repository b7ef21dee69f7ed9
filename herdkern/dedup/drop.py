"""Decisions about documents, made where all of them are seen, carried out shard by shard."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from herdkern import _text
from herdkern.data.decompress import CHUNK_BYTES
from herdkern.data.document import DocumentWriter
from herdkern.dedup.cluster_stages import DECISION, KEPT, REASONS, load_rows, shard_decisions
from herdkern.dedup.minhash_config import MinHashConfig
from herdkern.dedup.pieces import line_reader, read_pieces
from herdkern.dedup.sign_stage import NAMES

LEVEL = 1  # of zstd, for what the next stage reads, unless settings["level"] says another


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
