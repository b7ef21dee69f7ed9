"""Long words in linear time, irregular vocabularies, and the word cache: none of them may change an id."""

import itertools
import random

import pytest

from herdkern.tokenizer import Tokenizer, train_bpe

BYTES = {bytes([b]): b for b in range(256)}


def merge_naively(ranks, word):
    """The ids of one word by the definition."""
    parts = [word] if word in ranks else [bytes([b]) for b in word]
    while True:
        joined = [ranks.get(a + b, 1 << 60) for a, b in itertools.pairwise(parts)]
        if not joined or min(joined) == 1 << 60:
            return [ranks[part] for part in parts]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def words_over(alphabet, rng, count, longest):
    """Letters only: each is one word of the split pattern."""
    return ["".join(rng.choices(alphabet, k=rng.randrange(1, longest))) for _ in range(count)]


def assert_naive(tokenizer, words):
    for word in words:
        assert tokenizer.encode_ordinary(word) == merge_naively(tokenizer.mergeable_ranks, word.encode())


@pytest.mark.parametrize("alphabet", ["ab", "abc", "aé", "中文字", "etaoinshr"])
@pytest.mark.parametrize("num_merges", [5, 40, 300])
def test_trained_vocabularies(alphabet, num_merges):
    """Trained vocabularies are regular: every token is made by two of lower rank."""
    rng = random.Random(len(alphabet) * num_merges)
    texts = [" ".join(words_over(alphabet, rng, 300, 40))]
    tokenizer = train_bpe(texts, 256 + num_merges, special_tokens=())
    assert_naive(tokenizer, words_over(alphabet, rng, 25, 260))


@pytest.mark.parametrize("seed", range(12))
def test_irregular_vocabularies(seed):
    """Random tokens with random ranks: some are made by none, some by parts of a higher rank."""
    rng = random.Random(seed)
    tokens = list({word.encode() for word in words_over("abc"[: 2 + seed % 2], rng, 60, 3 + seed)} - set(BYTES))
    ids = rng.sample(range(256, 256 + 2 * len(tokens)), len(tokens))
    tokenizer = Tokenizer({**BYTES, **dict(zip(tokens, ids))}, {})
    assert_naive(tokenizer, words_over("abc", rng, 25, 200))


def test_single_bytes_with_high_ranks():
    """A byte is there before every merge, whatever its rank."""
    rng = random.Random(5)
    trained = train_bpe([" ".join(words_over("abcd", rng, 300, 30))], 400, special_tokens=())
    ranks = {t: r - 256 if len(t) > 1 else 10_000 + r for t, r in trained.mergeable_ranks.items()}
    assert_naive(Tokenizer(ranks, {}), words_over("abcd", rng, 25, 200))


@pytest.mark.parametrize("seed", range(6))
def test_tokens_that_no_merge_makes(seed):
    """Trained tokens and some that can only be whole words: rows of tokens must step over those."""
    rng = random.Random(seed)
    trained = train_bpe([" ".join(words_over("abcd", rng, 300, 30))], 330, special_tokens=())
    extra = [word.encode() for word in words_over("abcd", rng, 300, 24)]
    lonely = [word for word in extra if len(merge_naively(trained.mergeable_ranks, word)) > 2]
    ranks = {**trained.mergeable_ranks, **{word: 400 + i for i, word in enumerate(dict.fromkeys(lonely))}}
    words = words_over("abcd", rng, 40, 120) + [word.decode() + "a" for word in lonely]
    assert_naive(Tokenizer(ranks, {}), [*words, *(word.decode() for word in lonely)])


def test_runs_with_many_long_tokens():
    """The token that repeats is tried first, and taken back where it leads nowhere."""
    rng = random.Random(12)
    runs = [unit * rng.randrange(1, 90) for unit in ("a", "ab", "aab") for _ in range(200)]
    ranks = train_bpe([" ".join(runs)], 420, special_tokens=()).mergeable_ranks
    assert sum(len(token) > 15 for token in ranks) > 50
    tails = ["".join(rng.choices(["a" * 7, "b", "ab" * 9, "aab" * 5], k=6)) for _ in range(60)]
    assert_naive(Tokenizer(ranks, {}), [run * 3 + tail for run, tail in zip(rng.sample(runs, 60), tails)])


FAMILIES = {
    "letter": "a",
    "letters": "ab",
    "three-letters": "abc",
    "capital": "A",
    "capitals": "AaAA",
    "hex": "0123456789abcdef",
    "base64": "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo0",
    "digit": "1",
    "digits": "1234567890",
    "space": " ",
    "spaces-and-letter": " " * 99 + "a",
    "tab": "\t",
    "newline": "\n",
    "crlf": "\r\n",
    "blank-lines": "\n \n",
    "hyphen": "-",
    "ruler": "=-",
    "dots": ".",
    "apostrophe": "'",
    "contraction": "'s",
    "slashes": "/",
    "brackets": "()[]{}",
    "quote": '\\"',
    "zero": "\0",
    "han": "中",
    "sentence": "我能吞下玻璃而不伤身体",
    "kana": "いろはにほへと",
    "thai": "ฉันกินกระจกได้แต่มันไม่ทำให้ฉันเจ็บ",
    "emoji": "🙂",
    "joiners": "👩\u200d👩\u200d👧\u200d👦\ufe0f",
    "flags": "🇩🇪",
    "combining": "e\u0301",
    "marks-alone": "\u0301",
    "no-break-space": "\u00a0",
    "last-plane": "\U0010fffd",
    "ligature": "ﬁ",
    "long-s": "'ſ",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_hostile_families(trained, name):
    """Equal to tiktoken where one word may fill the text; a quadratic encoder would show in the suite's time."""
    tiktoken = pytest.importorskip("tiktoken")
    twin = tiktoken.Encoding(
        "twin", pat_str=trained.split_pattern, mergeable_ranks=trained.mergeable_ranks, special_tokens={}
    )
    for length in (1000, 20_000):
        text = FAMILIES[name] * (length // len(FAMILIES[name]) + 1)
        for variant in (text, text + "!", "x" + text, " " + text):
            assert trained.encode_ordinary(variant) == twin.encode_ordinary(variant)
    long = FAMILIES[name] * (1_000_000 // len(FAMILIES[name]))
    assert trained.decode(trained.encode_ordinary(long)) == long


@pytest.mark.parametrize("cache_bytes", [0, 1, 1 << 18, 1 << 19, 1 << 24])
def test_cache_sizes_leave_ids_alone(trained, cache_bytes):
    """More words than a small cache holds, short and long ones, of few ids and of many, again and again."""
    rng = random.Random(9)
    words = words_over("abcdefghij", rng, 20_000, 10) + words_over("абвгд中文字", rng, 4_000, 40)
    rng.shuffle(words)
    text = " ".join(words + words[::-1] + ["z" * 1500, "q" * 900] * 20)
    other = Tokenizer(trained.mergeable_ranks, {}, trained.split_pattern, cache_bytes=cache_bytes)
    wanted = [trained.encode_ordinary(text[i : i + 50_000]) for i in range(0, len(text), 50_000)]
    for _ in range(2):
        assert [other.encode_ordinary(text[i : i + 50_000]) for i in range(0, len(text), 50_000)] == wanted
    uncached = Tokenizer(trained.mergeable_ranks, {}, trained.split_pattern, cache_bytes=0)
    assert uncached.encode_ordinary(text) == other.encode_ordinary(text)


def test_words_that_end_with_zeros(trained):
    """A cache key is padded with zeros: the length must be part of it."""
    texts = [b"ab" + bytes(n) for n in range(20)] + [bytes(n) for n in range(1, 20)]
    once = [trained.encode_ordinary(text) for text in texts]
    assert [trained.encode_ordinary(text) for text in texts] == once
    assert [trained.decode_bytes(ids) for ids in once] == texts


def test_negative_cache_is_refused():
    for cache_bytes in (-1, 1 << 62):
        with pytest.raises(
            ValueError, match=rf"Tokenizer: cache_bytes must be in \[0, 2\*\*40\], got {cache_bytes}; 0"
        ):
            Tokenizer(BYTES, {}, cache_bytes=cache_bytes)
