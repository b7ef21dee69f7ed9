"""Training that does not start from bytes alone: resume, initial tokens, files of counts, limits of memory."""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdkern.tokenizer import Tokenizer, WordCounts, split_words, train_bpe
from herdkern.tokenizer.export import byte_level_order

ORDERS = {"huggingface": byte_level_order(), "tiktoken": list(range(256))}


def replace(symbols, pair, token):
    """Every occurrence of the pair becomes the token, from left to right."""
    i = 0
    while i + 1 < len(symbols):
        if (symbols[i], symbols[i + 1]) == pair:
            symbols[i : i + 2] = [token]
        i += 1


class NaiveTrainer:
    """The definition: merges are applied in order, and all pairs are counted anew for every merge."""

    def __init__(self, order):
        self.tokens = [bytes([byte]) for byte in order]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.merges = []

    def append(self, left, right):
        joined = self.tokens[left] + self.tokens[right]
        if joined not in self.ids:
            self.ids[joined] = len(self.tokens)
            self.tokens.append(joined)
        self.merges.append(((left, right), self.ids[joined]))

    def cut(self, word):
        symbols = [self.ids[bytes([byte])] for byte in word]
        for pair, token in self.merges:
            replace(symbols, pair, token)
        return symbols

    def require(self, token):
        while len(parts := self.cut(token)) > 1:
            self.append(*parts[:2])

    def train(self, counts, vocab_size, min_frequency=1, max_token_length=None):
        words = [(self.cut(word), count) for word, count in counts.items()]
        while len(self.tokens) < vocab_size:
            pairs = Counter()
            for symbols, count in words:
                for left, right in itertools.pairwise(symbols):
                    if max_token_length is None or len(self.tokens[left] + self.tokens[right]) <= max_token_length:
                        pairs[left, right] += count
            best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
            if best is None or pairs[best] < min_frequency:
                break
            self.append(*best)
            for symbols, _ in words:
                replace(symbols, *self.merges[-1])
        return self.ids


WORD = st.lists(st.sampled_from([b"a", b"b", b"ab", b"c", b"\xff"]), min_size=1, max_size=12).map(b"".join)


@pytest.mark.parametrize("ties", ORDERS)
@settings(max_examples=200, deadline=None)
@given(
    counts=st.dictionaries(WORD, st.integers(1, 5) | st.integers(1, 1 << 40), min_size=1, max_size=20),
    given_merges=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12),
    required=st.lists(WORD, max_size=4),
    min_frequency=st.integers(0, 4),
    max_token_length=st.none() | st.integers(1, 6),
    num_threads=st.integers(1, 3),
    num_new=st.integers(0, 30),
)
def test_naive_twin_with_every_option(
    ties, counts, given_merges, required, min_frequency, max_token_length, num_threads, num_new
):
    """The given merges are of any two tokens, so many spell one that is there."""
    naive = NaiveTrainer(ORDERS[ties])
    pairs = []
    for left, right in given_merges:
        usable = [naive.ids[b"a"], naive.ids[b"b"], naive.ids[b"c"], *range(256, len(naive.tokens))]
        pair = usable[left % len(usable)], usable[right % len(usable)]
        pairs.append((naive.tokens[pair[0]], naive.tokens[pair[1]]))
        naive.append(*pair)
    for token in required:
        naive.require(token)
    vocab_size = len(naive.tokens) + num_new
    ours = train_bpe(
        counts,
        vocab_size,
        ties=ties,
        special_tokens=(),
        resume=pairs,
        initial_tokens=required,
        min_frequency=min_frequency,
        max_token_length=max_token_length,
        num_threads=num_threads,
    )
    assert ours.mergeable_ranks == naive.train(counts, vocab_size, min_frequency, max_token_length)


def test_a_token_spelled_twice_keeps_its_id():
    """abc is made of a and bc first; the words then spell it as ab and c, too."""
    merges = [(b"b", b"c"), (b"a", b"bc"), (b"a", b"b")]
    counts = {b"ab": 100, b"abd": 50, b"abcc": 3}
    ours = train_bpe(counts, 262, ties="tiktoken", special_tokens=(), resume=merges)
    assert list(ours.mergeable_ranks)[256:] == [b"bc", b"abc", b"ab", b"abd", b"abcc"]
    naive = NaiveTrainer(range(256))
    for left, right in merges:
        naive.append(naive.ids[left], naive.ids[right])
    assert ours.mergeable_ranks == naive.train(counts, 262)


@pytest.mark.parametrize("ties", ORDERS)
def test_resume_is_the_same_run(small_counts, ties):
    whole = train_bpe(small_counts, 3000, ties=ties)
    tokens = list(whole.mergeable_ranks)
    specials = list(whole.special_tokens)
    for k in (0, 1, *random.Random(3).sample(range(2, 2728), 4), 2728):
        ranks = {token: rank for rank, token in enumerate(tokens[: 256 + k])}
        start = Tokenizer(ranks, {name: 256 + k + i for i, name in enumerate(specials)})
        assert train_bpe(small_counts, 3000, ties=ties, resume=start) == whole


def test_resume_from_pairs_and_to_another_corpus(small_texts, small_counts):
    merges = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the")]
    tokenizer = train_bpe(small_counts, 2000, special_tokens=(), resume=merges)
    assert list(tokenizer.mergeable_ranks)[256:259] == [b"th", b"the", b" the"]
    more = train_bpe(small_texts[:50], 2500, special_tokens=(), resume=tokenizer)
    assert list(more.mergeable_ranks)[:2000] == list(tokenizer.mergeable_ranks)


def test_initial_tokens_are_reached(small_counts):
    required = ["herdkern", "zqzqzqzq", "the", "\u00e9\u4e2d"]
    tokenizer = train_bpe(small_counts, 2000, initial_tokens=required)
    for name in required:
        assert len(tokenizer.encode(name)) == 1, name
    tokens = list(tokenizer.mergeable_ranks)[256:]
    assert tokens[:9] == [b"he", b"her", b"herd", b"herdk", b"herdke", b"herdker", b"herdkern", b"zq", b"zqzq"]
    assert len(tokenizer.encode("zqzqzqzq")) == 1
    plain = train_bpe(small_counts, 2000)
    assert len(plain.encode("zqzqzqzq")) > 1  # else the test says nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": [(b"a", b"b"), (b"ab", b"cd")]}, r"resume\[1\] must be of two tokens .* got \(b'ab', b'cd'\)"),
        ({"resume": [(b"a", b"b"), (b"ab", b"c")], "vocab_size": 257}, "vocab_size must be at least 258 .* got 257"),
        ({"initial_tokens": ["abc"], "vocab_size": 257}, "vocab_size must be at least 258"),
        ({"vocab_size": 10**13}, "vocab_size must be at most 2097152, got 10000000000000"),
    ],
    ids=["unknown", "resume", "initial_tokens", "too large"],
)
def test_bad_starts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train_bpe(**{"texts_or_counts": {b"abc": 1}, "vocab_size": 300, "special_tokens": (), **options})


def test_foreign_tokenizers_are_refused(small_counts, trained):
    with pytest.raises(ValueError, match="must number the bytes as ties='tiktoken' does"):
        train_bpe(small_counts, 5000, ties="tiktoken", resume=trained)
    ranks = {**trained.mergeable_ranks, b"qzqzqz": len(trained.mergeable_ranks)}
    with pytest.raises(ValueError, match="tokens are all made by merges"):
        train_bpe(small_counts, 5000, resume=Tokenizer(ranks, {}))
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        train_bpe(small_counts, 5000, other=1)


def test_counts_from_a_file(small_counts, trained, tmp_path):
    small_counts.save(tmp_path / "counts")
    assert train_bpe(tmp_path / "counts", 4000) == trained
    assert train_bpe(str(tmp_path / "counts"), 4000, num_threads=2) == trained
    data = bytearray((tmp_path / "counts").read_bytes())
    data[-5] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        train_bpe(tmp_path / "damaged", 4000)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_merges_of_many_words_on_many_threads(num_threads):
    """Enough occurrences of a pair that the threads share one merge, in words that repeat it."""
    counts = {b"ab" * (1 + i % 3) + b"%05x" % i + b"ab": 1 + i % 7 for i in range(30_000)}
    one = train_bpe(counts, 1500, special_tokens=(), num_threads=1)
    assert train_bpe(counts, 1500, special_tokens=(), num_threads=num_threads) == one


def test_another_split_pattern(small_texts):
    texts = small_texts[:60]
    ours = train_bpe(texts, 1000, split_pattern="gpt2", special_tokens=())
    assert ours == train_bpe(WordCounts("gpt2").add(texts), 1000, special_tokens=())
    naive = NaiveTrainer(ORDERS["huggingface"])
    counts = Counter(word for text in texts for word in split_words(text, "gpt2"))
    assert ours.mergeable_ranks.items() >= naive.train(counts, 300).items()
    with pytest.raises(ValueError, match="split_pattern"):
        train_bpe(WordCounts("gpt2").add(texts), 1000, split_pattern="llama3")
    with pytest.raises(ValueError, match="split pattern"):
        train_bpe(texts, 1200, resume=ours, special_tokens=())


def test_counts_above_two_to_the_33():
    large = {b"ab": 1 << 34, b"bc": (1 << 34) + 1, b"abc": 1 << 40, b"cab": 1 << 60}
    naive = NaiveTrainer(range(256))
    assert train_bpe(large, 262, ties="tiktoken", special_tokens=()).mergeable_ranks == naive.train(large, 262)


def test_words_beyond_max_memory_are_refused(small_counts, trained):
    counts = WordCounts().merge(small_counts)
    counts.add_words({b"%x" % random.Random(i).getrandbits(1 << 12): 1 for i in range(12_000)})
    with pytest.raises(ValueError, match=r"room in memory.*got 1\d{7}; raise max_memory .* WordCounts\.prune"):
        train_bpe(counts, 4000, max_memory=held_memory() + (80 << 20))
    assert train_bpe(small_counts, 4000, max_memory=held_memory() + (80 << 20)) == trained


def held_memory():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096
