"""The embedded corpus: the documentation site that every Python can make of itself, served on loopback.

Pages are real: `pydoc` renders them (navigation, indexes, modules, topics) in processes of pydoc_pages.py. Headers
carry no date, and pages depend on the Python installation alone: a second crawl of the site gives the same bytes.
"""

import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

HOST = "pydoc.localhost"
_GRACE_SECONDS = 15.0  # a page process that is silent this long beyond its page's limit is replaced
_STATUS_TEXT = {404: b"not found", 500: b"page process ended early", 504: b"page took too long"}


class _PageProcess:
    """One process of pydoc_pages.py; started at the first page, again whenever it died."""

    def __init__(self, packages: tuple[str, ...]):
        self.packages = packages
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("pydoc_pages.py")
        environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        environment["OPENBLAS_NUM_THREADS"] = "1"
        if path := os.environ.get("PYTHONPATH"):
            environment["PYTHONPATH"] = path
        return subprocess.Popen(
            [sys.executable, str(script), *self.packages],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    def render(self, path: str, seconds: float) -> tuple[int, bytes]:
        """(status, page); 500 if the process ends or falls silent, and the next page has a new one."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"path": path, "seconds": seconds}).encode() + b"\n")
            process.stdin.flush()
            return self._answer(process, time.monotonic() + seconds + _GRACE_SECONDS)
        except OSError:  # also TimeoutError and BrokenPipeError
            self.close()
            return 500, _STATUS_TEXT[500]

    @staticmethod
    def _answer(process: subprocess.Popen[bytes], deadline: float) -> tuple[int, bytes]:
        assert process.stdout is not None
        data = b""
        need = -1
        while need < 0 or len(data) < need:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(process.stdout.fileno(), 1 << 20) if ready else b""
            if not piece:
                raise TimeoutError("page process is silent")
            data += piece
            if need < 0 and b"\n" in data:
                head, _, data = data.partition(b"\n")
                header = json.loads(head)
                need = header["bytes"]
        return header["status"], data

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


class PydocSite:
    """Serves the site on 127.0.0.1 while its block runs; `port` is chosen by the system.

    packages: installed top-level packages to serve beside the library.  num_processes: pages rendered at a time.
    page_seconds: limit for one page, answered with 504 beyond it.
    """

    def __init__(self, packages: tuple[str, ...] = (), *, num_processes: int = 2, page_seconds: float = 10.0):
        self.page_seconds = page_seconds
        self.num_processes = num_processes
        self._processes = [_PageProcess(packages) for _ in range(num_processes)]
        self._free: queue.Queue[_PageProcess] = queue.Queue()
        for process in self._processes:
            self._free.put(process)
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                status, page = site.page(self.path)
                kind = "text/html; charset=UTF-8" if status in (200, 404) else "text/plain; charset=UTF-8"
                self.send_response_only(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, format: str, *args: object) -> None:
                """The crawler counts; a terminal is for people."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]

    def page(self, path: str) -> tuple[int, bytes]:
        """(HTTP status, body) of the page at `path`, waiting for a free page process."""
        process = self._free.get()
        try:
            return process.render(path, self.page_seconds)
        finally:
            self._free.put(process)

    def __enter__(self) -> "PydocSite":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for process in self._processes:
            process.close()
