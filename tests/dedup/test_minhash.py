import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdkern import _text
from herdkern.dedup.lines import line_keys
from herdkern.dedup.minhash import (
    estimate_jaccard,
    exact_jaccard,
    shingle_hashes,
    signature_spec,
    signatures,
    slot_parameters,
    word_factors,
)

_spec = importlib.util.spec_from_file_location("minhash_twin", Path(__file__).with_name("minhash_twin.py"))
twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(twin)

LEVELS = _text.minhash_levels()
WORDS = [
    "the",
    "Naïve",
    "CAFÉ",
    "ΣΊΣΥΦΟΣ",
    "Ёлка",
    "ŁÓDŹ",
    "x_1",
    "2024",
    "don't",
    "a" * 17,
    "Straße",
    "हिन्दी",
    "한국어",
    "العربية",
]
NASTY = [
    "", " ", "\n\n", "a", "A a", "one two three four", "one two three four five", "!!! ... ???", "😀 😀",
    "a\u00a0b\u3000c\u2003d\u0085e f", "iPhone手机很好用abc中文", "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "日本語のテキスト。カタカナ、ひらがな", "ភាសាខ្មែរ", "x" * 255, "x" * 256, "x" * 257, "é" * 700,
    "zero\u200bwidth soft\u00adhyphen", "\ufeffbom", "a\x00b", "\x1c\x1d words", "²³ ½ Ⅷ ①",
    "İstanbul ſs Kelvin Å", "𝒳𝒴 𠀀𠀁𠀂 🇩🇪", "tab\tsep\x0bvt", "_under_score_",
    "snake_case CamelCase kebab-case", "ς Σ σ", "Ա Բ Ֆ",
]  # fmt: skip


def as_bytes(text):
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")


def assert_like_twin(texts, ngram_size=5, seed=1, bands=3, rows=7):
    expected = np.array([twin.signature(as_bytes(t), bands * rows, ngram_size, seed) for t in texts], dtype=np.uint32)
    for level in LEVELS:
        got = signatures(
            texts, num_bands=bands, rows_per_band=rows, ngram_size=ngram_size, seed=seed, num_threads=1, level=level
        )
        assert got.dtype == np.uint32
        np.testing.assert_array_equal(got, expected, err_msg=level)


@pytest.mark.parametrize("ngram_size", [1, 2, 5, 8])
def test_signatures_equal_the_plain_definition_on_hard_texts(ngram_size):
    assert_like_twin(NASTY + WORDS + [" ".join(WORDS * 3)], ngram_size)


@pytest.mark.parametrize("shift", [*range(58, 70)])
def test_code_points_that_cross_a_block_of_64_bytes(shift):
    tails = ["É", "Ж", "手机很好用的", "𠀀𠀁", "\u00a0x", "\u3000x", "—x", "é" * 40, "中" * 40, "Ωmega中文Ж "]
    assert_like_twin(["a" * shift + tail + " end" for tail in tails] + ["b " * (shift // 2) + tail for tail in tails])


@pytest.mark.parametrize("slots", [(1, 1), (1, 15), (2, 8), (1, 17), (9, 13), (14, 8), (20, 13)])
def test_any_number_of_slots(slots):
    assert_like_twin(["to be or not to be that is the question", "Ünïcödé wörds äre wörds töö"], 3, 7, *slots)


# Unassigned characters are left out: what they become depends on the Unicode version.
ASSIGNED = st.text(st.characters(exclude_categories=["Cn", "Cs"]), max_size=200)


def has_unassigned(data):
    return any(twin.unicodedata.category(c) == "Cn" for c in data.decode("utf-8", "surrogateescape"))


@given(
    st.lists(
        st.one_of(ASSIGNED, st.binary(max_size=200).filter(lambda b: not has_unassigned(b))), min_size=1, max_size=3
    )
)
@settings(max_examples=150, deadline=None)
def test_signatures_equal_the_plain_definition(texts):
    assert_like_twin(texts, 2, bands=2, rows=3)


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_the_same_on_every_level(data):
    results = [signatures([data], num_bands=4, rows_per_band=4, num_threads=1, level=level) for level in LEVELS]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def library_texts(max_bytes):
    """Source files of the standard library: real text of many lengths."""
    texts, total = [], 0
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="surrogateescape"))
        total += len(texts[-1])
        if total > max_bytes:
            break
    return texts


def test_threads_and_levels_do_not_change_real_signatures():
    texts = library_texts(4_000_000)
    wanted = signatures(texts, num_bands=16, rows_per_band=8, num_threads=1, level="baseline")
    for level in LEVELS:
        for num_threads in (1, 2, 5):
            got = signatures(texts, num_bands=16, rows_per_band=8, num_threads=num_threads, level=level)
            np.testing.assert_array_equal(got, wanted)


def test_a_long_document_is_the_sum_of_its_windows():
    rng = np.random.default_rng(3)
    text = " ".join(f"w{i}" for i in rng.integers(0, 500, 9000))  # several batches of 2,048 words
    assert_like_twin([text], 5, bands=2, rows=4)
    assert shingle_hashes([text])[0].tolist() == twin.shingles(text.encode(), 5)


@pytest.mark.parametrize("text", [*NASTY, " ".join(WORDS)], ids=range(len(NASTY) + 1))
def test_shingles_equal_the_plain_definition(text):
    for level in LEVELS:
        assert shingle_hashes([text], level=level)[0].tolist() == twin.shingles(as_bytes(text), 5)


def test_every_kind_of_white_space_separates_words():
    spaces = [
        *range(0x9, 0xE),
        0x20,
        0x85,
        0xA0,
        0x1680,
        *range(0x2000, 0x200B),
        0x2028,
        0x2029,
        0x202F,
        0x205F,
        0x3000,
    ]
    plain = shingle_hashes(["alpha beta gamma delta epsilon zeta"])[0]
    for space in spaces:
        text = chr(space).join(["Alpha", "beta", "gamma", "delta", "Epsilon", "zeta"])
        np.testing.assert_array_equal(shingle_hashes([text])[0], plain, err_msg=f"U+{space:04X}")


def test_unassigned_and_lone_surrogates_are_accepted():
    texts = ["lone \ud800 surrogate and more words here", b"bytes \xff\xfe that are not utf-8 at all", "ok ok ok ok ok"]
    assert signatures(texts, num_bands=2, rows_per_band=2).shape == (3, 4)


def test_texts_without_words_have_an_empty_set():
    got = signatures(["", " \n\t", "!?…"], num_bands=2, rows_per_band=4)
    assert (got == 0xFFFFFFFF).all()


def test_no_documents():
    assert signatures([], num_bands=2, rows_per_band=4).shape == (0, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_bands": 0}, "num_bands must be at least 1, got 0"),
        ({"rows_per_band": -1}, "rows_per_band must be at least 1, got -1"),
        ({"ngram_size": 0}, "ngram_size must be at least 1, got 0"),
        ({"num_threads": 0}, "num_threads must be at least 1 or None, got 0"),
        ({"level": "avx9"}, "level must be auto or one of"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        signatures(["a"], **{"num_bands": 2, "rows_per_band": 2, **arguments})


def test_a_text_of_another_type_is_named():
    with pytest.raises(TypeError, match=r"every text must be str or bytes, got int at index 1"):
        signatures(["a", 5], num_bands=1, rows_per_band=1)


@pytest.mark.parametrize("text", ["one text", b"one text"])
def test_one_text_is_not_a_list_of_characters(text):
    kind = type(text).__name__
    for call in (
        lambda: signatures(text, num_bands=1, rows_per_band=1),
        lambda: shingle_hashes(text),
        lambda: line_keys(text),
        lambda: exact_jaccard(text, np.array([[0, 1]])),
    ):
        with pytest.raises(TypeError, match=rf"texts must be a list of texts, got one {kind}; pass \[text\]"):
            call()
    with pytest.raises(TypeError, match=r"signatures: texts must be a sequence, got generator; pass list\(texts\)"):
        signatures((t for t in "ab"), num_bands=1, rows_per_band=1)


def test_pairs_of_texts_have_two_columns():
    with pytest.raises(ValueError, match=r"exact_jaccard: pairs must have shape \(num_pairs, 2\), got \(2, 3\)"):
        exact_jaccard(["a b", "a c", "a d"], np.array([[0, 1, 2], [1, 2, 0]]))
    with pytest.raises(ValueError, match=r"exact_jaccard: pairs must lie in \[0, 1\), got 1"):
        exact_jaccard(["a b"], np.array([[0, 1]]))


def test_what_the_caches_hand_out_cannot_be_changed():
    for array in (*slot_parameters(4, 1), word_factors(5)):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 7


def test_signatures_of_other_settings_are_not_compared():
    a = signatures(["a b c"], num_bands=2, rows_per_band=2)
    b = signatures(["a b c"], num_bands=2, rows_per_band=3)
    with pytest.raises(ValueError, match="equally many slots, got 4 and 6"):
        estimate_jaccard(a, b)


def test_the_spec_names_everything_that_matters():
    spec = signature_spec(num_bands=20, rows_per_band=6, ngram_size=4, seed=9)
    assert spec == (
        "herdkern-minhash/1 words=unicode-16.0.0 ngram_size=4 family=fast32 num_bands=20 rows_per_band=6 seed=9"
    )
    multipliers, offsets = slot_parameters(120, 9)
    assert (multipliers % 2 == 1).all()
    assert len(set(multipliers.tolist())) == 120 == len(set(offsets.tolist()))
    assert (word_factors(5) % np.uint64(2) == 1).all()


def test_signatures_of_version_1_do_not_change():
    got = signatures(["The quick brown fox jumps over the lazy dog."], num_bands=1, rows_per_band=4)[0].tolist()
    assert got == [790355936, 638048574, 1822325907, 1414022350]


def test_a_lower_level_can_be_forced():
    code = "from herdkern import _text; print(_text.minhash_levels()[0])"
    for level in LEVELS:
        environment = {**os.environ, "HERDKERN_ISA": level}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
        )
        assert result.stdout.strip() == level


def pairs_of_known_similarity(num_pairs, rng):
    """Pairs of texts of distinct words and the exact Jaccard similarity of their 5-word shingles."""
    texts, exact = [], []
    for _ in range(num_pairs):
        size = int(rng.integers(60, 400))
        words = [f"w{i}" for i in rng.integers(0, 1 << 40, size)]
        other = list(words)
        for place in rng.choice(size, rng.integers(0, max(2, size // 8)), replace=False):
            other[place] = f"v{rng.integers(0, 1 << 40)}"
        first = {tuple(words[i : i + 5]) for i in range(size - 4)}
        second = {tuple(other[i : i + 5]) for i in range(size - 4)}
        texts += [" ".join(words), " ".join(other)]
        exact.append(len(first & second) / len(first | second))
    return texts, np.array(exact)


def check_estimates(num_pairs, num_slots, seeds, rng):
    """Mean and spread of the estimates against theory, with bounds that follow from the number of samples.

    With z = (estimate - J) / sqrt(J (1 - J) / num_slots), sum z^2 over n independent pairs has mean n and variance near
    2n + n * mean excess kurtosis; the bounds are 4 standard deviations, or 10 % of the variance where that is less.
    """
    texts, exact = pairs_of_known_similarity(num_pairs, rng)
    pairs = np.arange(2 * num_pairs).reshape(-1, 2)
    np.testing.assert_allclose(exact_jaccard(texts, pairs), exact, rtol=1e-12)
    inner = (exact > 0) & (exact < 1)
    share = exact[inner]
    deviations = []
    for seed in seeds:
        signed = signatures(texts, num_bands=1, rows_per_band=num_slots, seed=seed)
        estimate = estimate_jaccard(signed[0::2], signed[1::2])
        assert (estimate[exact == 1] == 1).all()
        deviations.append(estimate[inner] - share)
    z = np.concatenate(deviations) / np.tile(np.sqrt(share * (1 - share) / num_slots), len(seeds))
    kurtosis = float(np.mean((1 / (share * (1 - share)) - 6) / num_slots))
    count = len(z)
    bias_bound = 4 / math.sqrt(count)
    variance_bound = 4 * math.sqrt((2 + kurtosis) / count)
    assert abs(z.mean()) < bias_bound, (z.mean(), bias_bound)
    assert abs((z**2).mean() - 1) < min(variance_bound, 0.1) if count >= 4000 else variance_bound
    return z


def test_estimates_are_unbiased_with_the_theoretical_variance():
    z = check_estimates(5000, 128, [1], np.random.default_rng(11))
    assert abs((z**2).mean() - 1) < 0.1


@pytest.mark.full
def test_estimates_over_many_seeds():
    z = check_estimates(5000, 112, range(1, 21), np.random.default_rng(12))
    assert abs((z**2).mean() - 1) < 0.1


def test_estimates_by_similarity_have_no_bias():
    texts, exact = pairs_of_known_similarity(3000, np.random.default_rng(5))
    signed = signatures(texts, num_bands=32, rows_per_band=8)
    difference = estimate_jaccard(signed[0::2], signed[1::2]) - exact
    for low in np.arange(0.2, 1.0, 0.1):
        inside = (exact >= low) & (exact < low + 0.1)
        if inside.sum() >= 50:
            bound = 4 * math.sqrt(float(np.mean(exact[inside] * (1 - exact[inside]))) / 256 / inside.sum())
            assert abs(difference[inside].mean()) < bound, low


def test_an_unknown_level_in_the_environment_is_an_error():
    code = "from herdkern import _text; _text.minhash_levels()"
    environment = {**os.environ, "HERDKERN_ISA": "sse9"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert "HERDKERN_ISA must be baseline, avx2, avx512 or amx, got 'sse9'" in result.stderr
