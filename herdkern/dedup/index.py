"""An index of what was kept, against which new crawls are deduplicated without reading the old texts again.

The folder holds index.json (version, rules, segments) and one folder per run that added to it. A segment has the kept
documents of that run in keep order: signatures, columns, names, the band records sorted by key, and with verification
"exact" the shingle sets. Segments are never changed; a new one counts when index.json, replaced as a whole, names it.

The rule: documents in the index stay, whatever comes. The new documents are gone through in keep order, and one is
dropped for the first of the index (oldest segment first) or of the kept new ones that it is similar to. So adding in
parts gives what one run over everything gives if the keep policy ranks every document of an earlier part before those
of a later part and verification is not "none" (where a new document may connect two old ones, which both stay).
"""

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from herdkern import _text
from herdkern.dedup import cluster_stages as stages
from herdkern.dedup.arrays import load_array, read_array
from herdkern.dedup.documents import DedupRun, MinHashConfig, Segment, dedup_against
from herdkern.dedup.sign_stage import BATCH_BYTES, DOCUMENTS, NAMES, ORDER, SIGNATURES
from herdkern.dedup.signature_file import SignatureFile, write_signatures
from herdkern.engine import Run, StageResult, read_json, write_json_atomic
from herdkern.engine.shards import describe, remove_folder, seal_folder, sync_folder

logger = logging.getLogger(__name__)

INDEX_VERSION = 1
INDEX = "index.json"


def read_index(index: Path | str, config: MinHashConfig) -> list[Segment]:
    """The segments of an index, checked against their hashes.

    Raises: OSError if it is missing; ValueError naming the file if it is of another version or damaged, or naming the
    settings in which it differs from `config`.
    """
    index = Path(index)
    path = index / INDEX
    values = read_json(path)
    if not isinstance(values, dict) or values.get("version") != INDEX_VERSION:
        raise ValueError(f"read_index: {path} must be an index of version {INDEX_VERSION}; make it anew")
    wanted = {"spec": config.spec, **config.rules}
    held = values["rules"]
    other = [f"{key}={held.get(key)!r} (asked for {wanted.get(key)!r})" for key in sorted({*wanted, *held})
             if held.get(key) != wanted.get(key)]  # fmt: skip
    if other:
        raise ValueError(f"read_index: {index} was made with {', '.join(other)}; use those settings or a new index")
    segments = []
    first = 0
    for entry in values["segments"]:
        folder = index / entry["name"]
        if describe(folder).sha256 != entry["sha256"]:
            raise ValueError(f"read_index: the segment {folder} is damaged: it differs from what {INDEX} says")
        segments.append(Segment(folder=folder, first=first, num_docs=entry["num_docs"]))
        first += entry["num_docs"]
    return segments


def _kept_rows(found: DedupRun, shard: int, num_docs: int) -> NDArray[Any]:
    is_kept = np.ones(num_docs, bool)
    for folder in found.resolved:
        decisions = stages.shard_decisions(folder, shard)
        dropped = decisions["place"][decisions["reason"] != stages.KEPT]
        is_kept[(dropped & np.uint64(0xFFFFFFFF)).astype(np.int64)] = False
    return is_kept


def _kept_in_order(found: DedupRun) -> tuple[NDArray[Any], NDArray[Any]]:
    """(shard, row) of all kept documents of a run, in keep order."""
    orders = [load_array(folder / ORDER, np.uint32) for folder in found.signed]
    kept = [_kept_rows(found, shard, len(order)) for shard, order in enumerate(orders)]
    shards = read_array(found.numbered / "shards", np.uint32)
    rows = np.empty(len(shards), np.uint32)
    for shard, order in enumerate(orders):
        rows[shards == shard] = order
    is_kept = np.empty(len(shards), bool)
    for shard in range(len(orders)):
        mine = shards == shard
        is_kept[mine] = kept[shard][rows[mine]]
    return shards[is_kept], rows[is_kept]


class _Spool:
    """The kept documents of a run with their signatures and names, dealt to files by their place in keep order: whoever
    reads the files one after the other has them in that order, holding one file's at a time."""

    def __init__(self, folder: Path, num_docs: int, signature: np.dtype[Any], config: MinHashConfig):
        width = config.num_bands * config.rows_per_band
        fields = [("place", "<u8"), ("name", "<u8"), ("document", stages.DOCUMENT), ("signature", signature, (width,))]
        self.record = np.dtype(fields)  # name: where the names begin in the file of names
        self.part_docs = max(1 << 10, config.native_bytes // 4 // self.record.itemsize)
        self.paths = [folder / f"spool-{part:05d}" for part in range(-(-num_docs // self.part_docs))]
        self.name_bytes = [0] * len(self.paths)

    def add(self, places: NDArray[np.int64], documents: NDArray[Any], signed: NDArray[Any], names: list[bytes]) -> None:
        """Documents that are to stand at `places`."""
        records = np.zeros(len(places), self.record)
        records["place"], records["document"], records["signature"] = places, documents, signed
        part_of = places // self.part_docs
        for part in np.unique(part_of).tolist():
            mine = np.flatnonzero(part_of == part)
            texts = [names[i] for i in mine.tolist()]
            sizes = np.array([len(text) for text in texts], np.uint64)
            records["name"][mine] = np.cumsum(sizes) - sizes + np.uint64(self.name_bytes[part])
            self.name_bytes[part] += int(sizes.sum())
            for suffix, data in ((".records", records[mine].tobytes()), (".names", b"".join(texts))):
                with open(f"{self.paths[part]}{suffix}", "ab") as f:
                    f.write(data)

    def parts(self) -> Iterator[tuple[NDArray[Any], bytes]]:
        """(records, names) in order; what was read is deleted."""
        for path in self.paths:
            records = read_array(Path(f"{path}.records"), self.record)
            records = records[np.argsort(records["place"])]
            held = read_array(Path(f"{path}.names"), np.uint8).tobytes()
            sizes = records["document"]["id_bytes"].astype(np.int64) + records["document"]["url_bytes"]
            begins = records["name"].astype(np.int64)
            names = b"".join(held[a:b] for a, b in zip(begins.tolist(), (begins + sizes).tolist(), strict=True))
            yield records, names
            for suffix in (".records", ".names"):
                Path(f"{path}{suffix}").unlink()


def _spool_shard(spool: _Spool, folder: Path, places: NDArray[np.int64], config: MinHashConfig) -> None:
    """The documents of a shard. places: of every row its place in keep order, -1 for those that went."""
    held = stages.load_rows(folder)
    ends = np.cumsum(held["id_bytes"].astype(np.int64) + held["url_bytes"])
    begin = 0
    with SignatureFile(folder / SIGNATURES, config.spec) as file, open(folder / NAMES, "rb") as names:
        for block in file.batches(BATCH_BYTES):
            end = begin + len(block)
            first = int(ends[begin - 1]) if begin else 0
            cuts = [0, *(ends[begin:end] - first).tolist()]
            data = read_array(names, np.uint8, cuts[-1]).tobytes()
            kept = np.flatnonzero(places[begin:end] >= 0)
            texts = [data[cuts[i] : cuts[i + 1]] for i in kept.tolist()]
            if len(kept):
                spool.add(places[begin + kept], held[begin + kept], block[kept], texts)
            begin = end


def write_segment(found: DedupRun, out: Path, config: MinHashConfig) -> int:
    """The kept documents of a run as a segment in the fresh folder `out`; returns their number."""
    shards, rows = _kept_in_order(found)
    num_docs = len(rows)
    dtype = np.dtype(np.uint32)
    for folder in found.signed[:1]:
        with SignatureFile(folder / SIGNATURES, config.spec) as file:
            dtype = file.dtype
    spool = _Spool(out, num_docs, dtype, config)
    for shard, folder in enumerate(found.signed):
        mine = np.flatnonzero(shards == shard)
        places = np.full(len(stages.load_rows(folder)), -1, np.int64)
        places[rows[mine]] = mine
        _spool_shard(spool, folder, places, config)
    partitioner = _text.BandPartitioner(str(out), 1, config.native_bytes // 4)

    def parts(documents: IO[bytes], names: IO[bytes]) -> Iterator[NDArray[Any]]:
        for records, data in spool.parts():
            rows, signed = records["document"].copy(), np.ascontiguousarray(records["signature"])
            rows["is_old"] = 1
            documents.write(rows.tobytes())
            names.write(data)
            columns = records["place"].copy(), rows["group"].copy(), rows["text_low"].copy()
            partitioner.add_signatures(signed, config.num_bands, config.rows_per_band, *columns)
            yield signed

    with open(out / DOCUMENTS, "wb") as documents, open(out / NAMES, "wb") as names:
        header = {"descr": np.lib.format.dtype_to_descr(stages.DOCUMENT), "fortran_order": False, "shape": (num_docs,)}
        np.lib.format.write_array_header_1_0(documents, header)
        write_signatures(out / SIGNATURES, config.spec, parts(documents, names))
    partitioner.finish()
    _text.merge_band_runs(str(out / "part-00000"), str(out / stages.BANDS), config.native_bytes // 2)
    (out / "part-00000").unlink()
    if config.verify == "exact":
        _write_shingles(found, shards, rows, out, config)
    return num_docs


def _write_shingles(
    found: DedupRun, shards: NDArray[np.uint32], rows: NDArray[np.uint32], out: Path, config: MinHashConfig
) -> None:
    """The shingle sets of the documents, one behind the other, and where each begins; the texts are read again."""
    sizes = np.zeros(len(rows) + 1, np.int64)
    parts = []  # of each shard: a file of its own, put in order afterwards
    for shard, folder in enumerate(found.signed):
        mine = np.flatnonzero(shards == shard)
        mine = mine[np.argsort(rows[mine], kind="stable")]
        num_docs = len(stages.load_rows(folder))
        lengths = []
        with open(out / f"shingles-{shard:05d}", "wb") as f:
            members = rows[mine].astype(np.int64)
            for _, values, begins in stages.batches_of_shingles(found.files[shard], num_docs, members, config):
                for begin, end in pairwise(begins.tolist()):
                    unique = np.unique(values[begin:end])
                    f.write(unique.tobytes())
                    lengths.append(len(unique))
        sizes[mine + 1] = lengths
        begins = np.zeros(len(rows), np.int64)
        begins[mine] = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if lengths else []
        parts.append(begins)
    (out / f"{stages.SHINGLES}.begins").write_bytes(np.cumsum(sizes).tobytes())
    with contextlib.ExitStack() as stack, open(out / stages.SHINGLES, "wb") as joined:
        files = [stack.enter_context(open(out / f"shingles-{i:05d}", "rb")) for i in range(len(parts))]
        for place, shard in enumerate(shards.tolist()):
            files[shard].seek(8 * int(parts[shard][place]))
            joined.write(read_array(files[shard], np.uint64, int(sizes[place + 1])).tobytes())
    for i in range(len(parts)):
        (out / f"shingles-{i:05d}").unlink()


def _add_segment(index: Path, segments: Sequence[Segment], found: DedupRun, config: MinHashConfig) -> None:
    """Add what was kept as a segment; nothing, and say so, if nothing was and there are segments."""
    index.mkdir(parents=True, exist_ok=True)
    values = read_json(index / INDEX) if segments or (index / INDEX).exists() else None
    entries = list(values["segments"]) if values else []
    temporary = index / f"segment.{secrets.token_hex(6)}.tmp"
    temporary.mkdir()
    try:
        num_docs = write_segment(found, temporary, config)
        if not num_docs and entries:
            logger.warning("add_to_index: %s has all of these documents, or copies of them; nothing was added", index)
            shutil.rmtree(temporary)
            return
        seal_folder(temporary)
        name = f"segment-{len(entries):05d}"
        remove_folder(index / name)  # of a run that ended before index.json named it
        os.rename(temporary, index / name)
        sync_folder(index)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    entries.append({"name": name, "num_docs": num_docs, "sha256": describe(index / name).sha256})
    rules = {"spec": config.spec, **config.rules}
    write_json_atomic(index / INDEX, {"version": INDEX_VERSION, "rules": rules, "segments": entries})


def save_index(
    run: Run,
    index: Path | str,
    inputs: Sequence[Path],
    config: MinHashConfig | None = None,
    *,
    name: str = "dedup_minhash",
) -> StageResult:
    """`dedup_minhash`, and an index of what it kept. After `dedup_minhash` in the same run only the index is made.

    Raises: FileExistsError if there is an index already; otherwise as `dedup_minhash`.
    """
    index, config = Path(index), config or MinHashConfig()
    if (index / INDEX).exists():
        raise FileExistsError(f"save_index: index must be a new folder, got {index}; use add_to_index")
    result, found = dedup_against(run, [], inputs, config, name=name)
    _add_segment(index, [], found, config.within(run.max_memory))
    return result


def add_to_index(
    run: Run,
    index: Path | str,
    inputs: Sequence[Path],
    config: MinHashConfig | None = None,
    *,
    name: str = "dedup_add",
) -> StageResult:
    """Deduplicate new documents against an index and among each other, and add those that are kept to the index.

    run: with a folder of its own for every crawl.  config: as of the index, but for max_memory and write_dropped.
    The result is that of `dedup_minhash`. A crawl that is in the index already loses all its documents to it; the index
    then stays as it is, and a warning is logged.
    Raises: ValueError naming the settings in which the index differs, or what is damaged; OSError if it is missing.
    """
    index, config = Path(index), config or MinHashConfig()
    segments = read_index(index, config)
    result, found = dedup_against(run, segments, inputs, config, name=name)
    _add_segment(index, segments, found, config.within(run.max_memory))
    return result
