"""Text for the benchmarks: what the running Python carries, or 700 MB in 45 languages and code from packages.

    python benchmarks/corpus.py --out DIR [--mb 700]      needs apt-get, dpkg-deb, pip and npm; downloads 900 MB

`installed_texts` needs no network. The large corpus is built from manual pages, handbooks, help texts, dictionaries and
source code of Debian, PyPI and npm packages: part-0000.jsonl, part-0001.jsonl, … and stats.json, which names every
package file by its hash. Equal package files give equal bytes. What is done is kept in DIR/.work: a second run goes on
where the first was ended, and --mb 100 makes the first 100 MB of the same order. `read_corpus` reads it;
HERDKERN_CORPUS names its folder.
"""

import argparse
import dataclasses
import hashlib
import heapq
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import IO

from corpus_clean import documents_of

from herdkern.data.document import Document, document_id
from herdkern.engine import atomic_file, sha256_file, write_json_atomic

MB = 1_000_000
PART_BYTES = 48 * MB
TEXT_SUFFIXES = (".html", ".htm", ".xhtml", ".page", ".txt", ".txt.gz", ".rst", ".md", ".dict.dz")
CODE_SUFFIXES = {".c": "c", ".h": "c", ".S": "c", ".py": "python", ".js": "javascript", ".ts": "javascript"}
LANGUAGES = set(
    "af ar bg bn ca cs da de el en es et eu fa fi fr gl gu he hi hr hu id is it ja kk km kn ko lt lv mr nb nl nn pa pl "
    "pt ro ru sk sl sr sv ta te th tr uk vi zh".split()
)
LANGUAGE_FOLDER = re.compile(r"(?<=[/.])(C|[a-z]{2}(?:[-_][A-Za-z]{2})?)(?=[/.])")
LANGUAGE_PACKAGE = re.compile(r"(?:fortunes|faq|reference|guide|doc)-([a-z]{2}(?:-[a-z]{2})?)$")


@dataclasses.dataclass(frozen=True)
class Source:
    """Packages that are alike. kind: what their documents are. megabytes: at most so many of a package's files.

    language: of all documents, or "" where the path tells it.
    """

    kind: str
    language: str
    megabytes: int
    packages: tuple[str, ...]


def debian(kind: str, language: str, megabytes: int, names: str) -> Source:
    return Source(kind, language, megabytes, tuple(f"debian:{name}" for name in names.split()))


def plain_language(code: str) -> str:
    """Without the country, where it does not change the writing."""
    return code if code in ("pt-br", "zh-cn", "zh-tw") else code.partition("-")[0]


def by_language(kind: str, megabytes: int, name: str, languages: str) -> list[Source]:
    return [debian(kind, plain_language(lang), megabytes, name.format(lang)) for lang in languages.split()]


SOURCES = [
    debian("manual", "en", 30, "manpages manpages-dev perl-doc git-man coreutils binutils-common systemd"),
    *by_language("manual", 10, "manpages-{}", "cs da de es fi fr hu it ja nl pl pt-br ro ru sr sv uk zh"),
    *by_language("manual", 10, "manpages-{}-dev", "de es fr it ja nl pl pt-br ru uk"),
    *by_language(
        "help",
        11,
        "libreoffice-help-{}",
        "ca cs da de el en-us es et eu fi fr gl hi hu id it ja km ko nl pl pt-br ru sk sl sv tr vi zh-cn zh-tw",
    ),
    *by_language("help", 8, "gimp-help-{}", "en es fr de it ja ko nl pt-br ru sv zh-cn el uk"),
    *by_language("handbook", 8, "debian-reference-{}", "de en es fr it ja pt zh-cn zh-tw id"),
    debian("handbook", "", 40, "installation-guide-amd64 debian-handbook gnome-user-docs"),
    debian(
        "handbook", "", 20, "debian-faq-de debian-faq-fr debian-faq-ru debian-faq-ja debian-faq-zh-cn debian-faq-ko"
    ),
    debian("handbook", "", 20, "developers-reference developers-reference-de developers-reference-ja"),
    debian("handbook", "", 20, "developers-reference-ru maint-guide maint-guide-fr maint-guide-ja maint-guide-zh-cn"),
    debian("handbook", "", 20, "debian-policy aptitude-doc-en aptitude-doc-es aptitude-doc-ja aptitude-doc-ru"),
    debian("dictionary", "en", 60, "dict-gcide dict-foldoc dict-jargon dict-wn dict-devil dict-vera"),
    debian("dictionary", "fr", 60, "dict-freedict-fra-deu"),
    debian("dictionary", "ja", 60, "dict-freedict-jpn-eng dict-freedict-jpn-rus"),
    debian("dictionary", "el", 60, "dict-freedict-ell-eng"),
    debian("sayings", "", 10, "fortunes fortunes-de fortunes-it fortunes-ru fortunes-es fortunes-pl fortunes-cs"),
    debian("sayings", "", 10, "fortunes-zh"),
    debian("docs", "en", 50, "python3.11-doc linux-doc-6.1 rust-doc openjdk-17-doc"),
    debian("docs", "en", 22, "postgresql-doc-15 qtbase5-doc-html cppreference-doc-en-html r-doc-html octave-doc"),
    debian("docs", "en", 22, "zsh-doc vim-doc"),
    *by_language("docs", 20, "lilypond-doc-html-{}", "de es fr ja it"),
    debian("source", "", 80, "linux-source-6.1"),
    debian("source", "", 9, "libpython3.11-stdlib"),
    Source(
        "source",
        "",
        14,
        (
            *("pypi:django==5.2.19", "pypi:sympy==1.14.0", "pypi:scipy==1.17.1", "pypi:pandas==3.1.1"),
            *("pypi:transformers==5.23.0", "pypi:sqlalchemy==2.1.9", "pypi:babel==2.18.0", "pypi:faker==40.54.0"),
            *("npm:typescript@5.9.3", "npm:three@0.187.0", "npm:lodash@4.18.1", "npm:react-dom@19.3.1", "npm:d3@7.9.2"),
            *("npm:webpack@5.112.2", "npm:date-fns@4.4.0", "npm:@angular/core@21.2.26"),
        ),
    ),
]


def installed_texts(num_bytes: int) -> list[str]:
    """Documents of num_bytes in all (the last one is cut): package descriptions and standard-library source by turns,
    then package source. The same installation gives the same documents.

    Raises: RuntimeError if the installation holds less text.
    """
    standard, installed = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    prose = sorted(
        p for p in installed.glob("*.dist-info/**/*") if p.suffix in (".md", ".rst", ".txt", "") and p.is_file()
    )
    code = sorted([*standard.glob("*.py"), *standard.glob("[a-hj-r]*/*.py")])
    turns = [path for pair in zip_longest(prose, code) for path in pair if path]
    texts = []
    left = num_bytes
    for path in chain(turns, (path for top in sorted(installed.iterdir()) for path in sorted(top.rglob("*.py")))):
        data = path.read_bytes()
        if b"\0" in data:
            continue
        text = data.decode("utf-8", "ignore")[:left]
        texts.append(text)
        left -= len(text)
        if left == 0:
            return texts
    raise RuntimeError(f"installed_texts: this Python must carry {num_bytes} characters of text, lacks {left}")


def corpus_folder() -> Path | None:
    """The folder of the large corpus, if HERDKERN_CORPUS names a finished one."""
    folder = Path(os.environ.get("HERDKERN_CORPUS", ""))
    return folder if "HERDKERN_CORPUS" in os.environ and (folder / "stats.json").exists() else None


def read_corpus(folder: Path, num_bytes: int = 1 << 62, languages: set[str] | None = None) -> list[str]:
    """The first documents of the corpus, num_bytes of UTF-8 in all; those of some languages alone if they are named.

    Raises: RuntimeError if it holds less than a num_bytes that was asked for.
    """
    texts = []
    left = num_bytes
    for path in sorted(folder.glob("part-*.jsonl")):
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                document = json.loads(line)
                if languages is None or document["lang"] in languages:
                    texts.append(document["text"])
                    left -= len(document["text"].encode())
                    if left <= 0:
                        return texts
    if num_bytes != 1 << 62:
        raise RuntimeError(f"read_corpus: {folder} must hold {num_bytes} bytes of {languages or 'all'}, lacks {left}")
    return texts


def fetch(package: str, work: Path) -> Path:
    """The file of a package, downloaded if it is not there. Raises: RuntimeError with what the client said."""
    registry, _, name = package.partition(":")
    folder = work / registry / re.sub(r"[/@=]+", "_", name)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command = {
            "debian": ["apt-get", "download", name],
            "pypi": [*pip, "--python-version=3.11", "--dest=.", name],
            "npm": ["npm", "pack", "--silent", name],
        }[registry]
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:
            done = subprocess.run(command, cwd=part, capture_output=True, text=True)
            if not os.listdir(part):
                raise RuntimeError(f"{' '.join(command)} brought nothing: {done.stderr.strip()[-300:]}")
            inside = Path(part, "file")
            inside.mkdir()
            for path in Path(part).iterdir():
                if path != inside:
                    path.rename(inside / path.name)
            inside.rename(folder)
    return next(path for path in sorted(folder.iterdir()))


def files_of(archive: Path | IO[bytes], mode: str = "r|*") -> Iterator[tuple[str, int, IO[bytes]]]:
    """(name, size, opened) of each regular file in a .deb, a wheel or a tar, and in an archive of sources inside."""
    if isinstance(archive, Path) and archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as whole:
            for info in whole.infolist():
                with whole.open(info) as opened:
                    yield info.filename, info.file_size, opened
        return
    if isinstance(archive, Path) and archive.suffix == ".deb":
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            yield from files_of(process.stdout, "r|")
        return
    named = {"name": str(archive)} if isinstance(archive, Path) else {"fileobj": archive}
    with tarfile.open(mode=mode, **named) as tar:  # type: ignore[call-overload]
        for member in tar:
            opened = tar.extractfile(member) if member.isreg() else None
            if opened is None:
                continue
            if re.search(r"usr/src/.*\.tar\.xz$", member.name):
                yield from files_of(opened, "r|xz")
            else:
                yield member.name, member.size, opened


def is_wanted(name: str, kind: str) -> bool:
    """Whether the file may hold documents of this kind."""
    if kind == "source":
        return name.endswith(tuple(CODE_SUFFIXES)) and not re.search(r"/(fonts|esm2015|fesm2015|umd)/|\.min\.", name)
    if kind == "manual":
        return "/man/" in name or name.endswith(TEXT_SUFFIXES)
    if kind == "sayings":
        return "/games/fortunes" in name and "." not in Path(name).name
    return name.endswith(TEXT_SUFFIXES)


def sample(archive: Path, package: str, source: Source) -> list[tuple[str, bytes]]:
    """Files of the package by name, source.megabytes of them: those whose names have the smallest hashes.

    One pass, since archives are streams: the largest hash goes whenever the sum is too large, and what is left is the
    same in any order of files.
    """
    kept: list[tuple[int, str, bytes]] = []
    size = 0
    for name, num_bytes, opened in files_of(archive):
        if not is_wanted("/" + name, source.kind) or num_bytes > 40 * MB:
            continue
        data = opened.read()
        packed = 3 if name.endswith((".gz", ".dz")) else 1
        digest = hashlib.blake2b(f"{package}/{name}".encode(), digest_size=8).digest()
        heapq.heappush(kept, (-int.from_bytes(digest, "big"), name, data))
        size += packed * len(data)
        while size > source.megabytes * MB:
            _, gone, data = heapq.heappop(kept)
            size -= (3 if gone.endswith((".gz", ".dz")) else 1) * len(data)
    return sorted((name, data) for _, name, data in kept)


def language_of(name: str, package: str) -> str:
    """ISO code by the folders of the path, else by the package's name, else English; a name for source code."""
    for suffix, language in CODE_SUFFIXES.items():
        if name.endswith(suffix):
            return language
    for match in LANGUAGE_FOLDER.finditer(name):
        code = match[1].replace("_", "-").lower()
        if code == "c" or code.partition("-")[0] in LANGUAGES:
            return "en" if code == "c" else plain_language(code)
    found = LANGUAGE_PACKAGE.search(package)
    return found[1] if found else "en"


def extract(package: str, source: Source, archive: Path, out: Path) -> None:
    """Writes the documents of one package, whole or not at all; the first line is about the package."""
    version = {"package": package, "file": archive.name, "sha256": sha256_file(archive), "kind": source.kind}
    name = re.split(r"[=]=|(?<=.)@", package)[0]
    with atomic_file(out) as f:
        f.write(json.dumps(version).encode() + b"\n")
        for path, data in sample(archive, name, source):
            language = source.language or language_of("/" + path, name)
            for i, text in enumerate(documents_of("/" + path, data, source.kind)):
                where = f"{name}/{path.removeprefix('./')}#{i}"
                document = Document(document_id(where, text[:64]), text, source=f"{source.kind}:{where}", lang=language)
                f.write(document.to_json().encode() + b"\n")


def assemble(documents: list[Path], out: Path, num_bytes: int) -> dict:
    """Writes the parts in the order of the documents' ids, num_bytes of text at most; returns the statistics."""
    index = []  # (id, file, begin, size of the line): the lines themselves stay on disk
    packages = []
    opened = [open(path, "rb") for path in documents]  # noqa: SIM115
    for number, f in enumerate(opened):
        packages.append(json.loads(f.readline()))
        while line := f.readline():
            index.append((line[7:23], number, f.tell() - len(line), len(line)))
    index.sort()
    stats: dict = {"bytes": 0, "documents": 0, "languages": {}, "kinds": {}, "packages": packages}
    place = iter(index)
    left = num_bytes
    part = 0
    seen = b""
    while left > 0:
        with atomic_file(out / f"part-{part:04d}.jsonl") as f:
            room = PART_BYTES
            for document_id_, number, begin, size in place:
                opened[number].seek(begin)
                line = opened[number].read(size)
                document = json.loads(line)
                length = len(document["text"].encode())
                if document_id_ == seen:
                    continue
                seen = document_id_
                f.write(line)
                stats["bytes"] += length
                stats["documents"] += 1
                for table, key in (("languages", document["lang"]), ("kinds", packages[number]["kind"])):
                    stats[table][key] = stats[table].get(key, 0) + length
                room -= length
                left -= length
                if room <= 0 or left <= 0:
                    break
            else:
                left = 0
        part += 1
    for path in out.glob("part-*.jsonl"):  # of a longer corpus that was here before
        if int(path.stem[5:]) >= part:
            path.unlink()
    return stats


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the large corpus of the tokenizer's benchmarks")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--mb", type=int, default=700, metavar="N", help="megabytes of text (default 700: all)")
    parser.add_argument("--fetch-only", action="store_true", help="download and end")
    options = parser.parse_args()
    work = options.out / ".work"
    (work / "documents").mkdir(parents=True, exist_ok=True)
    pairs = [(package, source) for source in SOURCES for package in source.packages]
    start = time.time()
    missing = []
    done = []
    for package, source in pairs:
        out = work / "documents" / (re.sub(r"[/:@=]+", "_", package) + ".jsonl")
        try:
            archive = fetch(package, work)
        except RuntimeError as error:
            missing.append(package)
            print(f"{package} is left out: {error}", file=sys.stderr, flush=True)
            continue
        if not options.fetch_only and not out.exists():
            extract(package, source, archive, out)
            print(f"{package}: {out.stat().st_size / MB:.1f} MB, {time.time() - start:.0f} s", flush=True)
        done.append(out)
    if options.fetch_only:
        return 1 if missing else 0
    stats = assemble(done, options.out, options.mb * MB)
    write_json_atomic(options.out / "stats.json", stats | {"missing": missing})
    print(f"{stats['bytes'] / MB:.1f} MB, {stats['documents']} documents, {len(stats['languages'])} languages and code")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
