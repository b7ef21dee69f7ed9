"""What else every Python carries: descriptions and licences of the installed packages, source of its library.

With the crawled documentation (pydoc_site.py) this is the embedded default corpus: real, nothing downloaded or shipped.
"""

import email.message
import importlib.metadata
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from herdkern.data.document import Document, DocumentWriter, clean_text, document_id
from herdkern.data.markdown import strip_markdown

_LICENCE_FILE = re.compile(r"^(?:licen[cs]e|copying|copyright|notice|authors)(?:$|[-_.])", re.IGNORECASE)
_NO_CODE = frozenset(
    ("test", "tests", "idlelib", "turtledemo", "lib2to3", "pydoc_data", "site-packages", "dist-packages")
)
_EXTERNAL = frozenset(("__pycache__", "ensurepip", "config"))


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """max_code_bytes: how much library source to take, whole files chosen by a hash of their names.

    packages: installed distributions to describe, () for all.  Files above max_file_bytes are left out.
    """

    packages: tuple[str, ...] = ()
    max_code_bytes: int = 6 << 20
    max_file_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("max_code_bytes", "max_file_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"CorpusConfig: {name} must not be negative, got {getattr(self, name)}")


def make_package_documents(inputs: list[Path], out: Path, config: CorpusConfig) -> dict[str, Any]:
    """Stage: out/documents.jsonl.zst with sources "package", "licence" and "code"; `inputs` is empty."""
    del inputs
    sources: Counter[str] = Counter()
    with DocumentWriter(out / "documents.jsonl.zst") as writer:
        for documents in (package_documents(config), library_source(config)):
            for document in documents:
                writer.write(document)
                sources[document.source] += 1
    counters = {"docs_out": writer.num_documents, "text_bytes": writer.text_bytes}
    return {**counters, "sources": dict(sorted(sources.items()))}


def package_documents(config: CorpusConfig) -> Iterator[Document]:
    """Description and licence files of each installed distribution, in order of their names."""
    wanted = {_normal(name) for name in config.packages}
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] if distribution.metadata is not None else None
        if name and (not wanted or _normal(name) in wanted) and _normal(name) != "herdkern":
            found.setdefault(_normal(name), distribution)  # the first one is the one that is imported
    for name in sorted(found):
        distribution = found[name]
        url = f"pkg:pypi/{name}@{distribution.version}"
        description = _description(distribution)
        if description:
            yield _document(description, url, "package", f"{name}/METADATA#0")
        for file in sorted(distribution.files or [], key=str):
            if _LICENCE_FILE.search(PurePosixPath(file).name) and "dist-info" in file.parts[0]:
                text = _read(Path(str(file.locate())), config.max_file_bytes)
                if text.strip():
                    yield _document(text, f"{url}#{PurePosixPath(file).name}", "licence", f"{name}/{file.name}#0")


def library_source(config: CorpusConfig) -> Iterator[Document]:
    """Modules of the standard library as source text, tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not any(part in _NO_CODE or part in _EXTERNAL or part.startswith("config-") for part in parts):
            files.append((document_id("/".join(parts)), "/".join(parts), path))
    taken = 0
    chosen = []
    for _, name, path in sorted(files):
        size = path.stat().st_size
        if 0 < size <= config.max_file_bytes and taken + size <= config.max_code_bytes:
            taken += size
            chosen.append((name, path))
    version = sysconfig.get_python_version()
    for name, path in sorted(chosen):
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        yield _document(text, f"pkg:generic/python@{version}#{name}", "code", f"lib/{name}#0")


def _document(text: str, url: str, source: str, record: str) -> Document:
    text = clean_text(text.replace("\r\n", "\n")).strip("\n")
    return Document(id=document_id(url, record), text=text, url=url, source=source, record=record)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _description(distribution: importlib.metadata.Distribution) -> str:
    metadata = distribution.metadata
    body = metadata.get_payload() if isinstance(metadata, email.message.Message) else ""
    text = str(body or metadata["Description"] or "")
    kind = str(metadata["Description-Content-Type"] or "").lower()
    return strip_markdown(text) if "markdown" in kind else text


def _read(path: Path, max_bytes: int) -> str:
    try:
        if path.stat().st_size > max_bytes:
            return ""
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""  # listed but not installed
