import pickle

import numpy as np
import pytest

from herdkern.dedup import MinHash, MinHashLSH
from herdkern.dedup.lsh_port import best_banding, sha1_hash32

datasketch = pytest.importorskip("datasketch")
needs_schemes = pytest.mark.skipif(
    not hasattr(datasketch.minhash, "_SCHEME_LEGACY"), reason="datasketch before 2.0 has no schemes"
)
SCHEMES = ["affine32", "legacy"]


def values_of(rng, count):
    return [bytes(rng.integers(0, 256, rng.integers(0, 40), dtype=np.uint8)) for _ in range(count)]


@needs_schemes
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("num_perm", [1, 16, 100, 128])
def test_hash_values_equal_those_of_datasketch(scheme, num_perm):
    rng = np.random.default_rng(num_perm)
    for seed in (1, 0, 2**32 - 1):
        for hashfunc in (None, lambda v: sum(v) * 2654435761 % 2**32):
            mine = MinHash(num_perm, seed, scheme=scheme, hashfunc=hashfunc)
            theirs = datasketch.MinHash(num_perm, seed, scheme=scheme, hashfunc=hashfunc)
            for size in (0, 1, 7, 300):
                values = values_of(rng, size)
                for minhash in (mine, theirs):
                    minhash.update_batch(values)
                    minhash.update(b"one more")
                assert mine.digest().dtype == theirs.digest().dtype
                np.testing.assert_array_equal(mine.digest(), theirs.digest())
                assert mine.count() == pytest.approx(theirs.count())
            assert len(mine) == len(theirs) == num_perm


@needs_schemes
def test_hashes_of_64_bits_in_the_scheme_legacy():
    def wide(value):
        return int.from_bytes(value[:8].ljust(8, b"\x99"), "little")

    values = values_of(np.random.default_rng(5), 50)
    mine, theirs = MinHash(scheme="legacy", hashfunc=wide), datasketch.MinHash(scheme="legacy", hashfunc=wide)
    mine.update_batch(values)
    theirs.update_batch(values)
    np.testing.assert_array_equal(mine.digest(), theirs.digest())
    with pytest.raises(ValueError, match=r"hashfunc must give numbers in \[0, 2\*\*32\) for the scheme affine32"):
        MinHash(hashfunc=wide).update_batch(values)


def test_the_methods_of_a_minhash():
    first, second = MinHash.bulk([[b"a", b"b", b"c"], [b"b", b"c", b"d"]], num_perm=64, seed=3)
    assert MinHash(64).is_empty()
    assert not first.is_empty()
    union = MinHash.union(first, second)
    whole = MinHash(64, 3)
    whole.update_batch([b"a", b"b", b"c", b"d"])
    assert union == whole
    assert first.jaccard(second) == np.mean(first.digest() == second.digest())
    copied = first.copy()
    copied.merge(second)
    assert copied == whole
    assert first != whole
    assert first.hashvalues[0] == first.digest()[0]
    assert pickle.loads(pickle.dumps(first)) == first
    first.clear()
    assert first.is_empty()
    again = MinHash(hashvalues=whole.hashvalues, scheme="affine32", seed=3)
    assert again == whole
    assert sha1_hash32(b"abc") == datasketch.hashfunc.sha1_hash32(b"abc")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinHash(0), "num_perm must be at least 1, got 0"),
        (lambda: MinHash(seed=-1), r"seed must lie in \[0, 2\*\*32\), got -1"),
        (lambda: MinHash(scheme="affine64"), "scheme must be affine32 or legacy, got 'affine64'"),
        (lambda: MinHash(hashvalues=[1, 2]), "scheme must be told with hashvalues"),
        (lambda: MinHash(hashvalues=[-1], scheme="legacy"), "whole numbers below"),
        (lambda: MinHash.union(MinHash()), "at least 2, got 1"),
        (lambda: MinHash().jaccard(MinHash(seed=2)), r"other must have num_perm, seed and scheme \(128, 1, 'aff"),
        (lambda: MinHash().merge(MinHash(64)), "other must have"),
        (lambda: MinHashLSH(threshold=1.5), r"threshold must lie in \[0, 1\], got 1.5"),
        (lambda: MinHashLSH(num_perm=1), "num_perm must be at least 2"),
        (lambda: MinHashLSH(weights=(0.5, 0.6)), "weights must lie in"),
        (lambda: MinHashLSH(params=(20, 13)), r"product of at most num_perm=128, got \(20, 13\)"),
        (lambda: MinHashLSH(params=(1, 8)), "params must be at least"),
        (lambda: MinHashLSH().insert("a", MinHash(64)), "minhash must have 128 slots, got 64"),
        (lambda: MinHashLSH().remove("a"), "key must be in the index, got 'a'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("num_perm", [16, 128])
def test_bandings_equal_those_of_datasketch(num_perm):
    for threshold in (0.2, 0.5, 0.8, 0.9):
        for weights in ((0.5, 0.5), (0.2, 0.8)):
            if num_perm == 128 and threshold != 0.8:
                continue  # the other side takes long
            wanted = datasketch.lsh._optimal_param(threshold, num_perm, *weights)
            assert best_banding(threshold, num_perm, weights) == wanted


@needs_schemes
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_index_finds_what_that_of_datasketch_finds(scheme):
    rng = np.random.default_rng(8)
    base = values_of(rng, 60)
    sets = [base[: 60 - i] + values_of(rng, i) for i in range(0, 60, 3)]
    mine, theirs = MinHashLSH(params=(16, 8)), datasketch.MinHashLSH(params=(16, 8))
    pairs = []
    for i, values in enumerate(sets):
        pair = MinHash(scheme=scheme), datasketch.MinHash(scheme=scheme)
        for minhash, index in zip(pair, (mine, theirs)):
            minhash.update_batch(values)
            index.insert(i, minhash)
        pairs.append(pair)
    found = [(set(mine.query(m)), set(theirs.query(t))) for m, t in pairs]
    assert all(a == b for a, b in found)
    assert len(found[0][0]) > 3
    assert 0 in mine
    for index in (mine, theirs):
        index.remove(0)
    assert 0 not in mine
    assert set(mine.query(pairs[0][0])) == set(theirs.query(pairs[0][1]))
    assert [sum(c.values()) for c in mine.get_counts()] == [len(sets) - 1] * 16
    with pytest.raises(ValueError, match="key must be new, got 1"):
        mine.insert(1, pairs[1][0])
    with pytest.raises(ValueError, match="minhash must have seed and scheme"):
        mine.query(MinHash(seed=9, scheme=scheme))
    mine.insert(1, pairs[1][0], check_duplication=False)
    for key in range(1, len(sets)):
        mine.remove(key)
    assert mine.is_empty()
    assert len(mine) == 0
    assert all(not table for table in mine._tables)
