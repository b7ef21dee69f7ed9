"""Writing WARC 1.1 (ISO 28500), one gzip member a record; the same records give the same bytes."""

import base64
import hashlib
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from herdkern.engine import atomic_file

Headers = Sequence[tuple[str, str]]


class WarcWriter:
    """Writes `path` (.warc.gz) as a context manager; the file appears under its name when the block ends well.

    date: of every record, RFC 3339 UTC. Record ids are derived from URL, kind and content.
    """

    def __init__(self, path: Path, *, date: str, software: str):
        self.path, self.date = Path(path), date
        self._output = atomic_file(self.path)
        self._software = software

    def __enter__(self) -> "WarcWriter":
        self._file = self._output.__enter__()
        info = f"software: {self._software}\r\nformat: WARC File Format 1.1\r\n".encode()
        self._record("warcinfo", self.path.name, "application/warc-fields", info, [("WARC-Filename", self.path.name)])
        return self

    def write_page(self, url: str, request: bytes, response: bytes, metadata: Headers, *, truncated: str = "") -> None:
        """Append request, response and metadata records of one fetch.

        request, response: HTTP messages as sent and received.  truncated: reason of a cut body ("length", "time").
        """
        _, _, body = response.partition(b"\r\n\r\n")
        headers = [("WARC-IP-Address", "127.0.0.1"), ("WARC-Payload-Digest", _digest(body))]
        if truncated:
            headers.append(("WARC-Truncated", truncated))
        target = [("WARC-Target-URI", url)]
        kind = "application/http; msgtype="
        record = self._record("response", url, kind + "response", response, [*target, *headers])
        concurrent = [("WARC-Concurrent-To", record)]
        self._record("request", url, kind + "request", request, [*target, *concurrent])
        fields = "".join(f"{name}: {value}\r\n" for name, value in metadata).encode()
        self._record("metadata", url, "application/warc-fields", fields, [*target, *concurrent])

    def _record(self, kind: str, name: str, content_type: str, block: bytes, headers: Headers) -> str:
        content = hashlib.sha256(block).hexdigest()
        record_id = f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{kind} {name} {content}')}>"
        lines = [
            ("WARC-Type", kind),
            ("WARC-Record-ID", record_id),
            ("WARC-Date", self.date),
            *headers,
            ("WARC-Block-Digest", _digest(block)),
            ("Content-Type", content_type),
            ("Content-Length", str(len(block))),
        ]
        head = "WARC/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in lines) + "\r\n"
        member = zlib.compressobj(6, zlib.DEFLATED, 31)  # gzip without time or name
        self._file.write(member.compress(head.encode() + block + b"\r\n\r\n") + member.flush())
        return record_id

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._output.__exit__(kind, error, trace)


def _digest(data: bytes) -> str:
    return "sha1:" + base64.b32encode(hashlib.sha1(data, usedforsecurity=False).digest()).decode()
