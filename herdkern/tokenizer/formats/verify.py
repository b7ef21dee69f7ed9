"""Proof of a written file: the library that it is for reads it and must give our ids on texts that are hard to cut.

The texts are our sample sentences, mixtures of characters of all kinds, long runs, and every token of the vocabulary
on a line of its own. All characters are old ones: libraries of different Unicode versions agree on them. A library that
is not installed proves nothing; our own reader must then do (formats/files.py always compares that).
"""

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herdkern.tokenizer.formats.contents import SplitPattern
from herdkern.tokenizer.formats.samples import SAMPLES

if TYPE_CHECKING:
    from herdkern.tokenizer.formats.sentencepiece import SentencePieceTokenizer
    from herdkern.tokenizer.tokenizer import Tokenizer

# A few of each kind that split patterns tell apart: letters of each case and script, marks, numbers, spaces, joiners.
KINDS = (
    "aeinorst",
    "ABZ",
    "éßñŁ",
    "жЯ",
    "λΣ",
    "ǅ",
    "ʰˇ",
    "あカー",
    "中文字",
    "한글",
    "ไก่้",
    "हिंदी",
    "نصّ",
    "אבְ",
    "\u0301\u0308",
    "0123456789",
    "²½Ⅷ١२",
    " ",
    " ",
    "\n",
    "\r\t\x0b\x0c",
    "\u00a0\u3000\u2009\u2028\x85",
    ".,;:!?-_/",
    "'’\"()[]{}<>",
    "+=$€^`|~",
    "…—«»、。！",
    "😀👍🏽",
    "\u200d\ufe0f\u200b",
    "\ue000\U000f0000",
    "\x00\x01\x7f",
    "𝐀𝛼𐍈",
)
CONTRACTIONS = ("don't", "I'VE", "we'Ll", "it’s", "'S", "o'clock", "'re're", "x'd9", "ſ'ſ", "'K")


@cache
def check_texts() -> tuple[str, ...]:
    """Some 500 texts, always the same."""
    rng = random.Random(20260711)
    texts = [*SAMPLES.values(), *CONTRACTIONS, " ".join(CONTRACTIONS)]
    texts += ["".join(kind) for kind in KINDS] + [f"a{kind}b {kind} 1{kind}2" for kind in KINDS]
    for size in (2, 3, 5, 8, 13, 40):
        for _ in range(50):
            texts.append("".join(rng.choice(rng.choice(KINDS)) for _ in range(size)))
    sentences = list(SAMPLES.values())
    for _ in range(40):
        first, second = rng.choice(sentences), rng.choice(sentences)
        cut, glue = rng.randrange(len(first)), rng.choice(rng.choice(KINDS))
        texts.append(first[cut : cut + 60] + glue + second[: rng.randrange(60)])
    for unit in ("a", "ab", "é", "中", " ", "\n", " \n", "7", "-", "😀\u200d", "\u0301", "A", "=", "'s"):
        texts += [unit * times for times in (2, 3, 4, 7, 16, 33, 64, 200)]
    return tuple(texts)


def texts_for(tokens: Iterable[bytes]) -> list[str]:
    """The check texts, and every token that is text, on lines of its own."""
    lines = []
    for token in tokens:
        try:
            lines.append(token.decode())
        except UnicodeDecodeError:
            continue
    return [*check_texts(), *("\n".join(lines[i : i + 200]) for i in range(0, len(lines), 200))]


def compare(what: str, texts: Sequence[str], ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> None:
    """Refuse other ids. Raises: ValueError showing the shortest text that has them."""
    different = [i for i in range(len(texts)) if list(ours[i]) != list(theirs[i])]
    if different:
        i = min(different, key=lambda place: (len(texts[place]), place))
        at = next((k for k, (a, b) in enumerate(zip(ours[i], theirs[i])) if a != b), min(len(ours[i]), len(theirs[i])))
        got, meant = list(theirs[i])[at : at + 8], list(ours[i])[at : at + 8]
        raise ValueError(
            f"save: {what} must give our ids, got others on {len(different)} of {len(texts)} texts, among them "
            f"{texts[i]!r:.200}: {got} instead of {meant} from token {at} on; "
            f"nothing was written, verify=False would write it all the same"
        )


def check_huggingface(path: Path, tokenizer: "Tokenizer") -> bool:
    """Read a tokenizer.json with `tokenizers`; False if that is not installed. Raises: ValueError on other ids."""
    try:
        import tokenizers
    except ImportError:
        return False
    what = f"tokenizers {tokenizers.__version__}"
    theirs = opened(what, lambda: tokenizers.Tokenizer.from_file(str(path)))
    texts = texts_for(tokenizer.mergeable_ranks)

    def ids(batch: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in theirs.encode_batch(batch, add_special_tokens=False)]

    if theirs.get_vocab_size() != len(tokenizer.mergeable_ranks) + len(tokenizer.special_tokens):
        raise ValueError(f"save: {what} must find all tokens in {path.name}, got {theirs.get_vocab_size()}")
    special = _with_special(tokenizer)
    compare(
        what,
        texts,
        tokenizer.encode_ordinary_batch(_without_special(texts, tokenizer)),
        ids(_without_special(texts, tokenizer)),
    )
    compare(what, special, tokenizer.encode_batch(special, allowed_special="all"), ids(special))
    return True


def check_tiktoken(path: Path, tokenizer: "Tokenizer") -> bool:
    """Read a file of ranks with `tiktoken`; False if that is not installed. Raises: ValueError on other ids.

    tiktoken has one split pattern: a sequence of them is applied here, and tiktoken gets the words.
    """
    try:
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe
    except ImportError:
        return False
    what = f"tiktoken {tiktoken.__version__}"
    with without_cache():  # it would take an older file of the same name from there
        ranks = opened(what, lambda: load_tiktoken_bpe(str(path)))
    if ranks != tokenizer.mergeable_ranks:
        raise ValueError(f"save: {what} must read our ranks from {path.name}, got others")
    texts = texts_for(tokenizer.mergeable_ranks)
    check_ranks(what, ranks, tokenizer, texts)
    return True


def check_ranks(what: str, ranks: dict[bytes, int], tokenizer: "Tokenizer", texts: Sequence[str]) -> None:
    """Compare with tiktoken's core on these ranks. Raises: ValueError on other ids."""
    import tiktoken

    pattern: SplitPattern = tokenizer.split_pattern
    core = opened(
        what,
        lambda: tiktoken.Encoding(
            "check",
            pat_str=pattern if isinstance(pattern, str) else r"[\s\S]+",
            mergeable_ranks=ranks,
            special_tokens=dict(tokenizer.special_tokens),
        ),
    )
    ours = tokenizer.encode_ordinary_batch(texts)
    if isinstance(pattern, str):
        compare(what, texts, ours, [core.encode_ordinary(text) for text in texts])
        special = _with_special(tokenizer)
        theirs = [core.encode(text, allowed_special="all") for text in special]
        compare(what, special, tokenizer.encode_batch(special, allowed_special="all"), theirs)
        return
    from herdkern.tokenizer.pretokenize import split_words

    words = [split_words(text, pattern) for text in texts]
    compare(
        what, texts, ours, [[i for word in parts for i in core._core_bpe.encode_single_piece(word)] for parts in words]
    )


def check_tekken(path: Path, tokenizer: "Tokenizer") -> bool:
    """Read a tekken.json with `mistral_common`; False if that is not installed. Raises: ValueError on other ids."""
    try:
        import mistral_common
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    except ImportError:
        return False
    what = f"mistral_common {mistral_common.__version__}"
    theirs = opened(what, lambda: Tekkenizer.from_file(str(path)))
    texts = texts_for(tokenizer.mergeable_ranks)
    compare(
        what, texts, tokenizer.encode_ordinary_batch(texts), [theirs.encode(t, bos=False, eos=False) for t in texts]
    )
    return True


def check_sentencepiece(path: Path, model: "SentencePieceTokenizer") -> bool:
    """Read a .model file with `sentencepiece`; False if that is not installed. Raises: ValueError on other ids."""
    try:
        import sentencepiece
    except ImportError:
        return False
    what = f"sentencepiece {sentencepiece.__version__}"
    theirs = opened(what, lambda: sentencepiece.SentencePieceProcessor(model_file=str(path)))
    texts = [text for text in check_texts() if "\0" not in text]
    texts += [piece.text.replace("\u2581", " ") for piece in model.pieces[:: max(1, len(model.pieces) // 2000)]]
    compare(what, texts, model.encode_batch(texts), [theirs.encode(text) for text in texts])
    return True


def opened(what: str, load: Callable[[], Any]) -> Any:
    """What `load` returns. Raises: ValueError if their library refuses the file."""
    try:
        return load()
    except Exception as e:  # their errors are of many kinds, some of them plain Exception
        raise ValueError(f"save: {what} must read the written file, got {e!r:.200}; nothing was written") from e


def _without_special(texts: Sequence[str], tokenizer: "Tokenizer") -> list[str]:
    """Texts in which no special token occurs: Hugging Face always takes those as tokens."""
    return [text for text in texts if not any(name in text for name in tokenizer.special_tokens)]


def _with_special(tokenizer: "Tokenizer") -> list[str]:
    """Texts with special tokens between words, none for a tokenizer without."""
    names = list(tokenizer.special_tokens)[:64]
    return ["".join(names), *(f"Ab {name}\n{name}1 c" for name in names)] if names else []


@contextmanager
def without_cache() -> Iterator[None]:
    """tiktoken without its folder of copies, which goes by the name of a file and not by its content."""
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TIKTOKEN_CACHE_DIR", None)
        else:
            os.environ["TIKTOKEN_CACHE_DIR"] = before
