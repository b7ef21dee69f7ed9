import math

import numpy as np
import pytest

from herdkern import _text
from herdkern.dedup.clusters import (
    band_keys,
    candidate_pairs,
    connected_components,
    keep_order,
    match_probability,
)
from herdkern.dedup.minhash import estimate_jaccard, signatures


def planted_signatures(rng, num_pairs, num_slots, similarity):
    """Signatures (2 * num_pairs, num_slots) of which rows 2i and 2i + 1 agree in each slot with this probability."""
    first = rng.integers(0, 2**32 - 1, (num_pairs, num_slots), dtype=np.uint32)
    other = rng.integers(0, 2**32 - 1, (num_pairs, num_slots), dtype=np.uint32)
    second = np.where(rng.random((num_pairs, num_slots)) < similarity, first, other)
    return np.stack([first, second], axis=1).reshape(-1, num_slots)


@pytest.mark.parametrize(("num_bands", "rows_per_band"), [(14, 8), (20, 6), (9, 13)])
@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.7, 0.8, 0.9])
def test_candidates_follow_the_s_curve(num_bands, rows_per_band, similarity):
    num_pairs = 4000
    signed = planted_signatures(np.random.default_rng(1), num_pairs, num_bands * rows_per_band, similarity)
    pairs = candidate_pairs(signed, num_bands=num_bands, rows_per_band=rows_per_band)
    assert (pairs[:, 0] % 2 == 0).all()
    assert (pairs[:, 1] == pairs[:, 0] + 1).all()
    expected = match_probability(similarity, num_bands=num_bands, rows_per_band=rows_per_band)
    bound = 4 * math.sqrt(max(expected * (1 - expected), 1 / num_pairs) / num_pairs)
    assert abs(len(pairs) / num_pairs - expected) < bound


def texts_with_copies(rng, num_families):
    """Families of texts with some words changed, and a few texts without words."""
    texts = ["", "...", "!?"]
    for family in range(num_families):
        words = [f"f{family}w{i}" for i in range(80)]
        for _ in range(int(rng.integers(1, 6))):
            changed = list(words)
            for place in rng.choice(80, int(rng.integers(0, 9)), replace=False):
                changed[place] = f"x{rng.integers(0, 1 << 30)}"
            texts.append(" ".join(changed))
    return texts


def naive_pairs(signed, num_bands, rows_per_band, min_similarity, groups=None):
    """All pairs that share a band and reach the similarity."""
    found = set()
    for i in range(len(signed)):
        for j in range(i + 1, len(signed)):
            if (signed[i] == 0xFFFFFFFF).all() or (groups is not None and groups[i] != groups[j]):
                continue
            equal = (signed[i] == signed[j]).reshape(num_bands, rows_per_band).all(axis=1).any()
            if equal and estimate_jaccard(signed[i], signed[j]) >= min_similarity:
                found.add((i, j))
    return found


def components(pairs, num_docs):
    """Connected components by repeated relabelling."""
    labels = list(range(num_docs))
    changed = True
    while changed:
        changed = False
        for a, b in pairs:
            low = min(labels[a], labels[b])
            changed |= labels[a] != low or labels[b] != low
            labels[a] = labels[b] = low
    return labels


@pytest.mark.parametrize("use_groups", [False, True])
def test_stars_give_the_components_of_all_pairs(use_groups):
    rng = np.random.default_rng(2)
    texts = texts_with_copies(rng, 60)
    groups = rng.integers(0, 2, len(texts)).astype(np.uint64) if use_groups else None
    signed = signatures(texts, num_bands=20, rows_per_band=5)
    pairs = candidate_pairs(signed, num_bands=20, rows_per_band=5, groups=groups)
    labels = connected_components(pairs, len(texts))
    assert labels.tolist() == components(naive_pairs(signed, 20, 5, 0, groups), len(texts))
    assert set(map(tuple, pairs.tolist())) <= naive_pairs(signed, 20, 5, 0, groups)


def test_pairs_below_the_similarity_are_left_out():
    rng = np.random.default_rng(3)
    texts = texts_with_copies(rng, 60)
    signed = signatures(texts, num_bands=20, rows_per_band=5)
    pairs = candidate_pairs(signed, num_bands=20, rows_per_band=5, min_similarity=0.6)
    assert len(pairs)
    assert set(map(tuple, pairs.tolist())) <= naive_pairs(signed, 20, 5, 0.6)


def test_clusters_do_not_depend_on_the_order_of_documents_or_on_threads():
    rng = np.random.default_rng(4)
    texts = texts_with_copies(rng, 80)
    signed = signatures(texts, num_bands=14, rows_per_band=4)

    def clusters(order, num_threads):
        pairs = candidate_pairs(signed[order], num_bands=14, rows_per_band=4, num_threads=num_threads)
        labels = connected_components(pairs, len(texts))
        return {frozenset(order[labels == label].tolist()) for label in set(labels.tolist())}

    wanted = clusters(np.arange(len(texts)), 1)
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(len(texts))
        assert clusters(order, 1 + seed % 4) == wanted


def test_equal_bands_have_equal_keys_and_bands_do_not_mix():
    signed = np.array([[1, 2, 1, 2], [1, 2, 3, 4], [9, 9, 1, 2]], dtype=np.uint32)
    keys = band_keys(signed, num_bands=2, rows_per_band=2)
    assert keys.shape == (3, 2)
    assert keys[0, 0] == keys[1, 0]
    assert keys[0, 1] == keys[2, 1]
    assert len(set(keys.ravel().tolist())) == 4
    grouped = band_keys(signed, num_bands=2, rows_per_band=2, groups=np.array([0, 1, 0], np.uint64))
    assert grouped[0, 0] != grouped[1, 0]
    assert grouped[0, 1] == grouped[2, 1]


def test_a_key_shared_by_thousands_stays_linear():
    signed = np.zeros((30_000, 8), np.uint32)
    signed[:, 4:] = np.arange(30_000, dtype=np.uint32)[:, None]  # the first band is equal, nothing else is
    pairs = candidate_pairs(signed, num_bands=2, rows_per_band=4)
    assert len(pairs) == 29_999
    assert len(candidate_pairs(signed, num_bands=2, rows_per_band=4, min_similarity=0.6)) == 0


@pytest.mark.parametrize("num_docs", [0, 1, 2, 50, 400])
def test_components_equal_naive_ones(num_docs):
    rng = np.random.default_rng(num_docs)
    pairs = rng.integers(0, max(num_docs, 1), (num_docs // 2, 2))
    labels = connected_components(pairs, num_docs)
    assert labels.tolist() == components(pairs.tolist(), num_docs)
    assert connected_components(rng.permutation(pairs), num_docs).tolist() == labels.tolist()


def test_a_long_chain_is_one_component():
    chain = np.stack([np.arange(99_999), np.arange(1, 100_000)], axis=1)
    assert (connected_components(chain[::-1], 100_000) == 0).all()


@pytest.mark.parametrize("pairs", [[[0, 3]], [[-1, 0]]])
def test_pairs_outside_are_refused(pairs):
    with pytest.raises(ValueError, match=r"pairs must lie in \[0, 3\)"):
        connected_components(np.array(pairs), 3)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="signatures must have shape"):
        candidate_pairs(np.zeros((3, 7), np.uint32), num_bands=2, rows_per_band=4)
    with pytest.raises(ValueError, match="groups must have one entry per document"):
        band_keys(np.zeros((3, 8), np.uint32), num_bands=2, rows_per_band=4, groups=np.zeros(2, np.uint64))
    with pytest.raises(ValueError, match="min_similarity must lie in"):
        candidate_pairs(np.zeros((3, 8), np.uint32), num_bands=2, rows_per_band=4, min_similarity=1.5)


@pytest.mark.parametrize("shape", [(2, 3), (4,), (3, 4), (1, 2, 2)])
def test_pairs_of_another_shape_are_not_read_as_pairs(shape):
    pairs = np.arange(math.prod(shape)).reshape(shape)
    with pytest.raises(ValueError, match=r"connected_components: pairs must have shape \(num_pairs, 2\), got"):
        connected_components(pairs, 12)


def test_numbers_that_would_be_cut_are_refused():
    with pytest.raises(TypeError, match="connected_components: pairs must be whole numbers, got dtype float64"):
        connected_components(np.array([[0.9, 1.7]]), 3)
    with pytest.raises(ValueError, match="num_docs must be at least 0, got -1"):
        connected_components(np.zeros((0, 2), np.int64), -1)
    wide = np.array([[2**32 + 1, 1], [1, 1]])  # equal in the lower 32 bits alone
    for function in (candidate_pairs, band_keys):
        with pytest.raises(TypeError, match=f"{function.__name__}: signatures must be uint32, got int64"):
            function(wide, num_bands=1, rows_per_band=2)
    assert connected_components([], 2).tolist() == [0, 1]


def test_sizes_whose_product_overflows_are_refused():
    with pytest.raises(ValueError, match="signatures must have shape"):
        _text.band_keys(np.zeros((0, 0), np.uint32), 1 << 32, 1 << 32, np.zeros(0, np.uint64))


def test_keep_orders():
    ids = ["d", "c", "b", "a", "é"]
    timestamps, lengths = np.array([1, 2, 2, 2, 0]), np.array([9, 5, 7, 7, 9])
    assert np.argsort(keep_order("newest", ids, timestamps, lengths)).tolist() == [3, 2, 1, 0, 4]
    assert np.argsort(keep_order("longest", ids, timestamps, lengths)).tolist() == [0, 4, 3, 2, 1]
    assert np.argsort(keep_order("smallest_id", ids, timestamps, lengths)).tolist() == [3, 2, 1, 0, 4]
    with pytest.raises(ValueError, match="keep must be one of newest, longest, smallest_id, got 'best'"):
        keep_order("best", ids, timestamps, lengths)
