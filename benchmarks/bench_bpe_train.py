"""Training a byte-level BPE vocabulary from documents: herdkern, Hugging Face tokenizers, rustbpe, sentencepiece.

All start from a list of str and use every core they know to use. Before any time is taken our merges must equal those
of Hugging Face (ties="huggingface") and of rustbpe (ties="raw"). sentencepiece is there for scale: it does another task
(code points, words cut at spaces), so its vocabulary is not compared.
"""

import io
import json
import sys
from collections.abc import Callable

from corpus import installed_texts
from harness import Bench, Case, pytest_cases

from herdkern.tokenizer import LLAMA3_SPLIT_PATTERN, train_bpe
from herdkern.tokenizer.export import to_byte_level


def train_tokenizers(texts: list[str], vocab_size: int) -> dict[str, int]:
    """Vocabulary of the Hugging Face trainer: byte-level text -> id."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())["model"]["vocab"]


def train_rustbpe(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """mergeable_ranks of rustbpe."""
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=LLAMA3_SPLIT_PATTERN)
    return {bytes(token): rank for token, rank in tokenizer.get_mergeable_ranks()}


def train_sentencepiece(texts: list[str], vocab_size: int) -> bytes:
    """A sentencepiece BPE model with byte fallback."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines()),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return model.getvalue()


PEERS = {"tokenizers": train_tokenizers, "rustbpe": train_rustbpe, "sentencepiece": train_sentencepiece}


def case(name: str, num_bytes: int, vocab_size: int, peers: tuple[str, ...]) -> Case:
    texts: list[str] = []

    def setup() -> dict[str, Callable[[], object]]:
        texts[:] = installed_texts(num_bytes)
        fns: dict[str, Callable[[], object]] = {"herdkern": lambda: train_bpe(texts, vocab_size, special_tokens=())}
        for peer in peers:
            try:
                __import__(peer)
            except ImportError as e:
                print(f"{name}: without {peer}: {e}", file=sys.stderr)
                continue
            fns[peer] = lambda peer=peer: PEERS[peer](texts, vocab_size)  # type: ignore[misc]
        return fns

    def check(fns: dict[str, Callable[[], object]]) -> None:
        ours = fns["herdkern"]().mergeable_ranks  # type: ignore[attr-defined]
        assert len(ours) == vocab_size
        if "tokenizers" in fns:
            assert {to_byte_level(token): rank for token, rank in ours.items()} == fns["tokenizers"]()
        if "rustbpe" in fns:
            raw = train_bpe(texts, vocab_size, ties="raw", special_tokens=())
            assert raw.mergeable_ranks == fns["rustbpe"]()

    return Case(name=name, setup=setup, check=check, bytes=num_bytes)


BENCH = Bench(
    "bpe_train",
    [
        case("2MB-8k", 2_000_000, 8_192, ("tokenizers", "rustbpe", "sentencepiece")),
        case("10MB-32k", 10_000_000, 32_768, ("tokenizers", "rustbpe")),
    ],
)
test_bpe_train = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
