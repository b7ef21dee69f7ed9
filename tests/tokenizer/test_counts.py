"""Word counts in memory: against a naive twin over the `regex` package, and what may not change a count."""

import os
import random
import signal
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdkern.tokenizer import LLAMA3_SPLIT_PATTERN, WordCounts, extend_vocabulary, split_words, train_bpe

DOCUMENTS = [
    "the cat sat on the mat, the other cat sat on the hat",
    "aaaa aaaaaaa abababab bababa aabaab",
    "it's 1234 o'clock\n\n\nthe   cat\r\n",
    "ééé Жжж 中中中 中中",
    "a" * 15 + " " + "a" * 16 + " " + "a" * 17 + " " + "b" * 5000,
]


def count_naively(documents):
    return Counter(word for document in documents for word in split_words(document))


def test_counts_are_those_of_the_regex_package(small_texts):
    regex = pytest.importorskip("regex")
    pattern = regex.compile(LLAMA3_SPLIT_PATTERN)
    texts = DOCUMENTS + small_texts[:60]
    naive = Counter(word.encode() for text in texts for word in pattern.findall(text))
    counts = WordCounts().add(text for text in texts)
    assert dict(counts.items()) == naive
    assert [word for word, _ in counts.items()] == sorted(naive)
    assert len(counts) == len(naive)
    assert counts.num_occurrences == naive.total()


def test_documents_are_borders():
    assert dict(WordCounts().add(["a ", "b", " ", "c"]).items()) == {b"a": 1, b" ": 2, b"b": 1, b"c": 1}


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads_and_order_do_not_matter(small_texts, tmp_path, num_threads):
    shuffled = random.Random(num_threads).sample(small_texts, len(small_texts))
    WordCounts().add(small_texts, num_threads=1).save(tmp_path / "one")
    WordCounts().add(iter(shuffled), num_threads=num_threads).save(tmp_path / "many")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()


def test_words_met_while_a_part_of_the_table_grows_are_counted(tmp_path):
    """Eight threads and nothing but new words, shorter and longer than a key, from texts that are turned into UTF-8:
    the words of a part that grows are set aside, and the memory they were in is written over."""
    rng = np.random.default_rng(5)
    letters = rng.integers(ord("a"), ord("z") + 1, (150_000, 26), dtype=np.uint8)
    letters[:, 0] = letters[:, 10] = ord(" ")
    text = letters.tobytes().decode()
    texts = [text[i : i + 13_000] + "中" for i in range(0, len(text), 13_000)]
    WordCounts().add(texts, num_threads=1).save(tmp_path / "one")
    counts = WordCounts().add(texts, num_threads=8)
    counts.save(tmp_path / "many")
    assert len(counts) > 299_000
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()


# Words that share their first 8 and 16 bytes, that end in zeros, and that are as long as the borders of the key.
ends = st.sampled_from([b"", b"\0", b"\0\0", b"a", b"aa", b"b", b"\xff"])
words = st.builds(lambda n, end, tail: b"a" * n + end + tail, st.integers(0, 40), ends, ends).filter(len)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.dictionaries(words, st.integers(1, 1 << 40), max_size=40), max_size=4))
def test_a_table_is_a_counter(parts):
    naive: Counter[bytes] = Counter()
    counts = WordCounts()
    for part in parts:
        naive.update(part)
        counts.add_words(part)
    assert list(counts.items()) == sorted(naive.items())


def test_a_growing_table_loses_nothing():
    rng = random.Random(1)
    naive = Counter(rng.randbytes(rng.randint(1, 24)) for _ in range(60_000))
    counts = WordCounts().add_words(naive)
    more = Counter(dict.fromkeys(rng.sample(sorted(naive), 1000), 3))
    assert dict(counts.add_words(more).items()) == naive + more


def test_merge_and_prune(small_texts):
    texts = small_texts[:60]
    parts = [WordCounts().add(texts[i::3], num_threads=i + 1) for i in range(3)]
    assert dict(parts[2].merge(parts[0]).merge(parts[1]).items()) == count_naively(texts)
    counts = WordCounts().add(["a b"]).add("a")
    assert dict(counts.merge(counts).items()) == {b"a": 4, b" b": 2}
    counts = WordCounts().add(["a b", "a c a", "a"], num_threads=2)
    assert dict(counts.prune(2).items()) == {b"a": 3}
    assert len(counts.prune(4)) == 0


def test_counts_are_64_bit():
    counts = WordCounts().add_words({b"a": (1 << 63) - 2, b"c": 1 << 33}).add("a").add("c")
    assert dict(counts.items()) == {b"a": (1 << 63) - 1, b"c": (1 << 33) + 1}
    with pytest.raises(OverflowError, match=r"2\*\*63"):
        counts.add("a")
    with pytest.raises(OverflowError, match=r"2\*\*63"):
        counts.merge(counts)


@pytest.mark.parametrize("counts", [{b"": 1}, {b"a": 0}, {b"a": -1}, {b"a": 1 << 63}, {b"a": 1.5}], ids=str)
def test_bad_counts_are_refused(counts):
    with pytest.raises(ValueError, match=r"WordCounts\.add_words: counts must be whole numbers in"):
        WordCounts().add_words(counts)


def test_bad_texts_are_refused():
    with pytest.raises(ValueError, match=r"texts\[2\] must be text that UTF-8 can hold"):
        WordCounts().add(["a", "b", "c\udfff"])
    with pytest.raises(TypeError, match=r"texts\[1\] must be str or bytes, got NoneType"):
        WordCounts().add(["a", None])


def test_words_of_two_unicode_versions_do_not_mix(tmp_path):
    counts = WordCounts().add("a")
    counts.unicode = "15.0.0"
    counts.save(tmp_path / "old")
    loaded = WordCounts.load(tmp_path / "old")
    with pytest.raises(ValueError, match=r"WordCounts\.add: .* got 15\.0\.0; count the texts again"):
        loaded.add("a")
    assert dict(loaded.items()) == {b"a": 1}


def test_counts_of_another_unicode_version_are_not_taken_silently(tmp_path):
    counts = WordCounts().add(["ab ab"])
    counts.unicode = "15.0.0"
    counts.save(tmp_path / "old")
    base = train_bpe(["ab"], 257, special_tokens=())
    for source in (counts, tmp_path / "old"):
        with pytest.warns(UserWarning, match=r"train_bpe: counts should be .* got 15\.0\.0: .*count the texts again"):
            tokenizer = train_bpe(source, 257, special_tokens=())
        assert tokenizer == base
        with pytest.warns(UserWarning, match=r"extend_vocabulary: counts should be .* got 15\.0\.0"):
            extend_vocabulary(base, {"de": source}, 1, guard=["x"])


def test_strings_of_every_width_are_counted_as_their_bytes():
    """ASCII, Latin-1, UCS-2 and UCS-4, in pieces that begin and end at every place of a group of eight."""
    texts = [wide * i + "ascii text " * (i % 5) + wide for wide in ("", "é", "ж€", "😀é") for i in range(40)]
    texts += ["x" * 300_000 + "é", "é" * 200_000, "中 " * 100_000, "😀" * 70_000 + "a b"]  # longer than a task
    naive = Counter(word for text in texts for word in split_words(text))
    for num_threads in (1, 2, 3):
        assert dict(WordCounts().add(texts, num_threads=num_threads).items()) == naive


def test_the_first_lone_surrogate_is_told_and_nothing_is_counted():
    texts = ["fine é"] * 50_000
    texts[20_003], texts[40_001] = "x" * 700 + "\ud800", "\udfff😀"
    for num_threads in (1, 3):
        counts = WordCounts()
        with pytest.raises(ValueError, match=r"texts\[20003\] must be text .* a lone surrogate at character 700;"):
            counts.add(texts, num_threads=num_threads)
        assert len(counts) == 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # that is what is tested
def test_a_forked_child_does_not_wait_for_a_thread_that_it_lacks():
    """The child of a process that was counting says so; a lock held by nobody would stop it for ever."""
    counts = WordCounts()
    texts = ["a b c d " * 50_000] * 40
    worker = threading.Thread(target=counts.add, args=(texts,), kwargs={"num_threads": 1})
    worker.start()
    told = []
    while worker.is_alive() and b"forked" not in told:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            try:
                len(counts)
                os.write(write, b"free")  # forked between two batches
            except RuntimeError as error:
                os.write(write, b"forked" if "is forked" in str(error) else b"other")
            finally:
                os._exit(0)
        os.close(write)
        told.append(os.read(read, 10))
        os.close(read)
        os.waitpid(child, 0)
    worker.join()
    assert b"forked" in told, told
    assert set(told) <= {b"forked", b"free"}
    assert counts.num_occurrences == 40 * 50_000 * 4 + 40  # the parent is not disturbed


def test_other_patterns():
    counts = WordCounts("gpt2").add("it's 12345")
    assert dict(counts.items()) == {b"it": 1, b"'s": 1, b" 12345": 1}
    with pytest.raises(ValueError, match=r"WordCounts\.merge: other must be split by"):
        counts.merge(WordCounts())
