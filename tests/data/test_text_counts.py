import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdkern.data.text_counts import (
    DUPLICATE_NGRAMS,
    STOP_WORDS,
    TERMINAL,
    TOP_NGRAMS,
    line_counts,
    num_sentences,
    quality_counts,
    repetition_counts,
    words_of,
)


def naive_shares(words):
    total = sum(map(len, words))
    shares = {}
    for size in (*TOP_NGRAMS, *DUPLICATE_NGRAMS):
        grams = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
        if size in TOP_NGRAMS:
            best = max((sum(map(len, gram)) * count for gram, count in grams.items() if count > 1), default=0)
            shares[f"top_{size}gram"] = min(1.0, best / total) if total else 0.0
        else:
            covered = set()
            for i in range(len(words) - size + 1):
                if grams[tuple(words[i : i + size])] > 1:
                    covered.update(range(i, i + size))
            shares[f"duplicate_{size}gram"] = sum(len(words[i]) for i in covered) / total if total else 0.0
    return shares


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("你好。世界再见，朋友。", ["你", "好。", "世", "界", "再", "见，", "朋", "友。"]),
        ("Python是一种语言", ["Python", "是", "一", "种", "语", "言"]),
        ("สวัสดี ครับ", ["ส", "วั", "ส", "ดี", "ค", "รั", "บ"]),
        ("𠀀、ab c", ["𠀀、", "ab", "c"]),
        ("hello, it's", ["hello,", "it's"]),
    ],
)
def test_punctuation_does_not_swallow_what_is_written_without_spaces(text, words):
    assert words_of(text) == words


@pytest.mark.parametrize("mark", list("。！？｡؟۔।॥။។։።"))
def test_every_full_stop_that_ends_a_line_ends_a_sentence(mark):
    assert mark in TERMINAL
    assert num_sentences(f"ab{mark} cd{mark}") == 2


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "日", "ee"]), max_size=60))
def test_ngram_shares_equal_the_naive_ones(words):
    counts = repetition_counts(" ".join(words), words)
    for name, share in naive_shares(words).items():
        assert counts[name] == pytest.approx(share, abs=1e-12), name


def test_ngram_shares_of_long_texts():
    rng = random.Random(0)
    for size in (1000, 5000):
        words = [str(rng.randrange(30)) for _ in range(size)]
        words[size // 2 : size // 2 + 50] = words[:50]
        counts = repetition_counts(" ".join(words), words)
        for name, share in naive_shares(words).items():
            assert counts[name] == pytest.approx(share, abs=1e-12), name


@pytest.mark.parametrize("text", ["", " ", "\n\n", "word", "one two\n\nthree"])
def test_short_texts_have_no_repetition(text):
    assert not any(repetition_counts(text, words_of(text)).values())


def test_repeated_lines_and_paragraphs():
    counts = repetition_counts("a\nbb\na\n\nccc\n\nccc\n\nccc", [])
    assert counts["duplicate_lines"] == 3 / 6
    assert counts["duplicate_line_characters"] == 7 / 13
    assert counts["duplicate_paragraphs"] == 2 / 4
    assert counts["duplicate_paragraph_characters"] == 6 / 15


def test_quality_counts():
    text = "# Head\n- one item here\n- the other...\nThe end of it, and that with 42 figures"
    counts = quality_counts(text, words_of(text), "en")
    assert counts["words"] == 18
    assert counts["bullet_lines"] == 2 / 4
    assert counts["ellipsis_lines"] == 1 / 4
    assert counts["symbol_ratio"] == 1 / 18
    assert counts["alpha_words"] == 14 / 18
    assert counts["stop_words"] == 5  # the, of, and, that, with
    assert quality_counts(text, words_of(text), "xx")["stop_words"] == -1


def test_unspaced_scripts_are_counted_by_character():
    assert words_of("河流从 abc 山上") == ["河", "流", "从", "abc", "山", "上"]
    assert quality_counts("河流", ["河", "流"], "zh")["unspaced"]


def test_line_counts():
    counts = line_counts("A sentence that is long enough to count.\nshort\nshort\nno end here at all, a line of it")
    assert counts["terminal_lines"] == 1 / 4
    assert counts["short_lines"] == 2 / 4
    assert counts["repeated_line_characters"] == pytest.approx(5 / 82)
    assert counts["newline_ratio"] == 3 / 19


def test_sentences():
    assert num_sentences('One. Two! "Three?" 3.14 is no end. 完了。') == 5


def test_stop_words_are_for_many_languages_and_lower_case():
    assert len(STOP_WORDS) >= 20
    for lang, words in STOP_WORDS.items():
        assert len(words.split()) >= 8, lang
        assert words == words.lower(), lang
