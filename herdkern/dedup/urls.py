"""URL dedup over the whole data set: of every URL the most recent version is kept.

Source: The Llama 3 Herd of Models, section 3.1.1 (arXiv:2407.21783). What counts as the same URL is decided here.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote_plus, urlsplit, urlunsplit

import numpy as np
from numpy.typing import NDArray

from herdkern import _text
from herdkern.dedup.arrays import read_array
from herdkern.dedup.drop import LineWriter
from herdkern.dedup.line_files import read_chunks
from herdkern.dedup.pieces import line_reader, read_pieces
from herdkern.engine import Run, StageResult, code_version

TRACKING_PARAMETERS = (
    "utm_*", "fbclid", "gclid", "gclsrc", "dclid", "gbraid", "wbraid", "msclkid", "yclid", "twclid", "igshid", "mc_cid",
    "mc_eid", "_ga", "_gl", "_hsenc", "_hsmi", "mkt_tok", "oly_anon_id", "oly_enc_id", "vero_id", "wickedid", "ref_src",
    "phpsessid", "jsessionid", "sessionid", "session_id", "aspsessionid*", "cfid", "cftoken", "zenid",
)  # fmt: skip
_SESSION_IN_PATH = re.compile(r";(jsessionid|phpsessid|sid)=[^/?#]*", re.IGNORECASE)
_DEFAULT_PORTS = {"http": 80, "https": 443}
TABLE_BYTES_PER_URL = 24  # 20 bytes a slot, at most 0.85 full
# What is exchanged: 48 bytes, csrc/text/url_table.h. name: where id and URL lie in names.bin.
RECORD = np.dtype(
    [("low", "<u8"), ("high", "<u8"), ("timestamp", "<i8"), ("length", "<u4"), ("row", "<u4"), ("id_prefix", "<u8"),
     ("name", "<u8")]
)  # fmt: skip
_CHUNK_RECORDS, _CHUNK_DECISIONS = 1 << 14, 1 << 14
BATCH_BYTES = 4 << 20  # of documents whose records are written at a time
LEVEL = 3  # of zstd
_ASK, _HAS_KEY = 0, 1  # of _text.url_keys; 2 is an empty URL


@dataclass(frozen=True, kw_only=True)
class UrlDedupConfig:
    """What makes two URLs one.

    ignored_parameters: query parameters that do not count, in lower case, `*` matches anything.
    max_memory: bytes that a task may use for its table.
    """

    ignored_parameters: tuple[str, ...] = TRACKING_PARAMETERS
    merge_schemes: bool = True  # http and https are one
    merge_trailing_slash: bool = True
    num_partitions: int = 4
    max_memory: int = 1 << 30

    def __post_init__(self) -> None:
        if self.num_partitions < 1:
            raise ValueError(f"UrlDedupConfig: num_partitions must be at least 1, got {self.num_partitions}")
        if self.num_partitions > 256:
            raise ValueError(f"UrlDedupConfig: num_partitions must be at most 256, got {self.num_partitions}")
        if self.max_memory < 1 << 20:
            raise ValueError(f"UrlDedupConfig: max_memory must be at least 1 MiB in bytes, got {self.max_memory}")


def canonical_url(url: str, config: UrlDedupConfig | None = None) -> str:
    """The form of `url` that is equal for equal pages, or "" if it is no web address (it is then left alone).

    Scheme and host in lower case, host in IDNA without a last dot, no default port, user, fragment or ignored
    parameter, path without /./ and /../, percent-encoding only where needed and in capitals, query sorted.
    """
    from w3lib.url import canonicalize_url

    config = config or UrlDedupConfig()
    try:
        parts = urlsplit(url.strip())
        if parts.scheme.lower() not in _DEFAULT_PORTS or not parts.hostname:
            return ""
        plain = canonicalize_url(_strip(parts, config), keep_blank_values=True, keep_fragments=False)
    except ValueError:  # a port that is none, brackets that do not match, characters that UTF-8 cannot hold
        return ""
    if config.merge_trailing_slash and urlsplit(plain).path not in ("", "/"):
        head, mark, query = plain.partition("?")
        host, _, path = head.partition("://")[2].partition("/")
        plain = f"{plain[: plain.index('://')]}://{host}/{path.rstrip('/')}{mark}{query}"
    return plain


def _strip(parts: SplitResult, config: UrlDedupConfig) -> str:
    scheme = parts.scheme.lower()
    host = (parts.hostname or "").rstrip(".")
    host = f"[{host}]" if ":" in host else host
    if parts.port not in (None, _DEFAULT_PORTS[scheme]):
        host = f"{host}:{parts.port}"
    # cut as it stands: decoding would make one of values that are not UTF-8 (?q=%E9 and ?q=%E8 are two pages)
    query = "&".join(field for field in parts.query.split("&") if not _is_ignored(field, config))
    path = _SESSION_IN_PATH.sub("", parts.path) or "/"
    return urlunsplit(("http" if config.merge_schemes else scheme, host, path, query, ""))


def _is_ignored(field: str, config: UrlDedupConfig) -> bool:
    name = unquote_plus(field.partition("=")[0]).lower()
    return any(fnmatchcase(name, pattern) for pattern in config.ignored_parameters)


def native_rules(config: UrlDedupConfig) -> Any:
    """The rules as the native path knows them, None if a pattern asks for more than equality or a prefix."""
    names = [name for name in config.ignored_parameters if "*" not in name]
    prefixes = [name[:-1] for name in config.ignored_parameters if "*" in name]
    if any(re.search(r"[^a-z0-9_.-]", name) for name in names + prefixes):
        return None
    return _text.UrlRules(config.merge_schemes, config.merge_trailing_slash, names, prefixes)


def url_keys(
    urls: Sequence[str], config: UrlDedupConfig | None = None, *, num_threads: int = 1
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """(keys uint64 (n, 2), whether each is a web address): equal keys for equal canonical forms; 128 bits.

    URLs that need only simple rules never become Python objects; canonical_url has the last word on all others.
    """
    config = config or UrlDedupConfig()
    rules = native_rules(config)
    if rules is None:
        keys, found = np.zeros((len(urls), 2), np.uint64), np.zeros(len(urls), np.uint8)
    else:
        keys, found = _text.url_keys(urls, rules, num_threads)
    asked = np.flatnonzero(found == _ASK)
    if len(asked):
        forms = [canonical_url(urls[place], config) for place in asked.tolist()]
        keys[asked] = _text.hash_urls(forms)
        found[asked] = [bool(form) for form in forms]
    return keys, found == _HAS_KEY


def _partition(inputs: list[Path], out: Path, config: UrlDedupConfig, num_partitions: int) -> dict[str, Any]:
    """part-<p>/records.bin and names.bin: one record for each document with a web address, by key, in row order."""

    def canonical(url: bytes) -> bytes:
        return canonical_url(url.decode(), config).encode()

    documents = _text.UrlScanner(native_rules(config), canonical, num_partitions, *line_reader(inputs[0]))
    num_bytes = 0
    with ExitStack() as stack:
        files = []
        for p in range(num_partitions):
            folder = out / f"part-{p:05d}"
            folder.mkdir()
            files.append([stack.enter_context(open(folder / name, "wb")) for name in ("records.bin", "names.bin")])
        for piece, last in read_pieces(inputs[0], documents):
            documents.scan(piece, last)
            num_bytes += len(piece)
            if num_bytes >= BATCH_BYTES or last:
                for (record_file, name_file), (records, names) in zip(files, documents.take(), strict=True):
                    record_file.write(records)
                    name_file.write(names)
                num_bytes = 0
    return {"urls": documents.num_urls, "documents_without_url": documents.num_documents - documents.num_urls}


class _Pieces:
    """The records of one partition, shard after shard, numbered through."""

    def __init__(self, folders: Sequence[Path]):
        self.folders = folders
        sizes = [(folder / "records.bin").stat().st_size // RECORD.itemsize for folder in folders]
        self.firsts = [0, *np.cumsum(sizes, dtype=np.int64).tolist()]
        self.num_records = self.firsts[-1]
        if self.num_records >= 1 << 32:
            raise ValueError(
                f"dedup_urls: a partition must hold fewer than 2^32 URLs, got {self.num_records}; raise num_partitions"
            )

    def table(self, num_records: int, part: int, num_parts: int) -> Any:
        """An empty native table for the records of one part of all keys."""
        pieces = [
            (str(folder / "records.bin"), str(folder / "names.bin"), first, end)
            for folder, first, end in zip(self.folders, self.firsts[:-1], self.firsts[1:], strict=True)
        ]
        return _text.UrlTable(pieces, num_records, part, part + 1, num_parts)

    def chunks(self, shard: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """(number of the first, records) of a shard, in pieces."""
        for begin, records in read_chunks(self.folders[shard] / "records.bin", RECORD, _CHUNK_RECORDS):
            yield self.firsts[shard] + begin, records


@code_version(2)
def _keep_newest(inputs: list[Path], out: Path, config: UrlDedupConfig) -> dict[str, Any]:
    """For each shard, drop-<shard>: decisions about its documents that have a newer, longer or smaller-id version.

    More records than max_memory has room for are taken in several ranges of keys; for each the files are read anew.
    """
    part = int(inputs[0].name.removeprefix("part-")) if inputs else 0
    pieces = _Pieces(inputs)
    num_passes = max(1, math.ceil(pieces.num_records * TABLE_BYTES_PER_URL / config.max_memory))
    share = pieces.num_records / num_passes
    room = pieces.num_records if num_passes == 1 else int(share + 10 * math.sqrt(share) + 100)
    num_urls = num_dropped = 0
    for number in range(num_passes):
        table = pieces.table(room, part * num_passes + number, config.num_partitions * num_passes)
        for shard in range(len(inputs)):
            for first, records in pieces.chunks(shard):
                table.add(records.view(np.uint8), first)
        num_urls += table.num_urls()
        for shard in range(len(inputs)):
            with open(out / f"drop-{shard:05d}.{number}", "wb") as file:
                for first, records in pieces.chunks(shard):
                    winners = table.find(records.view(np.uint8), first)
                    lost = np.flatnonzero(winners != np.arange(first, first + len(records), dtype=np.uint32))
                    file.write(np.stack([records["row"][lost], winners[lost]], axis=1).tobytes())
                    num_dropped += len(lost)
    names = pieces.table(0, 0, 1)
    for shard in range(len(inputs)):
        files = [out / f"drop-{shard:05d}.{number}" for number in range(num_passes)]
        lost = np.concatenate([read_array(path, np.uint32) for path in files]).reshape(-1, 2)
        lost = lost[np.argsort(lost[:, 0])]
        with open(out / f"drop-{shard:05d}", "wb") as file:
            for begin in range(0, len(lost), _CHUNK_DECISIONS):
                file.write(names.decide(lost[begin : begin + _CHUNK_DECISIONS]))
        for path in files:
            path.unlink()
    return {"distinct_urls": num_urls, "duplicate_urls": num_dropped}


def _drop_urls(inputs: list[Path], out: Path, config: UrlDedupConfig) -> dict[str, Any]:
    """Stage function. inputs: a shard of documents, then the files of decisions about it."""
    documents = _text.UrlDealer([str(path) for path in inputs[1:]], *line_reader(inputs[0]))
    with (
        LineWriter(out / "documents.jsonl.zst", level=LEVEL) as kept_writer,
        LineWriter(out / "dropped.jsonl.zst", level=LEVEL) as dropped_writer,
    ):
        for piece, last in read_pieces(inputs[0], documents):
            kept, gone = documents.deal(piece, last)
            kept_writer.write_lines([kept])
            dropped_writer.write_lines([gone])
    counters: dict[str, int] = documents.counters
    num_dropped = counters["docs_in"] - counters["docs_out"]
    return {**counters, "dropped": {"duplicate_url": num_dropped} if num_dropped else {}}


def dedup_urls(
    run: Run, inputs: Sequence[Path], config: UrlDedupConfig | None = None, *, name: str = "dedup_urls"
) -> StageResult:
    """Keep one document per URL: the newest, of equally old ones the longest, then the one of smallest id.

    inputs: document files.  The result's task folders hold documents.jsonl.zst and dropped.jsonl.zst (reason
    "duplicate_url"), one task per input. Documents without a web address are kept.
    Raises: StageError if an input cannot be read.
    """
    config = config or UrlDedupConfig()
    newest = run.exchange(
        f"{name}.newest", _partition, _keep_newest, inputs, num_partitions=config.num_partitions, config=config
    )
    shards = [
        [path, *(task / f"drop-{shard:05d}" for task in newest.tasks)] for shard, path in enumerate(map(Path, inputs))
    ]
    return run.map(name, _drop_urls, shards, config=config)
