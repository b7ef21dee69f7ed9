"""Encoding and decoding against tiktoken, against a naive twin, and as a round trip."""

import itertools
import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdkern.tokenizer import LLAMA3_SPLIT_PATTERN, Tokenizer, split_words, train_bpe

BYTES = {bytes([b]): b for b in range(256)}
# Runs, overlaps and a token ("abcd") that no two other tokens make.
RUNS = [
    b"aa",
    b"ab",
    b"aab",
    b"aaaa",
    b"ba",
    b"abab",
    b"  ",
    b"    ",
    b" a",
    b"abcd",
    b"\n\n",
    b"\xe4\xb8",
    b"\xe4\xb8\xad",
]
SPECIAL = {"<|end|>": 300, "<|end|>more": 301, "[x]": 302}
TINY = Tokenizer({**BYTES, **{token: 256 + i for i, token in enumerate(RUNS)}}, SPECIAL)


def encode_naively(tokenizer, data):
    """The definition: merge the leftmost pair of lowest rank until none is left."""
    ranks = tokenizer.mergeable_ranks
    ids = []
    for word in split_words(data):
        parts = [word] if word in ranks else [bytes([b]) for b in word]
        while True:
            joined = [ranks.get(a + b, 1 << 60) for a, b in itertools.pairwise(parts)]
            if not joined or min(joined) == 1 << 60:
                break
            at = joined.index(min(joined))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def tiktoken_of(tokenizer):
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.Encoding(
        "twin",
        pat_str=tokenizer.split_pattern,
        mergeable_ranks=tokenizer.mergeable_ranks,
        special_tokens=tokenizer.special_tokens,
    )


def assert_same_ids(tokenizer, texts):
    ids, offsets = tokenizer.encode_to_numpy(texts)
    theirs = tiktoken_of(tokenizer).encode_ordinary_batch(texts)
    assert np.array_equal(np.diff(offsets), [len(t) for t in theirs])
    assert np.array_equal(ids, np.fromiter(itertools.chain.from_iterable(theirs), np.uint32))


def test_same_ids_as_tiktoken(trained, mixed_texts):
    assert_same_ids(trained, mixed_texts)


def test_same_ids_as_tiktoken_cl100k(cl100k_ranks, mixed_texts):
    assert_same_ids(Tokenizer(cl100k_ranks, {}), mixed_texts)


@pytest.mark.full
@pytest.mark.parametrize("ranks", ["trained", "cl100k_ranks"])
def test_same_ids_as_tiktoken_on_50_mb(request, ranks, full_texts):
    ranks = request.getfixturevalue(ranks)
    tokenizer = ranks if isinstance(ranks, Tokenizer) else Tokenizer(ranks, {})
    assert sum(len(text.encode()) for text in full_texts) >= 50_000_000
    assert_same_ids(tokenizer, full_texts)


@settings(max_examples=600, deadline=None)
@given(
    st.lists(st.sampled_from([b"a", b"b", b"ab", b"cd", b" ", b"\n", "中".encode(), b"\xe4", b"1"]), max_size=100).map(
        b"".join
    )
)
def test_naive_twin(data):
    assert TINY.encode_ordinary(data) == encode_naively(TINY, data)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_naive_twin_on_text(trained, text):
    assert trained.encode_ordinary(text) == encode_naively(trained, text)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 47, 48, 49, 50, 63, 64, 65, 100, 1000])
def test_word_lengths(trained, length):
    """Around the limits of the word cache and of the search without a heap."""
    rng = random.Random(length)
    for alphabet in ("a", "ab", "etaoin", "中文", "éа"):
        text = "".join(rng.choices(alphabet, k=length))
        assert TINY.encode_ordinary(text) == encode_naively(TINY, text)
        assert trained.encode_ordinary(text) == encode_naively(trained, text)


@pytest.mark.parametrize("unit", ["a", "ab", "\n", " ", "中", "-"])
def test_long_words(trained, unit):
    """A quadratic encoder would not end here within the hour. tiktoken itself gives up on 10^6 spaces."""
    text = unit * 200_000
    assert trained.encode_ordinary(text) == tiktoken_of(trained).encode_ordinary(text)
    assert trained.decode(trained.encode_ordinary(text * 5)) == text * 5


def test_every_byte_string_comes_back(trained):
    rng = np.random.default_rng(17)
    lengths = rng.integers(0, 40, 100_000)
    blob = rng.integers(0, 256, lengths.sum(), dtype=np.uint8)
    blob[rng.random(blob.size) < 0.5] %= 128
    ends = np.cumsum(lengths).tolist()
    texts = [blob[begin:end].tobytes() for begin, end in itertools.pairwise([0, *ends])]
    ids, offsets = trained.encode_to_numpy(texts)
    assert [trained.decode_bytes(ids[a:b]) for a, b in itertools.pairwise(offsets.tolist())] == texts


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([1, 3]))
def test_bytes_round_trip(trained, data, num_threads):
    for tokenizer in (TINY, trained):
        assert tokenizer.decode_bytes(tokenizer.encode(data, disallowed_special=())) == data
        assert tokenizer.encode_batch([data, b"", data], disallowed_special=(), num_threads=num_threads)[2] == (
            tokenizer.encode_ordinary(data)
        )


def test_every_id_is_a_token(trained):
    for token, rank in trained.mergeable_ranks.items():
        assert trained.token_bytes(rank) == token
    for name, token_id in trained.special_tokens.items():
        assert trained.decode([token_id]) == name


def test_batches_agree(trained, small_texts):
    texts = small_texts[:60]
    alone = [trained.encode(text) for text in texts]
    for num_threads in (1, 2, 7):
        ids, offsets = trained.encode_to_numpy(texts, num_threads=num_threads)
        assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
        assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())] == alone
        assert trained.encode_batch(texts, num_threads=num_threads) == alone
        assert trained.encode_ordinary_batch(texts, num_threads=num_threads) == alone
        assert trained.count_tokens_batch(texts, num_threads=num_threads).tolist() == [len(ids) for ids in alone]
    assert trained.count_tokens(texts[0]) == len(alone[0])
    assert trained.decode_batch(alone) == texts
    assert trained.decode_batch(*trained.encode_to_numpy(texts)) == texts
    assert trained.decode_batch(ids, [0, 5, 5, 9]) == [trained.decode(ids[:5]), "", trained.decode(ids[5:9])]
    assert trained.decode(ids) == "".join(texts)


@pytest.mark.parametrize("texts", [[], [""], ["", ""], [b"", "a", ""]], ids=str)
def test_empty_texts(texts):
    ids, offsets = TINY.encode_to_numpy(texts)
    assert offsets.tolist() == [0, *itertools.accumulate(len(text) for text in texts)]
    assert len(ids) == offsets[-1]
    assert TINY.decode([]) == ""


def test_many_distinct_words_leave_ids_alone(trained):
    """More words than the cache holds, twice."""
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdefghij", k=rng.randrange(1, 9))) for _ in range(200_000)]
    text = " ".join(words)
    first, second = trained.encode_ordinary(text), trained.encode_ordinary(text)
    assert first == second == tiktoken_of(trained).encode_ordinary(text)


POLICIES = [
    {},
    {"allowed_special": "all"},
    {"allowed_special": {"<|end|>"}},
    {"disallowed_special": ()},
    {"allowed_special": {"[x]"}, "disallowed_special": ()},
    {"allowed_special": {"[x]"}, "disallowed_special": {"<|end|>more"}},
    {"disallowed_special": {"[x]"}},
    {"allowed_special": "all", "disallowed_special": {"[x]"}},
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(
    "text", ["", "plain", "a<|end|>b", "<|end|>", "[x][x] [y", "a  [x]  b", "<|end|", "<|END|>", "x\n<|end|>\n\n[x]'s"]
)
def test_special_tokens_as_tiktoken(policy, text):
    """tiktoken does not say which of two special tokens with a common beginning wins: leave one of them out there."""
    tokenizer = Tokenizer(TINY.mergeable_ranks, {name: i for name, i in SPECIAL.items() if name != "<|end|>more"})
    policy = {key: names if names == "all" else set(names) - {"<|end|>more"} for key, names in policy.items()}
    twin = tiktoken_of(tokenizer)
    try:
        wanted = twin.encode(text, **policy)
    except ValueError:
        with pytest.raises(ValueError, match="encode: text must not hold a disallowed special token, got"):
            tokenizer.encode(text, **policy)
    else:
        assert tokenizer.encode(text, **policy) == wanted
        assert tokenizer.encode_batch([text], **policy) == [wanted]


def test_longest_special_token_wins():
    assert TINY.encode("a<|end|>more<|end|>mor", allowed_special="all") == [97, 301, 300, *b"mor"]


def test_special_tokens_of_several_beginnings_and_bytes(trained):
    text = "".join(f"{name} " for name in trained.special_tokens)
    wanted = list(itertools.chain.from_iterable((i, *trained.encode(" ")) for i in trained.special_tokens.values()))
    assert trained.encode(text, allowed_special="all") == wanted
    assert trained.encode(text.encode(), allowed_special="all") == wanted
    assert trained.bos_id == trained.special_tokens["<|begin_of_text|>"]
    assert trained.eos_id == trained.special_tokens["<|end_of_text|>"]


def test_special_tokens_that_begin_alike():
    """Every subset of tokens that are each other's beginnings, wherever the search for one leaves off."""
    names = ["<a", "<ab", "<abc", "<b", "a>", "<abcc<a"]
    tokenizer = Tokenizer(BYTES, {name: 300 + i for i, name in enumerate(names)})
    rng = random.Random(11)
    for _ in range(300):
        text = "".join(rng.choices(["<", "a", "b", "c", ">", "<ab", " "], k=12))
        allowed = {name for name in names if rng.random() < 0.5}
        wanted, at = [], 0
        while at < len(text):
            name = max((n for n in allowed if text.startswith(n, at)), key=len, default=text[at])
            wanted.append(tokenizer.special_tokens[name] if name in allowed else ord(name))
            at += len(name)
        assert tokenizer.encode(text, allowed_special=allowed, disallowed_special=()) == wanted


def test_disallowed_tokens_are_refused_wherever_they_are():
    for encode in (TINY.encode, lambda text: TINY.encode_batch(["a", text]), TINY.encode_with_offsets):
        with pytest.raises(ValueError, match=r"must not hold a disallowed special token, got '<\|end\|>more'; pass"):
            encode("é" * 100 + "<|end|>more")
    ids, _ = TINY.encode_to_numpy(["[x]"], allowed_special={"[x]"})
    assert ids.tolist() == [302]
    assert TINY.encode_to_numpy(["[x]"])[0].tolist() == [*b"[x]"]


def test_unknown_special_tokens_are_refused():
    with pytest.raises(ValueError, match=r"encode: allowed_special must be special tokens .*got \['<y>'\]"):
        TINY.encode("a", allowed_special={"<y>"})
    with pytest.raises(ValueError, match="the tokenizer must have <"):
        TINY.bos_id  # noqa: B018


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([97, 303], ValueError, r"ids\[1\] must be a token id in \[0, 303\), got 303$"),
        ([-1], ValueError, r"ids\[0\] must be a token id in \[0, 303\), got -1$"),
        ([270], ValueError, r"ids\[0\] must be a token id in \[0, 303\), got 270, which no token has"),
        ([1.5], TypeError, "must be a flat list of integers, got 1.5 at 0"),
        ([[1]], TypeError, r"got \[1\] at 0"),
        (np.ones((1, 1), int), TypeError, r"got int64 of shape \(1, 1\)"),
        (["a"], TypeError, "must be a flat list of integers"),
        ([97, 1 << 70], TypeError, "must be a flat list of integers, got 1180591620717411303424 at 1"),
        (np.array([97, 303], np.uint32), ValueError, r"ids\[1\] must be a token id in \[0, 303\), got 303$"),
        (np.array([97.0]), TypeError, "must be a flat list of integers, got float64"),
    ],
)
def test_unknown_ids_are_refused(ids, error, message):
    with pytest.raises(error, match=message):
        TINY.decode(ids)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_ids_of_any_integer_type(dtype):
    assert TINY.decode(np.array([104, 105], dtype)) == "hi"


@pytest.mark.parametrize("offsets", [[0, 3], [-1, 1], [1, 0]], ids=str)
def test_bad_offsets_are_refused(offsets):
    with pytest.raises(ValueError, match="decode_batch: offsets must rise from 0 to at most 2, got"):
        TINY.decode_batch(np.array([104, 105], np.uint32), offsets)


def test_long_tokens_come_back():
    """Tokens around the 15 bytes that the kernels copy at once, also as the last of the text."""
    tokens = [b"x" * n for n in range(2, 40)]
    tokenizer = Tokenizer({**BYTES, **{token: 256 + i for i, token in enumerate(tokens)}}, {"<|a long special|>": 400})
    for n in range(1, 60):
        for text in ("x" * n, "y" + "x" * n, "x" * n + "y"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([400, 120, 400]) == "<|a long special|>x<|a long special|>"


def test_cut_characters():
    ids = TINY.encode("日")
    assert TINY.decode(ids[:-1]) == "\ufffd"
    with pytest.raises(UnicodeDecodeError):
        TINY.decode(ids[:-1], errors="strict")


@pytest.mark.parametrize("highest", [0xFF, 0xFFFF, 0x10FFFF], ids=hex)
def test_texts_of_every_width(trained, highest):
    """A str holds 1, 2 or 4 bytes a character; all borders of UTF-8 lie within and between groups of characters."""
    rng = random.Random(highest)
    borders = [0, 0x7F, 0x80, 0xFF, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]
    borders = [c for c in borders if c <= highest]
    texts = []
    for length in [*range(70), 1000]:
        few = rng.sample(borders, rng.randrange(1, len(borders) + 1))
        texts += ["".join(chr(rng.choice(few)) for _ in range(length)) + chr(highest) for _ in range(4)]
    ids, offsets = trained.encode_to_numpy(texts)
    wanted, their_offsets = trained.encode_to_numpy([text.encode() for text in texts])
    assert np.array_equal(ids, wanted)
    assert np.array_equal(offsets, their_offsets)
    for length in (0, 5, 16, 40):
        for half in ("\ud800", "\udfff"):
            with pytest.raises(ValueError, match=rf"encode: texts\[1\] .* a lone surrogate at character {length};"):
                trained.encode_to_numpy(["good", "é" * length + half + chr(highest)])


def test_bad_texts_are_refused():
    with pytest.raises(
        ValueError, match="encode: text must be text that UTF-8 can hold, got a lone surrogate at character 2"
    ):
        TINY.encode("ab\udc80")
    with pytest.raises(ValueError, match=r"encode: texts\[1\] must be text that UTF-8 can hold"):
        TINY.encode_to_numpy(["ab", "\ud800"])
    with pytest.raises(TypeError, match=r"encode: texts\[0\] must be str or bytes, got int"):
        TINY.encode_to_numpy([7])
    with pytest.raises(TypeError, match=r"encode: texts must be a list of texts, got one str; pass \[text\]"):
        TINY.encode_batch("one text", disallowed_special=())


@pytest.mark.parametrize(
    ("ranks", "special", "message"),
    [
        ({token: rank for token, rank in BYTES.items() if rank != 65}, {}, "must hold every single byte, lacks b'A'"),
        ({**BYTES, b"": 256}, {}, "tokens must not be empty"),
        (BYTES, {"": 256}, "tokens must not be empty"),
        ({**BYTES, b"ab": 65}, {}, "ids must differ, got 65 for b'A' and b'ab'"),
        (BYTES, {"<s>": 65}, "ids must differ, got 65 for b'A' and '<s>'"),
        ({**BYTES, b"ab": 1 << 21}, {}, r"must be in \[0, 2097152\), got 2097152"),
        ({**BYTES, b"ab": -1}, {}, "got -1"),
        ({**BYTES, b"ab": 256, b"ac": 256}, {}, "ids must differ, got 256 for b'ab' and b'ac'"),
        ({**BYTES, b"ab": 256}, {"ab": 257}, "special token 'ab' must not be an ordinary token as well"),
    ],
)
def test_bad_vocabularies_are_refused(ranks, special, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(ranks, special)


def test_pickle_equality_and_hash(trained):
    copy = pickle.loads(pickle.dumps(trained))
    assert copy == trained
    assert hash(copy) == hash(trained)
    assert copy.encode("Hello world") == trained.encode("Hello world")
    assert pickle.loads(pickle.dumps(Tokenizer(BYTES, {}, "llama3", cache_bytes=7))).cache_bytes == 7
    others = [
        Tokenizer(trained.mergeable_ranks, {}),
        Tokenizer({**trained.mergeable_ranks, b"qzqz": 5000}, trained.special_tokens),
        train_bpe(["a"], 300),
    ]
    assert all(other != trained and other.sha256 != trained.sha256 for other in others)
    assert repr(trained) == "Tokenizer(n_vocab=4000, num_special=16)"
    assert trained.split_pattern == LLAMA3_SPLIT_PATTERN


def test_python_threads(trained, small_texts):
    wanted = trained.encode_batch(small_texts[:40], num_threads=1)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(trained.encode, small_texts[:40])) == wanted


def test_many_threads_and_forks_at_once(trained, small_texts):
    """Children forked while other threads encode: they must neither hang nor differ."""
    texts = small_texts[:20]
    wanted = trained.encode_batch(texts, num_threads=1)
    with ThreadPoolExecutor(3) as pool:
        busy = [pool.submit(trained.encode_batch, small_texts[:40], num_threads=2) for _ in range(12)]
        children = []
        for _ in range(8):
            child = os.fork()
            if child == 0:
                os._exit(0 if trained.encode_batch(texts, num_threads=2) == wanted else 1)
            children.append(child)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 8
        assert all(task.result()[:20] == wanted for task in busy)


def test_forked_child_encodes(trained):
    trained.encode_batch(["warm"] * 100, num_threads=2)
    wanted = trained.encode("Hello world")
    child = os.fork()
    if child == 0:
        os._exit(0 if trained.encode_batch(["Hello world"] * 50, num_threads=2) == [wanted] * 50 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
