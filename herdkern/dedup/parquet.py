"""Documents as Parquet beside their JSON lines: a column for each field, `meta` as a text of JSON."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from herdkern.data.document import Document, read_documents
from herdkern.engine import atomic_file

BATCH_CHARS = 8 << 20
_TEXTS = ("id", "text", "url", "source", "lang", "record")


def write_parquet(path: Path, documents: Iterator[Document]) -> int:
    """Write documents to a Parquet file (zstd), completely or not at all; returns how many they were.

    Raises: ImportError naming the extra if pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"write_parquet: needs pyarrow ({error}); pip install 'herdkern[parquet]'") from error
    columns = [*((name, pyarrow.large_string()) for name in _TEXTS), ("timestamp", pyarrow.int64())]
    schema = pyarrow.schema([*columns, ("meta", pyarrow.string())])
    count = held_chars = 0
    held: list[dict[str, Any]] = []
    with atomic_file(path) as file, pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for document in documents:
            row: dict[str, Any] = {name: getattr(document, name) for name in (*_TEXTS, "timestamp")}
            row["meta"] = json.dumps(document.meta, ensure_ascii=False, sort_keys=True)
            held.append(row)
            count += 1
            held_chars += len(document.text)
            if held_chars >= BATCH_CHARS:
                writer.write_table(pyarrow.Table.from_pylist(held, schema=schema))
                held, held_chars = [], 0
        if held:
            writer.write_table(pyarrow.Table.from_pylist(held, schema=schema))
    return count


def to_parquet(inputs: list[Path], out: Path, config: Any) -> dict[str, Any]:
    """Stage: documents.parquet of one document file."""
    del config
    return {"parquet_documents": write_parquet(out / "documents.parquet", read_documents(inputs[0]))}
