"""URL dedup over the whole data set: of every URL the most recent version is kept.

Source: The Llama 3 Herd of Models, section 3.1.1 (arXiv:2407.21783). What counts as the same URL is decided here.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote_plus, urlsplit, urlunsplit

from herdkern.data.document import read_documents
from herdkern.dedup.drop import Decision, drop_documents, write_decisions
from herdkern.engine import Run, StageResult

TRACKING_PARAMETERS = (
    "utm_*", "fbclid", "gclid", "gclsrc", "dclid", "gbraid", "wbraid", "msclkid", "yclid", "twclid", "igshid", "mc_cid",
    "mc_eid", "_ga", "_gl", "_hsenc", "_hsmi", "mkt_tok", "oly_anon_id", "oly_enc_id", "vero_id", "wickedid", "ref_src",
    "phpsessid", "jsessionid", "sessionid", "session_id", "aspsessionid*", "cfid", "cftoken", "zenid",
)  # fmt: skip
_SESSION_IN_PATH = re.compile(r";(jsessionid|phpsessid|sid)=[^/?#]*", re.IGNORECASE)
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, kw_only=True)
class UrlDedupConfig:
    """What makes two URLs one.

    ignored_parameters: query parameters that do not count, in lower case, `*` matches anything.
    """

    ignored_parameters: tuple[str, ...] = TRACKING_PARAMETERS
    merge_schemes: bool = True  # http and https are one
    merge_trailing_slash: bool = True
    num_partitions: int = 4

    def __post_init__(self) -> None:
        if self.num_partitions < 1:
            raise ValueError(f"UrlDedupConfig: num_partitions must be at least 1, got {self.num_partitions}")


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
        plain = head.rstrip("/") + mark + query
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


def _key(url: str) -> str:
    return hashlib.blake2b(url.encode(), digest_size=16).hexdigest()


def _partition(inputs: list[Path], out: Path, config: UrlDedupConfig, num_partitions: int) -> dict[str, Any]:
    """One line [key, timestamp, length, id, row, URL] per document with a web address, by key."""
    num_urls = num_others = 0
    with contextlib.ExitStack() as stack:
        names = [out / f"part-{p:05d}" for p in range(num_partitions)]
        files = [stack.enter_context(open(name, "w", encoding="utf-8", newline="\n")) for name in names]
        for row, document in enumerate(read_documents(inputs[0])):
            url = canonical_url(document.url, config)
            if not url:
                num_others += 1
                continue
            num_urls += 1
            key = _key(url)
            record = [key, document.timestamp, len(document.text), document.id, row, document.url]
            files[int(key[:8], 16) % num_partitions].write(json.dumps(record) + "\n")
    return {"urls": num_urls, "documents_without_url": num_others}


def _keep_newest(inputs: list[Path], out: Path, config: UrlDedupConfig) -> dict[str, Any]:
    """For each shard, drop-<shard>: its documents of which a newer, longer or smaller-id version exists."""
    best: dict[str, tuple[int, int, str, int, int, str]] = {}
    for shard, path in enumerate(inputs):
        for key, timestamp, length, id_, row, url in _read_records(path):
            entry = (-timestamp, -length, id_, shard, row, url)
            if key not in best or entry < best[key]:
                best[key] = entry
    num_dropped = 0
    for shard, path in enumerate(inputs):
        decisions = []
        for key, _, _, _, row, _ in _read_records(path):
            kept = best[key]
            if kept[3:5] != (shard, row):
                meta = {"kept_id": kept[2], "kept_url": kept[5], "kept_timestamp": -kept[0]}
                decisions.append(Decision(row=row, reason="duplicate_url", meta=meta))
        num_dropped += len(decisions)
        write_decisions(out / f"drop-{shard:05d}", decisions)
    return {"distinct_urls": len(best), "duplicate_urls": num_dropped}


def _read_records(path: Path) -> list[list[Any]]:
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


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
    return run.map(name, drop_documents, shards, config=config)
