"""URL dedup once more in plain Python, for the tests: the records of a shard, who is kept, the files."""

import struct

from herdkern.data.document import DocumentWriter, read_documents, with_meta
from herdkern.dedup import canonical_url
from herdkern.dedup.urls import url_keys


def records(path, config, num_partitions):
    """[(records.bin, names.bin)] of every partition."""
    parts = [[b"", b""] for _ in range(num_partitions)]
    documents = list(read_documents(path))
    keys, is_web = url_keys([document.url for document in documents], config)
    for row, (document, (low, high), found) in enumerate(zip(documents, keys.tolist(), is_web, strict=True)):
        if not found:
            continue
        part = parts[(low >> 32) * num_partitions >> 32]
        id_, url = document.id.encode(), document.url.encode()
        prefix = int.from_bytes(id_[:8].ljust(8, b"\0"), "big")
        part[0] += struct.pack("<QQqIIQQ", low, high, document.timestamp, len(document.text), row, prefix, len(part[1]))
        part[1] += struct.pack("<II", len(id_), len(url)) + id_ + url
    return [tuple(part) for part in parts]


def dedup(paths, folder, config):
    """[(documents.jsonl.zst, dropped.jsonl.zst)] of every shard, as dedup_urls writes them."""
    shards = [list(read_documents(path)) for path in paths]
    best = {}
    for shard, documents in enumerate(shards):
        for row, document in enumerate(documents):
            if form := canonical_url(document.url, config):
                order = (-document.timestamp, -len(document.text), document.id, shard, row)
                if form not in best or order < best[form][0]:
                    best[form] = (order, document)
    written = []
    for shard, documents in enumerate(shards):
        paths = [folder / f"twin-{shard}-{name}.jsonl.zst" for name in ("kept", "dropped")]
        with DocumentWriter(paths[0]) as kept_writer, DocumentWriter(paths[1]) as dropped_writer:
            for row, document in enumerate(documents):
                order, kept = best.get(canonical_url(document.url, config), (None, None))
                if order is None or order[3:] == (shard, row):
                    kept_writer.write(document)
                else:
                    meta = {"kept_id": kept.id, "kept_url": kept.url, "kept_timestamp": kept.timestamp}
                    dropped_writer.write(with_meta(document, **meta), reason="duplicate_url")
        written.append(paths)
    return written
