"""The first stage of document dedup: signatures of every shard, and columns of all that decides besides the text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from herdkern import _text
from herdkern.dedup.clusters import KeepPolicy
from herdkern.dedup.minhash_config import MinHashConfig
from herdkern.dedup.pieces import line_reader, read_pieces
from herdkern.dedup.signature_file import write_signatures
from herdkern.engine import code_version

BATCH_BYTES = 4 << 20  # of a file that is signed at a time
SIGNATURES, DOCUMENTS, NAMES, KEYS, ORDER = "signatures", "documents.npy", "names", "keys", "order.npy"
DOCUMENT = np.dtype(
    [
        ("id_high", "<u8"),  # the first 16 bytes of the id as two numbers that order as the bytes do
        ("id_low", "<u8"),
        ("id_hash", "<u8"),
        ("line_hash", "<u8"),  # of all that Document.to_json writes
        ("text_high", "<u8"),  # 128 bits of the text
        ("text_low", "<u8"),
        ("timestamp", "<i8"),
        ("length", "<i8"),  # characters
        ("score", "<f8"),  # -inf: none
        ("group", "<u8"),  # 0, or a hash of the language
        ("text_bytes", "<u8"),
        ("id_bytes", "<u4"),  # of the names, id and URL, in the file NAMES
        ("url_bytes", "<u4"),
        ("is_plain", "<u4"),  # its line is as Document.to_json writes it, so it can be copied
        ("is_old", "<u4"),  # kept by an earlier run, whatever comes
    ]
)


def _read(
    path: Path, config: MinHashConfig, plan: _text.SignPlan | None
) -> Iterator[tuple[NDArray[np.void], bytes, Any]]:
    columns = _text.DocumentColumns(plan, config.score_key, config.within_language, *line_reader(path))
    num_bytes = 0
    for piece, last in read_pieces(path, columns):
        columns.scan(piece, last)
        num_bytes += len(piece)
        if num_bytes >= BATCH_BYTES or last:
            rows, names, made = columns.take()
            yield rows.view(DOCUMENT).reshape(-1), names, made
            num_bytes = 0


def read_rows(path: Path, config: MinHashConfig) -> Iterator[tuple[NDArray[np.void], bytes, list[bytes]]]:
    """(rows of DOCUMENT, names, texts) of the documents of a file, about BATCH_BYTES of it at a time."""
    return _read(path, config, None)


def _descending(values: NDArray[Any]) -> NDArray[np.uint64]:
    """uint64 that order as the int64 or float64 `values` do from the largest to the smallest."""
    bits = np.ascontiguousarray(values).view(np.uint64)
    sign = np.uint64(1 << 63)
    if values.dtype.kind == "f":
        bits = np.where(bits & sign, ~bits, bits | sign)
    else:
        bits = bits ^ sign
    return ~bits


def sort_keys(rows: NDArray[np.void], keep: KeepPolicy) -> NDArray[np.uint64]:
    """What orders documents for keeping, the first kept: uint64 (num_docs, 8), compared number by number.

    The policy's values; then the first 16 bytes of the id, its hash, the hash of the whole document. Documents that
    agree in all this are equal; the shard whose documents' hash is smaller then comes first, and the earlier row in it.
    """
    newest, longest = _descending(rows["timestamp"]), _descending(rows["length"])
    none = np.zeros(len(rows), np.uint64)
    policy = {
        "newest": (newest, longest, none),
        "longest": (longest, newest, none),
        "best_score": (_descending(rows["score"]), newest, longest),
        "smallest_id": (none, none, none),
    }[keep]
    return np.stack([*policy, *(rows[name] for name in ("id_high", "id_low", "id_hash", "line_hash")), none], axis=1)


@code_version(2)
def sign(inputs: list[Path], out: Path, config: MinHashConfig) -> dict[str, Any]:
    """Stage: SIGNATURES, DOCUMENTS, NAMES of a shard; KEYS sorted, and ORDER, the rows in that order."""
    parts: list[NDArray[np.void]] = [np.zeros(0, DOCUMENT)]

    def batches() -> Iterator[NDArray[Any]]:
        with open(out / NAMES, "wb") as f:
            for rows, names, signed in _read(inputs[0], config, config.sign_plan):
                parts.append(rows)
                f.write(names)
                yield signed

    write_signatures(out / SIGNATURES, config.spec, batches())
    rows = np.concatenate(parts)
    np.save(out / DOCUMENTS, rows, allow_pickle=False)
    keys = sort_keys(rows, config.keep)
    order = np.lexsort(keys.T[::-1])
    keys[order].tofile(out / KEYS)
    np.save(out / ORDER, order.astype(np.uint32), allow_pickle=False)
    return {"signed_documents": len(rows), "signed_bytes": int(rows["text_bytes"].sum())}
