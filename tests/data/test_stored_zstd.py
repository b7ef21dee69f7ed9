"""A stored zstd frame holds what was given, for any reader of zstd."""

import io
import random

import pytest
import zstandard

from herdkern.data.decompress import read_chunks
from herdkern.data.document import Document, DocumentWriter, read_documents
from herdkern.data.stored_zstd import StoredFrame


@pytest.mark.parametrize("sizes", [[], [0], [1], [1 << 17], [(1 << 17) + 1, 5, 0, 400_000]])
def test_any_reader_gets_back_what_was_given(tmp_path, sizes):
    data = [random.Random(i).randbytes(size) for i, size in enumerate(sizes)]
    frame = StoredFrame()
    path = tmp_path / "x.zst"
    half = len(data) // 2
    path.write_bytes(b"".join([*frame.blocks(data[:half]), *frame.blocks(map(memoryview, data[half:])), frame.flush()]))
    assert zstandard.ZstdDecompressor().stream_reader(io.BytesIO(path.read_bytes())).read() == b"".join(data)
    assert b"".join(read_chunks(path)) == b"".join(data)
    assert path.stat().st_size <= sum(sizes) + 9 + 3 * (len(sizes) + sum(sizes) // (1 << 17))


@pytest.mark.parametrize("level", [0, 1, 3, 19])
def test_documents_are_the_same_at_every_level(tmp_path, level):
    documents = [Document(id=str(i), text="text " * i, record="r") for i in range(300)]
    with DocumentWriter(tmp_path / "d.jsonl.zst", level=level) as writer:
        for document in documents:
            writer.write(document)
    assert list(read_documents(tmp_path / "d.jsonl.zst")) == documents
