"""What the tokenizer's commands share: the files that they are given, sizes and weights, a bar."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from herdkern.command import UsageError


def texts_of(inputs: tuple[Path, ...], action: str) -> Iterator[str]:
    """The texts of document files."""
    from herdkern.data.document import read_documents

    for path in shard_files(inputs, action):
        for document in read_documents(path):
            yield document.text


def shard_files(inputs: tuple[Path, ...], action: str) -> list[Path]:
    """The files of `inputs`, folders replaced by the readable files below them, sorted by path.

    Raises: UsageError if there are none; FileNotFoundError; ValueError if a folder has none.
    """
    from herdkern.data.document import document_kind

    def readable(path: Path) -> bool:
        try:
            document_kind(path)
        except ValueError:
            return False
        return path.is_file()

    files: list[Path] = []
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"tokenizer {action}: {path} must be a file or folder, there is none")
        below = sorted(filter(readable, path.rglob("*"))) if path.is_dir() else [path]
        if not below:
            raise ValueError(f"tokenizer {action}: {path} must hold JSONL, Parquet or text files, it holds none")
        files += below
    if not files:
        raise UsageError(f"tokenizer {action}: inputs must have at least one file or folder, got none")
    return files


def is_counts_file(path: Path) -> bool:
    """Whether a file begins as a counts file does, of any version."""
    if not path.is_file():
        return False
    with open(path, "rb") as f:
        return f.read(21) == b"herdkern word counts "


def to_bytes(size: str) -> int | None:
    """The bytes of "200MB", "1.5 GiB" or "1000"; None for nothing. Raises: UsageError."""
    if not size:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", size.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"tokenizer: max_memory must be a size as 200MB or 4GiB, got {size!r}")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))


def to_weights(weights: tuple[str, ...]) -> dict[str, str]:
    """{name: factor} of NAME=FACTOR texts. Raises: UsageError."""
    for weight in weights:
        if not re.fullmatch(r".+=[^=]+", weight):
            raise UsageError(f"tokenizer: weights must be NAME=FACTOR, got {weight!r}")
    return dict(weight.rsplit("=", 1) for weight in weights)


def to_factor(name: str, factor: str) -> float:
    """The number of "2", "0.5" or "1/3". Raises: UsageError."""
    try:
        over, _, under = factor.partition("/")
        found = float(over) / float(under or 1)
        if not 0 <= found < 1 << 32:
            raise ValueError
        return found
    except (ValueError, ArithmeticError):
        raise UsageError(f"tokenizer: the weight of {name} must be a number as 2, 0.5 or 1/3, got {factor!r}") from None


class Bar:
    """A bar on a terminal, nothing elsewhere: show(done, all)."""

    def __init__(self, name: str, unit: str):
        self.shown = {"desc": name, "unit": unit, "unit_scale": unit == "B", "smoothing": 0.05, "leave": False}
        self.bar: object = None

    def __enter__(self) -> Callable[[int, int], None]:
        return self.show

    def show(self, done: int, total: int) -> None:
        """Move the bar."""
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=total, disable=not sys.stderr.isatty(), **self.shown)
        self.bar.update(done - self.bar.n)  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()  # type: ignore[attr-defined]


def byte_bar(name: str) -> Bar:
    """A bar over bytes."""
    return Bar(name, "B")


def merge_bar() -> Bar:
    """A bar over merges."""
    return Bar("train", "merge")
