"""Crawls a site on loopback into WARC files, breadth first in a fixed order: the same site gives the same bytes.

It has no delays and asks no robots.txt, so it refuses hosts that are not loopback; give WARC files of the web as input.
"""

import http.client
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urljoin, urlsplit

from selectolax.lexbor import LexborHTMLParser

from herdkern import __version__
from herdkern.data.pydoc_site import HOST, PydocSite
from herdkern.data.warc import WarcWriter

USER_AGENT = f"herdkern/{__version__}"
Progress = Callable[[int, int], None]  # pages fetched, pages at most


@dataclass(frozen=True, kw_only=True)
class CrawlConfig:
    """packages: installed packages whose pages the site holds beside the library's.  date: WARC-Date of all records."""

    packages: tuple[str, ...] = ("numpy", "tqdm", "zstandard", "tyro", "packaging", "safetensors")
    max_pages: int = 500
    max_page_bytes: int = 8 << 20
    pages_per_file: int = 64
    num_processes: int = 2
    page_seconds: float = 10.0
    date: str = "2026-01-01T00:00:00Z"

    def __post_init__(self) -> None:
        for name in ("max_pages", "max_page_bytes", "pages_per_file", "num_processes", "page_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"CrawlConfig: {name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Fetch:
    """One answer: `status` 0 and `error` if there was none; `response` is the HTTP message as received."""

    url: str
    status: int
    request: bytes = b""
    response: bytes = b""
    links: tuple[str, ...] = ()
    truncated: str = ""
    error: str = ""


def crawl_site(inputs: list[Path], out: Path, config: CrawlConfig) -> dict[str, Any]:
    """Stage: serve the documentation site of this Python and crawl it into out/crawl-*.warc.gz; `inputs` is empty."""
    del inputs
    with PydocSite(config.packages, num_processes=config.num_processes, page_seconds=config.page_seconds) as site:
        return crawl(f"http://{HOST}/", out, config, connect_to=("127.0.0.1", site.port))


def crawl(
    start: str,
    out: Path,
    config: CrawlConfig,
    *,
    connect_to: tuple[str, int] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Follow links of start's host from `start`, write WARC files below `out`, return counters.

    connect_to: (address, port) used instead of the host in `start`, so that URLs do not carry an ephemeral port.
    Raises: ValueError if the host is not loopback; RuntimeError if not one page could be fetched.
    """
    host = urlsplit(start).hostname or ""
    if not (host in ("localhost", "127.0.0.1", "::1") or host.endswith(".localhost")):
        raise ValueError(
            f"crawl: start must be on loopback, got host {host!r}; give WARC files of other sites as input"
        )
    counters: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    pages: list[Fetch] = []
    num_files = 0

    def flush() -> None:
        nonlocal num_files
        path = out / f"crawl-{num_files:05d}.warc.gz"
        with WarcWriter(path, date=config.date, software=USER_AGENT) as warc:
            for page in pages:
                fields = [("hopsFromSeed", "L"), *(("outlink", link) for link in page.links)]
                warc.write_page(page.url, page.request, page.response, fields, truncated=page.truncated)
        num_files += 1
        pages.clear()

    for fetch in _breadth_first(start, config, connect_to):
        statuses[str(fetch.status) if fetch.status else fetch.error] += 1
        if fetch.status:
            counters["pages"] += 1
            counters["bytes"] += len(fetch.response)
            pages.append(fetch)
            if len(pages) == config.pages_per_file:
                flush()
        if progress is not None:
            progress(sum(statuses.values()), config.max_pages)
    if not counters["pages"]:
        raise RuntimeError(f"crawl: {start} must answer, got {dict(statuses)}")
    if pages:
        flush()
    return {"docs_out": counters["pages"], "bytes_out": counters["bytes"], "status": dict(statuses)}


def _breadth_first(start: str, config: CrawlConfig, connect_to: tuple[str, int] | None) -> Iterator[Fetch]:
    """Fetches in the order in which links were found, however long each takes; a few are under way at a time."""
    seen = {start}
    waiting: deque[str] = deque([start])
    under_way: deque[Future[Fetch]] = deque()
    num_started = 0
    with _Client(config, connect_to) as client:
        while waiting or under_way:
            while waiting and len(under_way) < 2 * config.num_processes and num_started < config.max_pages:
                under_way.append(client.submit(waiting.popleft()))
                num_started += 1
            if not under_way:
                return
            fetch = under_way.popleft().result()
            for link in fetch.links:
                if link not in seen:
                    seen.add(link)
                    waiting.append(link)
            yield fetch


class _Client:
    """Fetches pages in threads, each with a kept-open connection."""

    def __init__(self, config: CrawlConfig, connect_to: tuple[str, int] | None):
        self._config, self._connect_to = config, connect_to
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(config.num_processes)
        self._connections: list[http.client.HTTPConnection] = []

    def __enter__(self) -> "_Client":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for connection in self._connections:
            connection.close()

    def submit(self, url: str) -> "Future[Fetch]":
        """The fetch of `url`, under way."""
        return self._pool.submit(self._fetch, url)

    def _connection(self, url: str) -> http.client.HTTPConnection:
        if not hasattr(self._local, "connection"):
            parts = urlsplit(url)
            host, port = self._connect_to or (parts.hostname or "", parts.port or 80)
            timeout = 2 * self._config.page_seconds + 20  # a site answers before, if only with 504
            self._local.connection = http.client.HTTPConnection(host, port, timeout=timeout)
            self._connections.append(self._local.connection)
        connection: http.client.HTTPConnection = self._local.connection
        return connection

    def _fetch(self, url: str) -> Fetch:
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Host": parts.netloc, "User-Agent": USER_AGENT, "Accept": "text/html"}
        request = f"GET {target} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
        connection = self._connection(url)
        try:
            connection.request("GET", target, headers={**headers, "Accept-Encoding": "identity"})
            answer = connection.getresponse()
            body = answer.read(self._config.max_page_bytes + 1)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            connection.close()
            return Fetch(url, 0, error=type(error).__name__)
        truncated = ""
        if len(body) > self._config.max_page_bytes:
            body, truncated = body[:-1], "length"
            connection.close()
        lines = [f"HTTP/1.1 {answer.status} {answer.reason}", *(f"{k}: {v}" for k, v in answer.getheaders())]
        response = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace") + body
        is_html = (answer.getheader("Content-Type") or "").startswith("text/html")
        links = _links(url, body) if is_html and answer.status == 200 else ()
        if 300 <= answer.status < 400 and (location := answer.getheader("Location")):
            links = _same_host(url, [location])
        return Fetch(url, answer.status, request.encode(), response, links, truncated)


def _links(url: str, body: bytes) -> tuple[str, ...]:
    tree = LexborHTMLParser(body.decode("utf-8", "replace"))
    base = tree.css_first("base[href]")
    root = urljoin(url, base.attributes["href"] or "") if base is not None else url
    return _same_host(root, [node.attributes["href"] or "" for node in tree.css("a[href]")])


def _same_host(url: str, links: list[str]) -> tuple[str, ...]:
    """Absolute URLs of `links` on url's host without fragments, each once, in order."""
    netloc = urlsplit(url).netloc
    found: dict[str, None] = {}
    for link in links:
        try:
            target, _ = urldefrag(urljoin(url, link.strip()))
            parts = urlsplit(target)
        except ValueError:
            continue
        if parts.scheme == "http" and parts.netloc == netloc:
            found[target] = None
    return tuple(found)
