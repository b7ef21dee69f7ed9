"""`herdkern tokenizer train` and `extend`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from herdkern.command import UsageError, parse
from herdkern.tokenizer.cli_inputs import (
    is_counts_file,
    merge_bar,
    shard_files,
    texts_of,
    to_bytes,
    to_factor,
    to_weights,
)

if TYPE_CHECKING:
    from herdkern.tokenizer import Tokenizer

Pattern = str | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """What `train` learns; the fields are those of train_bpe.

    Args:
        vocab_size: Entries, special tokens included.
        ties: Whose merges to take where pairs are equally frequent.
        split_pattern: llama3, o200k, gpt2, qwen2, deepseek3, or a regular expression. Counts have theirs; text without
            one is cut as that of --resume, else as llama3.
        resume: A tokenizer whose merges come first, a folder or file that `tokenizer inspect` knows. Training goes on
            from there; its entries are part of vocab-size.
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

    vocab_size: int = 32_000
    ties: Literal["huggingface", "tiktoken"] = "huggingface"
    split_pattern: str = ""
    resume: Path | None = None
    special_tokens: tuple[str, ...] = ()
    no_special_tokens: bool = False
    initial_tokens: tuple[str, ...] = ()
    min_frequency: int = 1
    max_token_length: int = 0
    max_memory: str = ""
    num_threads: int = 0


def train(args: list[str]) -> int:
    """Run `herdkern tokenizer train`. Raises: UsageError."""
    import tyro

    def train(
        inputs: tuple[Path, ...], /, out: Path, options: Annotated[TrainArguments, tyro.conf.arg(name="")]
    ) -> int:
        """Learn a byte-level BPE vocabulary; writes tokenizer.model (tiktoken) and tokenizer.json (Hugging Face).

        Args:
            inputs: One counts file, or JSONL, Parquet or text files, plain or compressed, or folders of them.
            out: The folder to write.
        """
        from herdkern.tokenizer import Tokenizer

        if options.no_special_tokens and options.special_tokens:
            raise UsageError("tokenizer train: give --special-tokens or --no-special-tokens, got both")
        start = None if options.resume is None else Tokenizer.load(options.resume)
        pattern = options.split_pattern or (start.split_pattern if start else "llama3")
        with _source(inputs, out, pattern, options) as (source, to_split):
            tokenizer = _trained(source, to_split, start, options)
            tokenizer.save(out)
        print(f"{out}: {tokenizer.n_vocab:,} entries")
        return 0

    return parse(train, args, "tokenizer train")


def _trained(
    source: Path | Iterator[str], pattern: Pattern | None, start: "Tokenizer | None", options: TrainArguments
) -> "Tokenizer":
    from herdkern.tokenizer import train_bpe

    with merge_bar() as show:
        return train_bpe(
            source,
            options.vocab_size,
            ties=options.ties,
            special_tokens=() if options.no_special_tokens else options.special_tokens or None,
            initial_tokens=options.initial_tokens,
            resume=start,
            min_frequency=options.min_frequency,
            max_token_length=options.max_token_length or None,
            split_pattern=pattern,
            max_memory=to_bytes(options.max_memory),
            num_threads=options.num_threads or None,
            progress=show,
        )


@contextmanager
def _source(
    inputs: tuple[Path, ...], out: Path, pattern: Pattern, options: TrainArguments
) -> Iterator[tuple[Path | Iterator[str], Pattern | None]]:
    """What train_bpe takes, a counts file or texts, and the pattern asked for; within a budget texts are counted into
    a file first."""
    from herdkern.tokenizer import count_shards

    counts_files = [path for path in inputs if is_counts_file(path)]
    if counts_files and len(inputs) > 1:
        raise UsageError(
            f"tokenizer train: inputs must be one counts file, or text, got {len(counts_files)} counts files among "
            f"{len(inputs)}; make one of them with `herdkern tokenizer merge`"
        )
    budget, threads = to_bytes(options.max_memory), options.num_threads or None
    if counts_files:
        yield counts_files[0], options.split_pattern or None
    elif budget is None:
        yield texts_of(inputs, "train"), pattern
    else:
        path = out.with_name(f"{out.name}.counts")
        if path.exists() and not is_counts_file(path):
            raise FileExistsError(f"tokenizer train: {path} must not exist, it is written and removed; move it away")
        files = shard_files(inputs, "train")
        count_shards(files, path, split_pattern=pattern, max_memory=budget, num_threads=threads)
        yield path, pattern
        path.unlink()


@dataclass(frozen=True, kw_only=True)
class ExtendArguments:
    """What `extend` adds; the fields are those of extend_vocabulary.

    Args:
        num_new: Tokens to add.
        keep_ranks: Ranks of the base that stay; those above are dropped.
        share_exponent: A language of n words gets a share of n to this power; 0.3 favours small languages.
        weights: NAME=FACTOR for each of the inputs by its name, in place of --share-exponent.
        guard_tolerance: How often a pair may occur in the guard and still become a token.
        min_frequency: Rarer pairs are not merged.
        max_token_length: Longest token in bytes; 0 sets no limit.
        num_threads: 0 takes the usable cores; the result is the same for any number.
    """

    num_new: int = 28_000
    keep_ranks: int = 100_000
    share_exponent: float = 1.0
    weights: tuple[str, ...] = ()
    guard_tolerance: int = 0
    min_frequency: int = 1
    max_token_length: int = 0
    num_threads: int = 0


def extend(args: list[str]) -> int:
    """Run `herdkern tokenizer extend`. Raises: UsageError."""
    import tyro

    def extend(
        inputs: tuple[Path, ...],
        /,
        base: Path,
        guard: tuple[Path, ...],
        out: Path,
        options: Annotated[ExtendArguments, tyro.conf.arg(name="")],
    ) -> int:
        """Add tokens for other languages to a vocabulary, as Llama 3 did. The words of the guard keep their ids.

        Args:
            inputs: One file or folder for each language: a counts file, or JSONL, Parquet or text files.
            base: The tokenizer to extend, a file or folder that `tokenizer inspect` knows.
            guard: Files of the language that must not change, English as a rule, as for inputs.
            out: The folder to write.
        """
        from herdkern.tokenizer import Tokenizer, WordCounts, extend_vocabulary

        start, threads = Tokenizer.load(base), options.num_threads or None
        factors = {name: to_factor(name, factor) for name, factor in to_weights(options.weights).items()}
        if len({path.name for path in inputs}) < len(inputs):
            raise UsageError(f"tokenizer extend: inputs must have different names, got {[*map(str, inputs)]}")

        def counts_of(paths: tuple[Path, ...]) -> WordCounts:
            if len(paths) == 1 and is_counts_file(paths[0]):
                return WordCounts.load(paths[0])
            return WordCounts(start.split_pattern).add(texts_of(paths, "extend"), num_threads=threads)

        with merge_bar() as show:
            extended, report = extend_vocabulary(
                start, {path.name: counts_of((path,)) for path in inputs}, options.num_new, guard=counts_of(guard),
                keep_ranks=options.keep_ranks, language_weights=factors or options.share_exponent,
                guard_tolerance=options.guard_tolerance, min_frequency=options.min_frequency,
                max_token_length=options.max_token_length or None, num_threads=threads, progress=show,
            )  # fmt: skip
        extended.save(out)
        print(f"{report}\n{out}: {extended.n_vocab:,} entries")
        return 0

    return parse(extend, args, "tokenizer extend")
