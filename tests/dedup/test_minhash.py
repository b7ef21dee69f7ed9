import os
import subprocess
import sys
from pathlib import Path

import minhash_twin as twin
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdkern import _text
from herdkern.dedup.lines import line_keys
from herdkern.dedup.minhash import (
    datasketch_parameters,
    estimate_jaccard,
    exact_jaccard,
    shingle_hashes,
    sign_plan,
    signature_spec,
    signatures,
    signatures_of_hashes,
    slot_parameters,
    word_factors,
)

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
FAMILIES = ["fast32", "m61", "oph"]
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


def sign_at(level, texts, slots, ngram_size=5, unit="word", family="fast32", seed=1, num_threads=1):
    """Signatures of one code path of the kernel."""
    return _text.minhash_sign(texts, sign_plan(slots, ngram_size, unit, family, seed), num_threads, level)


def shingles_at(level, text, ngram_size=5, unit="word"):
    return _text.minhash_shingle([text], sign_plan(1, ngram_size, unit, "fast32", 1), 1, level)[0].tolist()


def assert_like_twin(texts, ngram_size=5, seed=1, slots=21, **kind):
    expected = [twin.signature(as_bytes(t), slots, ngram_size, seed, **kind) for t in texts]
    for level in LEVELS:
        got = sign_at(level, texts, slots, ngram_size, seed=seed, **kind)
        assert got.dtype == np.uint32
        np.testing.assert_array_equal(got, np.array(expected, dtype=np.uint32), err_msg=level)


@pytest.mark.parametrize("ngram_size", [1, 2, 5, 8])
def test_signatures_equal_the_plain_definition_on_hard_texts(ngram_size):
    assert_like_twin(NASTY + WORDS + [" ".join(WORDS * 3)], ngram_size)


TAILS = ["É", "Ж", "手机很好用的", "𠀀𠀁", "\u00a0x", "\u3000x", "—x", "é" * 40, "中" * 40, "Ωmega中文Ж ", "ab中" * 30]


@pytest.mark.parametrize("unit", ["word", "char"])
@pytest.mark.parametrize("shift", [*range(58, 70)])
def test_code_points_that_cross_a_block_of_64_bytes(shift, unit):
    texts = ["a" * shift + tail + " end" for tail in TAILS] + ["b " * (shift // 2) + tail for tail in TAILS]
    assert_like_twin(texts, 3, unit=unit, slots=3)


@pytest.mark.parametrize("unit", ["word", "char"])
@pytest.mark.parametrize(
    "begin", [b"\x80", b"\xc3", b"\xe4\xb8", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xe0\x80\x80", b"\xff"]
)
def test_broken_characters_at_every_place_of_a_block(begin, unit):
    texts = [
        b"x" * shift + begin + tail for shift in range(60, 66) for tail in (b"", b"\xb0", b" a \xd0\x96", b"y" * 70)
    ]
    assert_like_twin(texts, 2, unit=unit, slots=2)


@pytest.mark.parametrize("slots", [1, 15, 16, 17, 112, 117, 128, 260])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_slots(slots, family):
    texts = ["to be or not to be that is the question", "Ünïcödé wörds äre wörds töö", "one", ""]
    assert_like_twin(texts, 3, 7, slots, family=family)


@pytest.mark.parametrize("unit", ["word", "char"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_units_equal_the_plain_definition(family, unit):
    for ngram_size in (1, 4, 24):
        assert_like_twin([*NASTY, " ".join(WORDS * 3)], ngram_size, family=family, unit=unit, slots=9)
    assert_like_twin(NASTY[::4], 24, seed=12345, family=family, unit=unit, slots=9)


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
    assert_like_twin(texts, 2, slots=6)
    assert_like_twin(texts, 3, slots=6, unit="char")


@given(st.binary(max_size=400), st.sampled_from(["word", "char"]), st.sampled_from(FAMILIES))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_the_same_on_every_level(data, unit, family):
    results = [sign_at(level, [data], 16, 3, unit, family) for level in LEVELS]
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
    wanted = sign_at("baseline", texts, 128)
    for level in LEVELS:
        for num_threads in (1, 2, 5):
            np.testing.assert_array_equal(sign_at(level, texts, 128, num_threads=num_threads), wanted)
    np.testing.assert_array_equal(signatures(texts, num_bands=16, rows_per_band=8), wanted)


def long_texts():
    """Texts of several pieces of 8 kB, with words and runs that reach from one piece to the next."""
    rng = np.random.default_rng(3)
    yield " ".join(f"w{i}" for i in rng.integers(0, 500, 6000))
    alphabet = ["a", "b ", "é", "Ж ", "中", "文字", "ก", " ", "—", "\u3000", "𠀀", "x" * 50, "ß" * 60, "\udc80"]
    for _ in range(3):
        yield "".join(rng.choice(alphabet, 7000))
    yield "x" * 20000 + " y " + "ж" * 9000
    yield "中" * 9000 + "abc " * 3000
    yield " " * 30000 + "end"


@pytest.mark.parametrize("unit", ["word", "char"])
def test_long_documents_are_the_sum_of_their_pieces(unit):
    for text in long_texts():
        data = text.encode("utf-8", "surrogateescape")
        wanted = twin.shingles(data, 5, unit)
        for level in LEVELS:
            assert shingles_at(level, data, 5, unit) == wanted
    mixed = list(long_texts())[1].encode("utf-8", "surrogateescape")
    for family in FAMILIES:
        assert_like_twin([mixed], 7, slots=3, unit=unit, family=family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unit", ["word", "char"])
def test_pieces_of_every_length(family, unit):
    texts = [("ab cd中文, ÉÀ " * 800)[:size] + "tail" for size in range(8120, 8200, 7)]
    assert_like_twin(texts, 3, slots=2, unit=unit, family=family)


def test_strings_of_every_width_equal_their_utf8():
    for text in ["plain", "Latin ÿ é ü, long enough to be cut " * 9, "Кириллица и ἑλληνικά — 中文 " * 9,
                 "𝒳 and 😀 and 中 and é " * 9, "ÿ", "߿ࠀ￿", "lone \ud800 surrogate \udfff " * 3]:  # fmt: skip
        for cut in range(0, 20):
            data = text[cut:].encode("utf-8", "surrogatepass")
            for unit in ("word", "char"):
                assert shingles_at("auto", text[cut:], 2, unit) == shingles_at("auto", data, 2, unit)


def test_hashes_of_the_caller():
    texts = library_texts(300_000)
    hashes = shingle_hashes(texts)
    begins = np.cumsum([0, *map(len, hashes)])
    for family in ("fast32", "oph"):
        settings = {"num_bands": 7, "rows_per_band": 11, "family": family, "seed": 3}
        wanted = signatures(texts, **settings)
        np.testing.assert_array_equal(signatures_of_hashes(np.concatenate(hashes), begins, **settings), wanted)
    for bad in ([0, 5], [1, len(np.concatenate(hashes))], [], [0, 9, 4, len(np.concatenate(hashes))]):
        with pytest.raises(ValueError, match="begins must rise from 0 to the number of hashes"):
            signatures_of_hashes(np.concatenate(hashes), np.array(bad, dtype=np.int64), num_bands=2, rows_per_band=2)
    with pytest.raises(TypeError, match=r"hashes must be uint64 \(num_hashes,\), got int64"):
        signatures_of_hashes(np.arange(5), np.array([0, 5]), num_bands=2, rows_per_band=2)


def datasketch_signatures(shingle_lists, num_perm, seed, hashfunc=None):
    datasketch = pytest.importorskip("datasketch")
    legacy = {"scheme": "legacy"} if hasattr(datasketch.minhash, "_SCHEME_LEGACY") else {}  # since 2.0
    settings = {"num_perm": num_perm, "seed": seed, **legacy, **({"hashfunc": hashfunc} if hashfunc else {})}
    return np.array([m.digest() for m in datasketch.MinHash.generator(shingle_lists, **settings)], dtype=np.uint64)


def many_documents(num_docs, rng):
    """Documents of a few words from real text, in several scripts."""
    words = " ".join(library_texts(1_500_000)).split() + WORDS * 50 + ["这是一个测试", "テキスト", "ภาษาไทย"] * 50
    for size in rng.integers(0, 40, num_docs):
        yield " ".join(words[i] for i in rng.integers(0, len(words), size))


def check_equals_datasketch(num_docs, num_perm):
    texts = list(many_documents(num_docs, np.random.default_rng(1)))
    for unit, ngram_size, seed in (("word", 5, 1), ("char", 12, 4242)):
        lists = [twin.shingle_bytes(as_bytes(text), ngram_size, unit) for text in texts]
        got = sign_at("auto", texts, num_perm, ngram_size, unit, "m61", seed)
        np.testing.assert_array_equal(got, datasketch_signatures(lists, num_perm, seed))
    for hashfunc in (lambda s: hash_of(s) & 0xFFFFFFFF, hash_of):  # of the caller: 32 bits, and more than that
        hashes = [np.array([hashfunc(s) for s in some], dtype=np.uint64) for some in lists]
        begins = np.cumsum([0, *map(len, hashes)])
        got = signatures_of_hashes(
            np.concatenate(hashes), begins, num_bands=1, rows_per_band=num_perm, family="m61", seed=7
        )
        np.testing.assert_array_equal(got, datasketch_signatures(lists, num_perm, 7, hashfunc))


def hash_of(data):
    return twin.hash_bytes(data)


def test_m61_equals_datasketch():
    check_equals_datasketch(300, 64)


@pytest.mark.full
def test_m61_equals_datasketch_on_ten_thousand_documents():
    check_equals_datasketch(10_000, 128)


@pytest.mark.parametrize("text", [*NASTY, " ".join(WORDS)], ids=range(len(NASTY) + 1))
def test_shingles_equal_the_plain_definition(text):
    for level in LEVELS:
        assert shingles_at(level, text) == twin.shingles(as_bytes(text), 5)


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
        ({"family": "fast64"}, "family must be one of fast32, m61, oph, got 'fast64'"),
        ({"ngram_unit": "byte"}, "ngram_unit must be word or char, got 'byte'"),
        ({"family": "m61", "seed": -1}, r"seed must lie in \[0, 2\*\*32\) for the family m61, got -1"),
        ({"family": "oph", "num_bands": 4097}, "must be at most 4096 for the family oph, got 8194; take fast32"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        signatures(["a"], **{"num_bands": 2, "rows_per_band": 2, **arguments})


def test_an_unknown_level_is_named():
    with pytest.raises(ValueError, match="level must be auto or one of"):
        sign_at("avx9", ["a"], 4)


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
    for array in (*slot_parameters(4, 1), *datasketch_parameters(4, 1), word_factors(5)):
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
        "herdkern-minhash/1 words=unicode-16.0.0 ngrams=words ngram_size=4 family=fast32 num_bands=20 rows_per_band=6 "
        "seed=9"
    )
    variants = [{}, {"ngram_unit": "char"}, {"family": "m61"}, {"family": "oph"}, {"seed": 2}, {"ngram_size": 6}]
    specs = {signature_spec(**{"num_bands": 20, "rows_per_band": 6, **variant}) for variant in variants}
    assert len(specs) == len(variants)
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


def test_an_unknown_level_in_the_environment_is_an_error():
    code = "from herdkern import _text; _text.minhash_levels()"
    environment = {**os.environ, "HERDKERN_ISA": "sse9"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert "HERDKERN_ISA must be baseline, avx2, avx512 or amx, got 'sse9'" in result.stderr
