"""The sampler: shares at every prefix, epochs that are permutations, sequences that depend on (seed, t) alone."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdkern.data.mix import MAX_CYCLE, FeistelPermutation, MixPhase, TokenSampler


class Counting:
    """A dataset whose token i is i."""

    def __init__(self, num_tokens):
        self.num_tokens = num_tokens

    def window(self, start, length):
        assert start in range(self.num_tokens - length + 1)
        return np.arange(start, start + length), np.array([0, length], np.int32)


def sampler(weights, seq_len=10, seed=1, num_tokens=1000, **kwargs):
    return TokenSampler({name: Counting(num_tokens) for name in "abcdefgh"}, weights, seq_len, seed, **kwargs)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1000, 4096, 5000])
def test_feistel_is_a_permutation(size):
    for key in ("a", "b"):
        assert sorted(map(FeistelPermutation(size, key), range(size))) == list(range(size))
    if size >= 100:
        assert [*map(FeistelPermutation(size, "a"), range(size))] != [*map(FeistelPermutation(size, "b"), range(size))]


def test_feistel_looks_random():
    """Mean distance of neighbours and of places is that of a random permutation, a third of the size, within 5 %."""
    values = np.array([*map(FeistelPermutation(10_000, "key"), range(10_000))])
    assert np.abs(np.diff(values)).mean() == pytest.approx(10_000 / 3, rel=0.05)
    assert np.abs(values - np.arange(10_000)).mean() == pytest.approx(10_000 / 3, rel=0.05)


WEIGHT = st.one_of(st.integers(1, 50).map(float), st.floats(1e-3, 1.0), st.sampled_from([0.01, 0.25, 0.1, 0.5, 0.17]))


@settings(deadline=None, max_examples=30)
@given(st.lists(WEIGHT, min_size=1, max_size=8))
def test_shares_hold_at_every_prefix(weights):
    mix = sampler(dict(zip("abcdefgh", weights)))
    shares, drawn = mix.shares(0), Counter()
    assert sum(shares.values()) == 1
    for name, weight in zip("abcdefgh", weights):
        assert float(shares[name]) == pytest.approx(weight / sum(weights), abs=1 / MAX_CYCLE)
    for t in range(600):
        drawn[mix.place(t).source] += 1
        assert all(abs(drawn[name] - shares[name] * (t + 1)) < 1 for name in shares)
    assert mix.drawn(600) == {name: drawn[name] for name in mix.names}


def test_shares_written_in_decimals_are_exact():
    assert sampler({"a": 0.5, "b": 0.25, "c": 0.17, "d": 0.08}).shares(0) == {
        "a": Fraction(50, 100),
        "b": Fraction(25, 100),
        "c": Fraction(17, 100),
        "d": Fraction(8, 100),
    }


def test_an_epoch_passes_every_window_once_in_another_order():
    mix = sampler({"a": 1}, num_tokens=1005)  # 100 windows of 10 targets, 4 tokens to spare
    epochs = [[mix.place(t) for t in range(e * 100, (e + 1) * 100)] for e in range(3)]
    for e, places in enumerate(epochs):
        shift = places[0].start % 10
        assert {p.epoch for p in places} == {e}
        assert sorted(p.start for p in places) == [10 * i + shift for i in range(100)]
    assert len({tuple(p.start // 10 for p in places) for places in epochs}) == 3
    assert len({sampler({"a": 1}, num_tokens=1005, seed=s).place(0).start % 10 for s in range(40)}) == 5  # tails rotate
    assert mix.epochs(250) == {"a": pytest.approx(2500 / 1004)}


def test_sequences_depend_on_seed_and_number_alone():
    one, two, other = sampler({"a": 2, "b": 1}), sampler({"b": 1, "a": 2}), sampler({"a": 2, "b": 1}, seed=2)
    order = np.random.default_rng(0).permutation(300)
    shuffled = {t: one.sequence(t)[0] for t in order}
    for t in range(300):
        assert np.array_equal(two.sequence(t)[0], shuffled[t])
    assert any(not np.array_equal(other.sequence(t)[0], shuffled[t]) for t in range(10))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_stream_is_the_same_for_any_batch_size(batch_size):
    mix = sampler({"a": 0.7, "b": 0.3})
    stream = [mix.place(step * batch_size + i) for step in range(240 // batch_size) for i in range(batch_size)]
    assert stream == [sampler({"a": 0.7, "b": 0.3}).place(t) for t in range(240)]


def test_a_later_phase_changes_the_mix_and_nothing_before_it():
    plain = sampler({"a": 3, "b": 1})
    phased = sampler({"a": 3, "b": 1}, later=[MixPhase(start=101, weights={"b": 1, "c": 1})])
    assert [phased.place(t) for t in range(101)] == [plain.place(t) for t in range(101)]
    tail = Counter(phased.place(t).source for t in range(101, 301))
    assert tail == {"b": 100, "c": 100}
    b_starts = [p.start for p in map(phased.place, range(150)) if p.source == "b" and p.epoch == 0]
    assert len(b_starts) == len(set(b_starts))  # the second phase goes on in the epoch of the first
    assert phased.shares(0)["c"] == 0
    assert phased.shares(101) == {"a": 0, "b": Fraction(1, 2), "c": Fraction(1, 2)}


def test_windows_carry_one_token_more():
    tokens, cu_seqlens = sampler({"a": 1}).sequence(5)
    assert len(tokens) == 11
    assert cu_seqlens.tolist() == [0, 11]


def test_fingerprint_tells_what_matters():
    base = sampler({"a": 3, "b": 1})
    assert base.fingerprint() == sampler({"b": 1, "a": 3}).fingerprint()
    for other in (
        sampler({"a": 2, "b": 1}),
        sampler({"a": 3, "b": 1}, seed=2),
        sampler({"a": 3, "b": 1}, seq_len=11),
        sampler({"a": 3, "b": 1}, num_tokens=999),
        sampler({"a": 3, "b": 1}, later=[MixPhase(start=5, weights={"a": 1})]),
    ):
        assert other.fingerprint() != base.fingerprint()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sampler({"z": 1}), "weights must name datasets, got 'z'"),
        (lambda: sampler({"a": -1}), "finite and not negative, got -1 for 'a'"),
        (lambda: sampler({"a": float("nan")}), "finite and not negative"),
        (lambda: sampler({"a": 0}), "must have a positive one"),
        (lambda: sampler({}), "must have a positive one"),
        (lambda: sampler({"a": 1}, num_tokens=10), r"dataset 'a' must have at least seq_len \+ 1 = 11 tokens, got 10"),
        (lambda: sampler({"a": 1}, seq_len=0), "seq_len must be at least 1"),
        (lambda: sampler({"a": 1}, later=[MixPhase(start=0, weights={"a": 1})]), r"one after another, got \[0, 0\]"),
    ],
    ids=["unknown", "negative", "nan", "zero", "none", "short", "seq_len", "phases"],
)
def test_wrong_mixes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
