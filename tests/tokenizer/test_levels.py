"""Every instruction set that this processor has gives the same ids: UTF-8 from text, words, merges."""

import os
import random
import subprocess
import sys

import pytest
from torture import torture_bytes, torture_strings

from herdkern.tokenizer import Tokenizer

LEVELS = ("baseline", "avx2", "avx512", "amx")  # those that it does not have become the best that it has
ALPHABETS = ("ab '\n1", "aéß", "жи я", "中文。a", "\x00\x7f\x80\u07ff\u0800\uffff", "a中🙂\U0010ffff", "\ud7ff\ue000 x")


def texts_of_every_length() -> list[str]:
    """Lengths around the width of every vector, code points of one, two, three and four bytes mixed."""
    rng = random.Random(5)
    return ["".join(rng.choices(letters, k=length)) for letters in ALPHABETS for length in range(140)]


@pytest.mark.parametrize("level", LEVELS)
def test_same_ids_on_every_level(trained, level, monkeypatch):
    texts = [*texts_of_every_length(), *torture_strings(2000, 11), *torture_bytes(1000, 12)]
    as_bytes = [text if isinstance(text, bytes) else text.encode() for text in texts]
    expected = trained.encode_ordinary_batch(as_bytes, num_threads=1)
    monkeypatch.setenv("HERDKERN_ISA", level)
    for cache_bytes in (0, 1 << 20):
        other = Tokenizer(trained.mergeable_ranks, {}, trained.split_pattern, cache_bytes=cache_bytes)
        found = other.encode_ordinary_batch(texts, num_threads=1)
        assert [text for text, a, b in zip(texts, found, expected) if a != b] == []


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("letters", ["\xe9", "\u20ac", "\U0001f642"])
def test_half_a_surrogate_pair_is_refused_wherever_it_is(trained, level, letters, monkeypatch):
    monkeypatch.setenv("HERDKERN_ISA", level)
    other = Tokenizer(trained.mergeable_ranks, {}, trained.split_pattern)
    for place in range(70):
        with pytest.raises(ValueError, match=rf"a lone surrogate at character {place};"):
            other.encode_ordinary(letters * place + "\udfff" + letters * 3)


def test_a_level_that_does_not_exist_is_refused():
    script = "from herdkern.tokenizer.pretokenize import split_words; split_words('a')"
    environment = os.environ | {"HERDKERN_ISA": "sse9"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120
    )
    assert "RuntimeError: HERDKERN_ISA must be baseline, avx2, avx512 or amx, got 'sse9'" in result.stderr
