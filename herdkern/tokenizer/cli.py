"""`herdkern tokenizer ACTION ...`: count, merge, train, extend, encode, inspect, export; each is one function."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from herdkern.command import UsageError, near, parse
from herdkern.tokenizer.cli_inputs import byte_bar, shard_files, to_bytes, to_weights
from herdkern.tokenizer.cli_train import extend, train

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
        with byte_bar("merge") as show:
            header = merge_counts(
                inputs, out, max_memory=to_bytes(max_memory), weights=to_weights(weights), progress=show
            )
        print(f"{out}: {header.num_words:,} words, {header.num_occurrences:,} occurrences")
        return 0

    return parse(merge, args, "tokenizer merge")


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
    "train": train,
    "extend": extend,
    "encode": _encode,
    "inspect": _inspect,
    "export": _export,
}
