"""One text on several threads: it is cut into parts, and no cut may change an id."""

import threading

import numpy as np
import pytest
from torture import torture_strings

from herdkern.tokenizer import Tokenizer
from herdkern.tokenizer.pretokenize import SPLIT_PATTERNS

PATTERNS = {
    **SPLIT_PATTERNS,
    "deepseek by three patterns": (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|\s+"),
    "words with gaps": r"\w+",
    "whole lines": r"[^\n]+\n?|\n",
    "from the start": r"^\S+|\s+|.",
    "everything": r"(?s:.)+",
}


def cut(tokenizer, text, part_bytes, special=False):
    """The ids of one text that three threads encode in parts of about part_bytes."""
    ids, offsets = tokenizer._encoder.encode_arrays([text], special, False, 3, part_bytes)
    assert offsets.tolist() == [0, len(ids)]
    if not special:
        assert tokenizer._encoder.count([text], 3, part_bytes).tolist() == [len(ids)]
    return ids


@pytest.fixture(scope="module")
def strange():
    """Torture strings end to end, and between ordinary words."""
    strings = torture_strings(6_000, 5)
    return "".join(strings[:3000]), " ".join(f"word {string}\nOther words" for string in strings[3000:])


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("part_bytes", [64, 1000])
def test_parts_of_strange_texts(trained, strange, name, part_bytes):
    tokenizer = Tokenizer(trained.mergeable_ranks, {}, PATTERNS[name])
    for text in strange:
        whole, _ = tokenizer.encode_to_numpy([text], num_threads=1)
        assert np.array_equal(cut(tokenizer, text, part_bytes), whole)


@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_long_and_short_texts(trained, small_texts, num_threads):
    """As users call it: long texts beside short and empty ones, str and bytes."""
    long = "".join(small_texts) * 3
    assert len(long) > 2_000_000
    texts = [
        "",
        *small_texts[:20],
        long,
        "",
        long.encode(),
        "end",
        "a" * 700_000,
        b"\xff" * 700_000,
        *small_texts[20:40],
    ]
    ids, offsets = trained.encode_to_numpy(texts, num_threads=1)
    again, their_offsets = trained.encode_to_numpy(texts, num_threads=num_threads)
    assert np.array_equal(again, ids)
    assert np.array_equal(their_offsets, offsets)
    assert np.array_equal(trained.count_tokens_batch(texts, num_threads=num_threads), np.diff(offsets))


@pytest.mark.parametrize("unit", ["a", " ", "\n", "ab ", "\n\n  ", "中", " x\n", "'s", "\u0301", "a b\n"])
def test_texts_of_one_unit(trained, unit):
    """Words as long as the text, and texts in which every place looks alike."""
    text = unit * (20_000 // len(unit)) + "tail"
    whole, _ = trained.encode_to_numpy([text], num_threads=1)
    for part_bytes in (64, 500):
        assert np.array_equal(cut(trained, text, part_bytes), whole)


@pytest.mark.parametrize("some", [True, [4001]], ids=["all", "one"])
def test_special_tokens_among_parts(trained, strange, some):
    """They part the text: words never reach over one, wherever it lies."""
    rng = np.random.default_rng(3)
    special = {"<|a|>": 4001, "<|a|>\n": 4002, "\n<|b|>": 4003, "¤¤": 4004}
    tokenizer = Tokenizer(trained.mergeable_ranks, special)
    names = list(special)
    for text in strange:
        pieces = [text[i : i + 37] for i in range(0, len(text) // 4, 37)]
        text = "".join(piece + names[rng.integers(4)] * (rng.random() < 0.3) for piece in pieces)
        whole, _ = tokenizer._encoder.encode_arrays([text], some, False, 1)
        for part_bytes in (64, 400, 5000):
            assert np.array_equal(cut(tokenizer, text, part_bytes, some), whole)


def test_other_threads_run_meanwhile(trained, small_texts):
    """The lock of the interpreter is free while a text is encoded."""
    text = "".join(small_texts) * 8
    turns, stop = [0], threading.Event()

    def turn():
        while not stop.is_set():
            turns[0] += 1

    thread = threading.Thread(target=turn)
    thread.start()
    try:
        before = turns[0]
        trained.encode_to_numpy([text], num_threads=2)
        assert turns[0] > before
    finally:
        stop.set()
        thread.join()
