"""Merging that starts from code points and sure pairs: vocabularies whose tokens cut through them, against the naive
definition."""

import random

import numpy as np
import pytest
from test_tokenizer import encode_naively
from torture import torture_bytes

from herdkern.tokenizer import Tokenizer, train_bpe

SINGLE = [bytes([b]) for b in range(256)]
# Few letters of ASCII, and of one, two, three and four bytes each, which share first, middle and last bytes.
LETTERS = (
    "ab",
    "aab c",
    "aeinrst ",
    "aб вг",
    "жзийЖ d",
    "中丮串丳x ",
    "가각갂꼭 ",
    "éêµ êñ",
    "नमपñ",
    "é中a 🙂🙃",
    "\u07ff\u0800 \ud7ff\ue000\uffff",
)


def vocabulary(rng, letters, num_merges):
    """Tokens of neighbours in random texts, chosen by chance: many reach over the borders of code points."""
    text = "".join(rng.choices(letters, k=600)).encode()
    tokens, parts = list(SINGLE), [bytes([b]) for b in text]
    while len(tokens) < 256 + num_merges:
        at = rng.randrange(len(parts) - 1)
        left, right = parts[at], parts[at + 1]
        if len(left + right) > 12:
            parts = [bytes([b]) for b in text]
            continue
        if left + right not in tokens:
            tokens.append(left + right)
        i = 0
        while i + 1 < len(parts):
            if parts[i] == left and parts[i + 1] == right:
                parts[i : i + 2] = [left + right]
            i += 1
        if len(parts) < 40:
            parts = [bytes([b]) for b in text]
    return {token: rank for rank, token in enumerate(tokens)}


def words_of(rng, letters, count):
    words = []
    for _ in range(count):
        word = (
            " " * (rng.random() < 0.5) + "".join(rng.choices(letters.replace(" ", ""), k=rng.randrange(1, 26)))
        ).encode()
        if rng.random() < 0.2:  # no UTF-8: a byte of a code point is missing or another
            at = rng.randrange(len(word))
            word = word[:at] + bytes(rng.choices(letters.encode(), k=rng.randrange(2))) + word[at + 1 :]
        words.append(word)
    return words


@pytest.mark.parametrize("letters", LETTERS)
def test_against_the_naive_twin(letters):
    rng = random.Random(letters)
    for num_merges in (5, 20, 60):
        tokenizer = Tokenizer(vocabulary(rng, letters, num_merges), {})
        words = words_of(rng, letters, 500)
        found = tokenizer.encode_ordinary_batch(words, num_threads=1)
        expected = [encode_naively(tokenizer, word) for word in words]
        assert [word for word, a, b in zip(words, found, expected) if a != b] == []


def test_trained_vocabulary_on_rare_neighbours():
    """Frequent code points in any order, with and without spaces, whole and damaged."""
    rng = random.Random(4)
    letters = "аеиноприст" * 3 + "бвдёжйкъэю" + "的一是不了人我在有他" + "नमकार" + "éüñç" + "abest " * 2
    text = " ".join("".join(rng.choices(letters, k=rng.randrange(1, 9))) for _ in range(20_000))
    tokenizer = train_bpe([text], 256 + 600, special_tokens=())
    words = words_of(rng, letters, 4000) + torture_bytes(500, 3)
    found = tokenizer.encode_ordinary_batch(words, num_threads=1)
    expected = [encode_naively(tokenizer, word) for word in words]
    assert [word for word, a, b in zip(words, found, expected) if a != b] == []


def test_the_token_of_id_zero_beside_itself():
    """No token is made of it twice, which is another thing than an empty place of a table."""
    tokenizer = Tokenizer(
        {token: rank for rank, token in enumerate([b"!", *(b for b in SINGLE if b != b"!"), b"\xd0\xb0"])}, {}
    )
    for word in ("!!а", "а!!", "!!!а!!", "!а!а!!"):
        assert tokenizer.decode(tokenizer.encode_ordinary(word)) == word
        assert tokenizer.encode_ordinary(word).count(0) == word.count("!")


def test_words_with_more_parts_than_are_merged_at_once():
    """Around 62 parts, with code points of one to three bytes."""
    rng = random.Random(8)
    text = " ".join("".join(rng.choices("абв中文é", k=6)) for _ in range(4000))
    tokenizer = train_bpe([text], 256 + 40, special_tokens=())
    words = ["".join(rng.choices(some, k=n)) for some in ("абв", "中文", "éж中") for n in range(55, 70)]
    words += [" " + word for word in words] + [word.encode()[:-1] for word in words]
    found = tokenizer.encode_ordinary_batch(words, num_threads=1)
    assert found == [encode_naively(tokenizer, word) for word in words]
    assert len({len(ids) for ids in found}) > 5
    assert np.all([len(ids) > 0 for ids in found])
