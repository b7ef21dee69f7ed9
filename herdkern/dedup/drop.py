"""Decisions about documents, made where all of them are seen, carried out shard by shard."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from herdkern.data.document import DocumentWriter, read_documents, with_meta


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
