"""`herdkern tokenizer ACTION ...`: count, merge, train, extend, encode, inspect, export; each is one function."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from herdkern.command import UsageError, near, parse

USAGE = """usage: herdkern tokenizer ACTION [ARGUMENTS]

  count    count the words of JSONL, Parquet or text files, within a memory budget; goes on after a kill
  merge    sum word counts of any number of files, weighted if you like
  train    learn a vocabulary from word counts, JSONL, Parquet or text
  extend   learn more tokens for other languages; the text of a guard keeps its ids
  encode   token ids of a text
  inspect  what a tokenizer file is: pattern, merges, special tokens, compression of each language
  export   write a tokenizer as tiktoken ranks, Hugging Face, SentencePiece or tekken file, proved by its library

`herdkern tokenizer ACTION --help` tells more."""

Executor = Literal["serial", "threads", "processes", "mpi", "ray", "dask"]


def main(args: list[str]) -> int:
    """Run one action; returns the exit status. Raises: UsageError."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if args else 2
    if args[0] not in ACTIONS:
        known = ", ".join(ACTIONS)
        raise UsageError(f"tokenizer: the action must be one of {known}, got {args[0]!r}{near(args[0], list(ACTIONS))}")
    return ACTIONS[args[0]](args[1:])


def _count(args: list[str]) -> int:
    def count(
        inputs: tuple[Path, ...],
        /,
        out: Path,
        split_pattern: str = "llama3",
        max_memory: str = "",
        num_threads: int = 0,
        executor: Executor = "serial",
        weights: tuple[str, ...] = (),
    ) -> int:
        """Count the words of files into one counts file. The same command again goes on where a killed one stopped.

        Args:
            inputs: JSONL, Parquet or text files, plain or compressed, or folders of them.
            out: The counts file to write; OUT.work holds what is done until it is finished.
            split_pattern: llama3, o200k, gpt2, qwen2, deepseek3, or a regular expression.
            max_memory: What each process may hold, as in 200MB or 4GiB; none given sets no limit.
            num_threads: In each process; 0 takes the usable cores (1 where an executor counts).
            executor: Who counts groups of files: this process, a pool of threads or processes, MPI, Ray, Dask.
            weights: NAME=FACTOR for files by path, name or glob pattern, as in "*/de/*=2" or "code.jsonl=1/3".
        """
        from herdkern.engine import make_executor
        from herdkern.tokenizer.counts import count_shards

        files = shard_files(inputs, "count")
        options = {"split_pattern": split_pattern, "max_memory": to_bytes(max_memory), "weights": to_weights(weights)}
        threads = num_threads or None
        if executor == "serial":
            header = count_shards(files, out, num_threads=threads, **options)  # type: ignore[arg-type]
        else:
            with make_executor(executor) as pool:
                header = count_shards(files, out, num_threads=threads, executor=pool, **options)  # type: ignore[arg-type]
        print(f"{out}: {header.num_words:,} words, {header.num_occurrences:,} occurrences")
        return 0

    return parse(count, args, "tokenizer count")


def _merge(args: list[str]) -> int:
    def merge(inputs: tuple[Path, ...], /, out: Path, max_memory: str = "", weights: tuple[str, ...] = ()) -> int:
        """Sum counts files into one. The order of the files does not matter.

        Args:
            inputs: Files that `tokenizer count` or `merge` wrote, of one split pattern.
            out: The counts file to write; it may be one of the inputs.
            max_memory: What this process may hold, as in 200MB; none given takes 64 MiB for reading.
            weights: NAME=FACTOR for files by path, name or glob pattern, as in "de.counts=2" or "code*=1/3".
        """
        from herdkern.tokenizer.counts import merge_counts

        if not inputs:
            raise UsageError("tokenizer merge: inputs must have at least one counts file, got none")
        with _byte_bar("merge") as show:
            header = merge_counts(
                inputs, out, max_memory=to_bytes(max_memory), weights=to_weights(weights), progress=show
            )
        print(f"{out}: {header.num_words:,} words, {header.num_occurrences:,} occurrences")
        return 0

    return parse(merge, args, "tokenizer merge")


def _train(args: list[str]) -> int:
    def train(
        inputs: tuple[Path, ...],
        /,
        out: Path,
        vocab_size: int = 32_000,
        ties: Literal["huggingface", "tiktoken"] = "huggingface",
        split_pattern: str = "",
        resume: Path | None = None,
        special_tokens: tuple[str, ...] = (),
        no_special_tokens: bool = False,
        initial_tokens: tuple[str, ...] = (),
        min_frequency: int = 1,
        max_token_length: int = 0,
        max_memory: str = "",
        num_threads: int = 0,
    ) -> int:
        """Learn a byte-level BPE vocabulary; writes tokenizer.model (tiktoken) and tokenizer.json (Hugging Face).

        Args:
            inputs: One counts file, or JSONL, Parquet or text files, plain or compressed, or folders of them.
            out: The folder to write.
            vocab_size: Entries, special tokens included.
            ties: Whose merges to take where pairs are equally frequent.
            split_pattern: llama3, o200k, gpt2, qwen2, deepseek3, or a regular expression. Counts have theirs; text
                without one is cut as that of --resume, else as llama3.
            resume: A tokenizer whose merges come first, a folder or file that `tokenizer inspect` knows. Training goes
                on from there; its entries are part of vocab-size.
            special_tokens: Names that get the highest ids, in this order; none given takes those of --resume, else the
                first 16 of Llama 3.
            no_special_tokens: Have none.
            initial_tokens: Strings that become tokens before all that is learnt, whatever the counts say.
            min_frequency: Rarer pairs are not merged.
            max_token_length: Longest token in bytes; 0 sets no limit.
            max_memory: What this process may hold, as in 4GiB; none given sets no limit. Text is first counted into
                OUT.counts, which is removed in the end.
            num_threads: 0 takes the usable cores; the result is the same for any number.
        """
        from herdkern.tokenizer import Tokenizer, train_bpe

        if no_special_tokens and special_tokens:
            raise UsageError("tokenizer train: give --special-tokens or --no-special-tokens, got both")
        start = None if resume is None else Tokenizer.load(resume)
        budget, threads = to_bytes(max_memory), num_threads or None
        pattern = split_pattern or None
        with _counted(inputs, out, pattern or (start.split_pattern if start else "llama3"), budget, threads) as source:
            with _merge_bar() as show:
                tokenizer = train_bpe(
                    source,  # type: ignore[arg-type]
                    vocab_size,
                    ties=ties,
                    special_tokens=() if no_special_tokens else special_tokens or None,
                    initial_tokens=initial_tokens,
                    resume=start,
                    min_frequency=min_frequency,
                    max_token_length=max_token_length or None,
                    split_pattern=pattern,
                    max_memory=budget,
                    num_threads=threads,
                    progress=show,
                )
            tokenizer.save(out)
        print(f"{out}: {tokenizer.n_vocab:,} entries")
        return 0

    return parse(train, args, "tokenizer train")


@contextmanager
def _counted(
    inputs: tuple[Path, ...], out: Path, pattern: str | Sequence[str], max_memory: int | None, threads: int | None
) -> Iterator[object]:
    """What train_bpe takes: a counts file, or the counts of texts; within a budget those go through a file."""
    from herdkern.tokenizer import WordCounts, count_shards

    counts_files = [path for path in inputs if is_counts_file(path)]
    if len(counts_files) > 1 or (counts_files and len(inputs) > 1):
        raise UsageError(
            f"tokenizer train: inputs must be one counts file, or text, got {len(counts_files)} counts files among "
            f"{len(inputs)}; make one of them with `herdkern tokenizer merge`"
        )
    if counts_files:
        yield counts_files[0]
    elif max_memory is None:
        yield WordCounts(pattern).add(_texts(inputs, "train"), num_threads=threads)
    else:
        path = out.with_name(f"{out.name}.counts")
        if path.exists() and not is_counts_file(path):
            raise FileExistsError(f"tokenizer train: {path} must not exist, it is written and removed; move it away")
        files = shard_files(inputs, "train")
        count_shards(files, path, split_pattern=pattern, max_memory=max_memory, num_threads=threads)
        yield path
        path.unlink()


def _extend(args: list[str]) -> int:
    def extend(
        inputs: tuple[Path, ...],
        /,
        base: Path,
        guard: tuple[Path, ...],
        out: Path,
        num_new: int = 28_000,
        keep_ranks: int = 100_000,
        share_exponent: float = 1.0,
        weights: tuple[str, ...] = (),
        guard_tolerance: int = 0,
        min_frequency: int = 1,
        max_token_length: int = 0,
        num_threads: int = 0,
    ) -> int:
        """Add tokens for other languages to a vocabulary, as Llama 3 did. The words of the guard keep their ids.

        Args:
            inputs: One file or folder for each language: a counts file, or JSONL, Parquet or text files.
            base: The tokenizer to extend, a file or folder that `tokenizer inspect` knows.
            guard: Files of the language that must not change, English as a rule, as for inputs.
            out: The folder to write.
            num_new: Tokens to add.
            keep_ranks: Ranks of the base that stay; those above are dropped.
            share_exponent: A language of n words gets a share of n to this power; 0.3 favours small languages.
            weights: NAME=FACTOR for each of the inputs by its name, in place of --share-exponent.
            guard_tolerance: How often a pair may occur in the guard and still become a token.
            min_frequency: Rarer pairs are not merged.
            max_token_length: Longest token in bytes; 0 sets no limit.
            num_threads: 0 takes the usable cores; the result is the same for any number.
        """
        from herdkern.tokenizer import Tokenizer, WordCounts, extend_vocabulary

        start = Tokenizer.load(base)
        factors = {name: to_factor(name, factor) for name, factor in to_weights(weights).items()}
        if len({path.name for path in inputs}) < len(inputs):
            raise UsageError(f"tokenizer extend: inputs must have different names, got {[*map(str, inputs)]}")

        def counts_of(paths: tuple[Path, ...]) -> WordCounts:
            if len(paths) == 1 and is_counts_file(paths[0]):
                return WordCounts.load(paths[0])
            return WordCounts(start.split_pattern).add(_texts(paths, "extend"), num_threads=num_threads or None)

        with _merge_bar() as show:
            extended, report = extend_vocabulary(
                start, {path.name: counts_of((path,)) for path in inputs}, num_new, guard=counts_of(guard),
                keep_ranks=keep_ranks, language_weights=factors or share_exponent, guard_tolerance=guard_tolerance,
                min_frequency=min_frequency, max_token_length=max_token_length or None,
                num_threads=num_threads or None, progress=show,
            )  # fmt: skip
        extended.save(out)
        print(f"{report}\n{out}: {extended.n_vocab:,} entries")
        return 0

    return parse(extend, args, "tokenizer extend")


def _texts(inputs: tuple[Path, ...], action: str) -> Iterator[str]:
    """The texts of document files."""
    from herdkern.data.document import read_documents

    for path in shard_files(inputs, action):
        for document in read_documents(path):
            yield document.text


def _encode(args: list[str]) -> int:
    def encode(text: str, /, tokenizer: Path, show: bool = False) -> int:
        """Token ids of a text, on one line.

        Args:
            text: The text; "-" reads it from standard input.
            tokenizer: A folder that `tokenizer train` or a run wrote.
            show: Print each token's bytes beside its id.
        """
        from herdkern.tokenizer import Tokenizer

        loaded = Tokenizer.load(tokenizer)
        ids = loaded.encode_ordinary(sys.stdin.read() if text == "-" else text)
        lines = [f"{token:7} {loaded.token_bytes(token)!r}" for token in ids] if show else [" ".join(map(str, ids))]
        print("\n".join(lines))
        return 0

    return parse(encode, args, "tokenizer encode")


def _inspect(args: list[str]) -> int:
    def inspect(
        file: Path,
        /,
        samples: Path | None = None,
        split_pattern: str = "",
        json: Path | None = None,
        picture: Path | None = None,
    ) -> int:
        """The passport of a tokenizer: what it is, its merges and special tokens, how it compresses each language.

        Args:
            file: A folder, tiktoken ranks, a tokenizer.json, a tekken.json or a SentencePiece model.
            samples: A folder of text files, one for each language, in place of the sentences that come along.
            split_pattern: For ranks that are no published vocabulary: llama3, o200k, gpt2, ... or an expression.
            json: Also write everything as JSON here.
            picture: Also write an SVG of the compression and the token lengths here.
        """
        from herdkern.engine import atomic_file
        from herdkern.tokenizer.inspect import inspect

        passport = inspect(file, samples=samples, split_pattern=split_pattern or None)
        for path, content in ((json, passport.as_json), (picture, passport.as_svg)):
            if path is not None:
                with atomic_file(path, "w") as f:
                    f.write(content())
        print(passport.as_text(), end="")
        return 0

    return parse(inspect, args, "tokenizer inspect")


def _export(args: list[str]) -> int:
    def export(
        tokenizer: Path,
        /,
        out: Path,
        format: Literal["herdkern", "tiktoken", "huggingface", "sentencepiece", "tekken"] = "huggingface",
        split_pattern: str = "",
        skip_check: bool = False,
    ) -> int:
        """Write a tokenizer in another format. Before the file gets its name, the library that it is for reads it.

        Args:
            tokenizer: A tokenizer folder, or a file of any format.
            out: The file to write; a folder for herdkern.
            format: What to write.
            split_pattern: For ranks that are no published vocabulary: llama3, o200k, gpt2, ... or an expression.
            skip_check: Do not read the file again and compare ids.
        """
        from herdkern.tokenizer import Tokenizer

        loaded = Tokenizer.load(tokenizer, split_pattern=split_pattern or None)
        loaded.save(out, format=format, verify=not skip_check)
        print(f"{out}: {loaded.n_vocab:,} entries")
        return 0

    return parse(export, args, "tokenizer export")


ACTIONS: dict[str, Callable[[list[str]], int]] = {
    "count": _count,
    "merge": _merge,
    "train": _train,
    "extend": _extend,
    "encode": _encode,
    "inspect": _inspect,
    "export": _export,
}


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


class _Bar:
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


def _byte_bar(name: str) -> _Bar:
    return _Bar(name, "B")


def _merge_bar() -> _Bar:
    return _Bar("train", "merge")
