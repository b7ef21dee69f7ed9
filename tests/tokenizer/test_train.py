"""Training against a naive twin and against the trainers of Hugging Face and rustbpe."""

import itertools
import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdkern.tokenizer import LLAMA3_SPLIT_PATTERN, WordCounts, llama3_special_tokens, split_words, train_bpe
from herdkern.tokenizer.export import byte_level_order, merge_list, to_byte_level

DOCUMENTS = [
    "the cat sat on the mat, the other cat sat on the hat",
    "aaaa aaaaaaa abababab bababa aabaab",
    "it's 1234 o'clock\n\n\nthe   cat\r\n",
    "ééé Жжж 中中中 中中",
]


def count_naively(documents):
    return Counter(word for document in documents for word in split_words(document))


def train_naively(counts, num_merges, order, min_frequency=1, max_token_length=None):
    """The definition: count all pairs anew for every merge."""
    tokens = [bytes([byte]) for byte in order]
    rank = {token: i for i, token in enumerate(tokens)}
    words = [([rank[bytes([b])] for b in word], count) for word, count in counts.items()]
    for _ in range(num_merges):
        pairs = Counter()
        for symbols, count in words:
            for left, right in itertools.pairwise(symbols):
                if max_token_length is None or len(tokens[left]) + len(tokens[right]) <= max_token_length:
                    pairs[left, right] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < min_frequency:
            break
        for symbols, _ in words:
            i = 0
            while i + 1 < len(symbols):
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return {token: i for i, token in enumerate(tokens)}


ORDERS = {"huggingface": byte_level_order(), "tiktoken": list(range(256))}


@pytest.mark.parametrize("ties", ORDERS)
@pytest.mark.parametrize(
    "options", [{}, {"min_frequency": 3}, {"max_token_length": 3}, {"min_frequency": 2, "max_token_length": 2}], ids=str
)
def test_naive_twin(ties, options):
    tokenizer = train_bpe(DOCUMENTS, 256 + 120, ties=ties, special_tokens=(), **options)
    assert tokenizer.mergeable_ranks == train_naively(count_naively(DOCUMENTS), 120, ORDERS[ties], **options)


@pytest.mark.parametrize("ties", ORDERS)
@settings(max_examples=150, deadline=None)
@given(
    counts=st.dictionaries(
        st.lists(st.sampled_from([b"a", b"b", b"ab", b"\xff"]), min_size=1, max_size=12).map(b"".join),
        st.integers(1, 5) | st.integers(1, 1000),
        min_size=1,
        max_size=20,
    ),
    max_token_length=st.none() | st.integers(1, 6),
)
def test_naive_twin_on_runs(ties, counts, max_token_length):
    tokenizer = train_bpe(counts, 256 + 40, ties=ties, special_tokens=(), max_token_length=max_token_length)
    assert tokenizer.mergeable_ranks == train_naively(counts, 40, ORDERS[ties], max_token_length=max_token_length)


def train_huggingface(texts, vocab_size, **options):
    """(vocabulary, merges) of the Hugging Face trainer."""
    tokenizers = pytest.importorskip("tokenizers")
    split = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = split.Sequence(
        [
            split.Split(tokenizers.Regex(LLAMA3_SPLIT_PATTERN), "isolated"),
            split.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = split.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False, **options
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def as_huggingface(tokenizer):
    """(vocabulary, merges) of ours in the same form."""
    text_of = {rank: to_byte_level(token) for token, rank in tokenizer.mergeable_ranks.items()}
    merges, _ = merge_list(tokenizer.mergeable_ranks, tokenizer._encoder)
    return {text: rank for rank, text in text_of.items()}, [(text_of[a], text_of[b]) for a, b in merges]


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"min_frequency": 40}, {"min_frequency": 40}),
        ({"max_token_length": 5}, {"max_token_length": 6}),
    ],
    ids=["plain", "min_frequency", "max_token_length"],
)
def test_merges_of_hugging_face(small_texts, small_counts, options, theirs):
    ours = train_bpe(small_counts, 3000, special_tokens=(), **options)
    assert as_huggingface(ours) == train_huggingface(small_texts, 3000, **theirs)


@pytest.mark.full
def test_merges_of_hugging_face_at_32k(full_texts):
    """100 MB: 50 of them and their upper case, which has words of its own."""
    texts = [*full_texts, *(text.upper() for text in full_texts)]
    ours = train_bpe(texts, 32_768, special_tokens=())
    assert len(ours.mergeable_ranks) == 32_768
    assert as_huggingface(ours) == train_huggingface(texts, 32_768)


def test_merges_of_rustbpe(small_texts, small_counts):
    rustbpe = pytest.importorskip("rustbpe")
    theirs = rustbpe.Tokenizer()
    theirs.train_from_iterator(iter(small_texts), 3000, pattern=LLAMA3_SPLIT_PATTERN)
    ours = train_bpe(small_counts, 3000, ties="tiktoken", special_tokens=())
    assert ours.mergeable_ranks == {bytes(token): rank for token, rank in theirs.get_mergeable_ranks()}


def test_no_token_is_made_twice(small_counts):
    assert train_bpe(small_counts, 20_000).n_vocab == 20_000  # train_bpe refuses a double token


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads_and_order_do_not_matter(small_texts, trained, num_threads):
    shuffled = random.Random(num_threads).sample(small_texts, len(small_texts))
    assert train_bpe(iter(shuffled), 4000, num_threads=num_threads) == trained


def test_training_from_counts_is_training_from_texts(small_texts, small_counts, trained):
    counts = dict(small_counts.items())
    assert train_bpe(counts, 4000) == trained
    assert train_bpe({word.decode("utf-8"): n for word, n in counts.items()}, 4000) == trained


def test_counts_are_64_bit():
    large = {b"ab": 1 << 40, b"cd": (1 << 40) + 1, b"ef": 3, b"abcd": 1 << 61}
    small = {b"ab": 5, b"cd": 6, b"ef": 3, b"abcd": 1000}
    assert train_bpe(large, 260, special_tokens=()) == train_bpe(small, 260, special_tokens=())
    with pytest.raises(OverflowError, match="2\\*\\*63"):
        train_bpe({b"abc": 1 << 62}, 260, special_tokens=())
    counts = WordCounts().add_words({b"a": (1 << 63) - 1})
    with pytest.raises(OverflowError, match="2\\*\\*63"):
        counts.merge(counts)


def test_one_very_long_word():
    tokenizer = train_bpe(["a" * 300_000 + "b" + "ab" * 100_000], 256 + 30, special_tokens=())
    counts = {b"a" * 3000 + b"b" + b"ab" * 1000: 1}
    assert set(train_bpe(counts, 256 + 8, special_tokens=()).mergeable_ranks) <= set(tokenizer.mergeable_ranks)


def test_special_tokens_come_last():
    tokenizer = train_bpe(DOCUMENTS, 256 + 20 + 2, special_tokens=["<|a|>", "<|b|>"])
    assert tokenizer.special_tokens == {"<|a|>": 276, "<|b|>": 277}
    assert tokenizer.n_vocab == 278
    assert list(train_bpe(DOCUMENTS, 300).special_tokens) == list(llama3_special_tokens(16))


def test_vocabulary_ends_when_no_pair_is_left():
    tokenizer = train_bpe(["abc"], 1000, special_tokens=["<|end|>"])
    assert tokenizer.n_vocab == 259
    assert tokenizer.special_tokens == {"<|end|>": 258}
    assert train_bpe([], 1000, special_tokens=()).n_vocab == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 271}, "vocab_size must be at least 272 .*got 271"),
        ({"ties": "other"}, "ties must be 'huggingface' or 'tiktoken', got 'other'"),
        ({"min_frequency": -1}, "min_frequency must not be negative, got -1"),
        ({"max_token_length": 0}, "max_token_length must be at least 1, got 0"),
        ({"special_tokens": ["user"]}, "special token 'user' must not be a single word"),
        (
            {"special_tokens": ["\u0120!"]},
            "special token '\u0120!' must not be a single word",
        ),  # " !" in tokenizer.json
        ({"special_tokens": ["<|a|>"], "initial_tokens": ["<|a|>"]}, "must not be one of the tokens of initial_tokens"),
        ({"special_tokens": ["<|a|>", "<|a|>"]}, "special_tokens must differ"),
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train_bpe(**{"texts_or_counts": DOCUMENTS, "vocab_size": 300, **options})


def test_bad_texts_are_refused():
    with pytest.raises(
        ValueError, match=r"texts\[2\] must be text that UTF-8 can hold, got a lone surrogate at character 1"
    ):
        train_bpe(["a", "b", "c\udfff"], 300)
    with pytest.raises(TypeError, match=r"texts\[1\] must be str or bytes, got NoneType"):
        train_bpe(["a", None], 300)
    with pytest.raises(TypeError, match="pass \\[text\\]"):
        train_bpe("one string", 300)


def test_progress(small_counts):
    calls = []
    train_bpe(small_counts, 4000, special_tokens=(), progress=lambda done, wanted: calls.append((done, wanted)))
    assert calls[-1] == (3744, 3744)
    assert calls == sorted(calls)

    def stop(done, wanted):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        train_bpe(small_counts, 4000, progress=stop)


def test_llama3_special_tokens():
    names = llama3_special_tokens()
    assert len(names) == len(set(names)) == 256
    assert [names.index(f"<|{name}|>") for name in ("begin_of_text", "end_of_text", "finetune_right_pad_id")] == [
        0,
        1,
        4,
    ]
    assert [names.index(f"<|{name}|>") for name in ("start_header_id", "end_header_id", "eom_id", "eot_id")] == [
        6,
        7,
        8,
        9,
    ]
    assert names[10] == "<|python_tag|>"
    assert names[255] == "<|reserved_special_token_247|>"
    with pytest.raises(ValueError, match="at least 11, got 10"):
        llama3_special_tokens(10)
