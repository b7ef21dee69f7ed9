"""The page process of the documentation site: renders pydoc pages on request. A script that imports the library alone.

It imports the preloaded packages once and forks a child for every page, so a page depends on nothing but its name: a
module that hangs, crashes, prints or patches others cannot touch the next page. Requests are JSON lines on stdin
({"path": ..., "seconds": ...}), answers on stdout are a JSON line {"status": ..., "bytes": ...} and the page.
"""

import json
import os
import pkgutil
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

SKIP = {  # these act when imported, need a display, or are no documentation
    "antigravity", "this", "idlelib", "turtledemo", "turtle", "test", "tests", "lib2to3", "__main__", "__phello__",
    "__hello__", "conftest", "ensurepip", "nt", "ntpath", "winreg", "msvcrt", "f2py", "distutils",
}  # fmt: skip
MAX_PAGE_BYTES = 8 << 20
_ADDRESS = re.compile(r"\b(at(?: |&nbsp;)0x|handle )[0-9a-fA-F]{8,16}\b")


def is_served(name: str, packages: frozenset[str]) -> bool:
    """Whether the module `name` belongs to the library or to `packages` and does not act when imported."""
    parts = name.split(".")
    if parts[0] not in packages and parts[0] not in sys.stdlib_module_names:
        return False
    return not any(part in SKIP or part.startswith(("test_", "_test")) for part in parts)


def render(path: str, packages: frozenset[str]) -> tuple[int, str]:
    """(HTTP status, HTML) of one page of the site, as the server of pydoc itself makes it."""
    import pydoc

    name, _, key = path.lstrip("/").partition("?key=")
    if name.endswith(".html"):
        name = name[:-5]
    is_module = name not in ("", "index", "topics", "keywords", "topic")
    locate, iter_modules = pydoc.locate, pkgutil.iter_modules

    def locate_served(target: str, forceload: bool = False) -> Any:
        """Never reloads: a second import of an extension module fails."""
        return locate(target, forceload=False) if is_served(target, packages) else None

    def iter_served(paths: Any = None, prefix: str = "") -> Iterator[pkgutil.ModuleInfo]:
        within = prefix.rstrip(".") or (name if is_module else "")
        for module in iter_modules(paths, prefix):
            full = f"{within}.{module.name}" if within and not prefix else module.name
            if is_served(full, packages):
                yield module

    pydoc.locate, pkgutil.iter_modules = locate_served, iter_served  # type: ignore[assignment]
    if (is_module and (key or not is_served(name, packages))) or (name == "topic" and not key):
        return 404, pydoc.html.page("Not found", pydoc.html.heading("<strong>Not found</strong>"))
    page = pydoc._url_handler(path, "text/html")  # type: ignore[attr-defined]  # what `pydoc -b` serves
    status = 404 if "<title>Pydoc: Error - " in page[:400] else 200
    return status, _ADDRESS.sub(r"\g<1>7f0000000000", page)


def _child(request: dict[str, Any], packages: frozenset[str], answer: int) -> None:
    """Render into the pipe `answer` and end the process."""
    code = 1
    try:
        signal.alarm(int(request["seconds"]) + 2)  # should the parent die first
        status, page = render(request["path"], packages)
        data = page.encode("utf-8", "replace")[:MAX_PAGE_BYTES]
        with os.fdopen(answer, "wb") as pipe:
            pipe.write(status.to_bytes(2, "big") + data)
        code = 0
    except BaseException:
        pass  # the parent reads no status and answers 500
    finally:
        os._exit(code)


def _collect(reader: int, child: int, seconds: float) -> tuple[int, bytes]:
    """The child's answer; 504 if it is not complete within `seconds`, 500 if it died."""
    deadline = time.monotonic() + seconds
    pieces = []
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 504, b"page took too long"
        piece = os.read(reader, 1 << 16)
        if not piece:
            break
        pieces.append(piece)
    _, code = os.waitpid(child, 0)
    data = b"".join(pieces)
    if code or len(data) < 2:
        return 500, b"page process ended early"
    return int.from_bytes(data[:2], "big"), data[2:]


def serve(requests: IO[bytes], answers: IO[bytes], packages: frozenset[str]) -> None:
    """Answer requests until there are no more."""
    for line in requests:
        request = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _child(request, packages, writer)
        os.close(writer)
        status, page = _collect(reader, child, request["seconds"])
        os.close(reader)
        answers.write(json.dumps({"status": status, "bytes": len(page)}).encode() + b"\n" + page)
        answers.flush()


def main() -> None:
    """Keep stdin and stdout for the protocol, give modules the null device, preload, serve."""
    del sys.path[0]  # the folder of this script: its modules are not part of the site
    packages = sys.argv[1:]
    sys.argv[:] = sys.orig_argv[:] = ["pydoc"]
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    for name in list(os.environ):
        if name not in ("PATH", "LANG"):
            del os.environ[name]  # pages show the environment
    import pydoc  # noqa: F401

    for package in packages:
        try:
            __import__(package)
        except Exception:
            continue  # not installed or broken: its pages answer 404
    serve(requests, answers, frozenset(packages))


if __name__ == "__main__":
    main()
