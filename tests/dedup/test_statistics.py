"""Estimates and candidates over many pairs of texts against theory, for every family. All similarities are exact."""

import functools
import math

import numpy as np
import pytest

from herdkern.dedup.clusters import band_keys, match_probability
from herdkern.dedup.curve import measured_curve
from herdkern.dedup.minhash import estimate_jaccard, exact_jaccard, oph_variance, signatures
from herdkern.dedup.presets import PRESETS, signature_preset

FAMILIES = ["fast32", "m61", "oph"]
VOCABULARY = 1 << 16


@functools.lru_cache(maxsize=1)  # the families take the same texts one after the other
def pairs_of_texts(num_pairs, seed, sizes=(60, 400), similar=(0.1, 1.0)):
    """2 * num_pairs texts, of which 2 i and 2 i + 1 differ in some words, and their similarity in 5-word shingles.

    The similarities lie about evenly in `similar`.
    """
    rng, names, texts = np.random.default_rng(seed), [f"w{i:x}" for i in range(VOCABULARY)], []
    for _ in range(num_pairs):
        size, aim = int(rng.integers(*sizes)), rng.uniform(*similar)
        words = rng.integers(0, VOCABULARY, size)
        other = words.copy()
        num_changes = min(size, round((1 - aim) / (1 + aim) * (size - 4) / 5))
        places = rng.permutation(size)[:num_changes] if num_changes > size // 10 else spread(size, num_changes, rng)
        other[places] = rng.integers(0, VOCABULARY, len(places))
        texts += [" ".join([names[i] for i in some.tolist()]) for some in (words, other)]
    return texts, exact_jaccard(texts, np.arange(2 * num_pairs).reshape(-1, 2))


def spread(size, count, rng):
    """Places at even distances, so that each change meets five shingles of its own."""
    return (np.arange(count) * (size // max(count, 1)) + rng.integers(0, size)) % size


def test_the_exact_similarity_is_that_of_the_sets():
    texts, exact = pairs_of_texts(200, 2)
    for i, value in enumerate(exact):
        sets = [
            {tuple(words[j : j + 5]) for j in range(len(words) - 4)}
            for words in map(str.split, texts[2 * i : 2 * i + 2])
        ]
        assert value == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]), abs=1e-12)
    assert np.histogram(exact, 5, (0.1, 1.0))[0].min() > 8  # the whole range is met


def test_the_variance_of_oph_with_few_and_with_many_shingles():
    assert oph_variance(1.0, 7, 32) == pytest.approx(0, abs=1e-12)
    assert oph_variance(0.5, 2, 1) == pytest.approx(0.25)
    assert oph_variance(0.5, 20_000, 16) == pytest.approx(0.25 / 16, rel=0.01)  # as of any MinHash
    assert oph_variance(0.5, 10, 64) > 1.3 * 0.25 / 64


def variances(exact, texts, family, num_slots):
    """The theoretical variance of the estimate of each pair."""
    if family != "oph":
        return exact * (1 - exact) / num_slots
    sizes = [len(text.split()) - 4 for text in texts[0::2]]  # of either set: their union has 2 n / (1 + J) shingles
    unions = np.round(2 * np.array(sizes) / (1 + exact)).astype(int)
    grid = {
        size: oph_variance(0.5, size, num_slots) / (0.25 / num_slots)
        for size in sorted(set((unions // 8 * 8).tolist()))
    }
    factor = np.array([grid[size] for size in (unions // 8 * 8).tolist()])  # the factor hardly depends on J
    return exact * (1 - exact) / num_slots * factor


def check_estimates(num_pairs, family, ngram_unit="word"):
    num_slots = 128
    texts, exact = pairs_of_texts(num_pairs, 11)
    if ngram_unit == "char":
        exact = exact_jaccard(texts, np.arange(2 * num_pairs).reshape(-1, 2), ngram_size=24, ngram_unit="char")
    settings = {"ngram_size": 24, "ngram_unit": "char"} if ngram_unit == "char" else {}
    signed = signatures(texts, num_bands=1, rows_per_band=num_slots, family=family, **settings)
    estimate = estimate_jaccard(signed[0::2], signed[1::2])
    assert (estimate[exact == 1] == 1).all()
    inner = (exact > 0) & (exact < 1)
    theory = variances(exact, texts, family, num_slots)[inner]
    error = (estimate - exact)[inner]
    assert abs(error.mean()) < 3 * math.sqrt(theory.mean() / len(error)), "biased"
    ratio = float((error**2).mean() / theory.mean())
    assert 0.9 < ratio < 1.1, f"variance is {ratio:.3f} of theory"
    for low in np.arange(0.1, 1.0, 0.1):
        part = (exact[inner] >= low) & (exact[inner] < low + 0.1)
        if part.sum() >= 50:
            assert abs(error[part].mean()) < 4 * math.sqrt(theory[part].mean() / part.sum()), f"biased at {low:.1f}"
    return ratio


def share_a_band(texts, num_bands, rows_per_band, **settings):
    signed = signatures(texts, num_bands=num_bands, rows_per_band=rows_per_band, **settings)
    keys = band_keys(signed, num_bands=num_bands, rows_per_band=rows_per_band)
    return (keys[0::2] == keys[1::2]).any(axis=1)


def check_curve(num_pairs, family, num_bands, rows_per_band, bound):
    texts, exact = pairs_of_texts(num_pairs, 21, sizes=(300, 600), similar=(0.3, 1.0))
    found = share_a_band(texts, num_bands, rows_per_band, family=family)
    expected = match_probability(exact, num_bands=num_bands, rows_per_band=rows_per_band)
    _, shares, counts = measured_curve(exact, found)
    steps = np.minimum((exact / 0.05).astype(np.int64), 19)
    for step, share, count in zip(np.unique(steps), shares, counts):
        theory = expected[steps == step].mean()
        assert abs(share - theory) < bound(theory, count), f"{share:.3f} at {step * 0.05:.2f}, theory {theory:.3f}"


def four_errors(share, count):
    """4 standard errors of a share of `count` pairs, and what a few pairs more or less make."""
    return 4 * math.sqrt(share * (1 - share) / count) + 4 / count


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_are_unbiased_with_the_theoretical_variance(family):
    check_estimates(2500, family)


def test_estimates_over_characters():
    check_estimates(2500, "fast32", "char")


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_follow_the_curve(family):
    check_curve(800, family, 20, 6, four_errors)


def recall(num_pairs, name, family):
    texts, _ = pairs_of_texts(num_pairs, 31, sizes=(200, 600), similar=(0.84, 1.0))
    settings = signature_preset(name)
    unit = {"ngram_size": settings["ngram_size"], "ngram_unit": settings["ngram_unit"]}
    exact = exact_jaccard(texts, np.arange(2 * num_pairs).reshape(-1, 2), **unit)
    assert (exact >= 0.85).sum() > num_pairs // 2
    return share_a_band(texts, family=family, **settings)[exact >= 0.85].mean()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PRESETS)
def test_recall_of_near_duplicates(name, family):
    assert recall(300, name, family) >= 0.97


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_of_a_hundred_thousand_pairs(family):
    check_estimates(100_000, family)


@pytest.mark.full
@pytest.mark.parametrize("setting", [(14, 8), (20, 6), (20, 13)], ids=["14x8", "20x6", "20x13"])
@pytest.mark.parametrize("family", FAMILIES)
def test_curve_of_a_hundred_thousand_pairs(family, setting):
    check_curve(100_000, family, *setting, lambda share, count: 0.02)


@pytest.mark.full
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_recall_of_twenty_thousand_near_duplicates(name, family):
    assert recall(20_000, name, family) >= 0.97
