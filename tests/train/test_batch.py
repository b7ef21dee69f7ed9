"""Sequences become one packed batch: borders, targets and positions, by hand and by property."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdkern.train.batch import IGNORE, build_batch

#         document 1 | 2        | 3 begins with the last target
IDS = np.array([10, 11, 12, 20, 21, 30])
BORDERS = np.array([0, 3, 5, 6], np.int32)


def test_borders_targets_and_positions():
    batch = build_batch([(IDS, BORDERS), (np.array([7, 8, 9]), np.array([0, 3], np.int32))])
    assert batch.tokens.tolist() == [10, 11, 12, 20, 21, 7, 8]
    assert batch.targets.tolist() == [11, 12, IGNORE, 21, IGNORE, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 7]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.num_targets == 5
    assert batch.document_lengths == (3, 2, 2)


def test_options():
    study = build_batch([(IDS, BORDERS)] * 2, document_mask=False, mask_border_targets=False, reset_positions=False)
    assert study.cu_seqlens.tolist() == [0, 5, 10]
    assert study.targets.tolist() == [11, 12, 20, 21, 30] * 2
    assert study.positions.tolist() == [0, 1, 2, 3, 4] * 2


def test_empty_documents_leave_no_trace():
    plain = build_batch([(IDS, BORDERS)])
    doubled = build_batch([(IDS, np.array([0, 0, 3, 3, 5, 6, 6], np.int32))])
    assert doubled.cu_seqlens.tolist() == plain.cu_seqlens.tolist()
    assert doubled.targets.tolist() == plain.targets.tolist()


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6).filter(lambda d: sum(d) > 1), min_size=1, max_size=5)
)
def test_every_target_is_the_next_token_of_its_document(rows):
    sequences, expected = [], []
    for row, lengths in enumerate(rows):
        ids = 1000 * row + np.arange(sum(lengths))
        borders = np.concatenate([[0], np.cumsum(lengths)])
        sequences.append((ids, borders.astype(np.int32)))
        document = np.repeat(np.arange(len(lengths)), lengths)
        expected += [
            (int(t), int(n) if same else IGNORE, int(t - 1000 * row - borders[d]), (row, int(d)))
            for t, n, same, d in zip(ids[:-1], ids[1:], document[1:] == document[:-1], document[:-1], strict=True)
        ]
    batch = build_batch(sequences)
    starts = batch.cu_seqlens.tolist()
    document = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    want_document = np.unique([f"{r:03d}/{d:03d}" for *_, (r, d) in expected], return_inverse=True)[1]
    assert batch.tokens.tolist() == [e[0] for e in expected]
    assert batch.targets.tolist() == [e[1] for e in expected]
    assert batch.positions.tolist() == [e[2] for e in expected]
    assert document.tolist() == want_document.tolist()
    assert batch.num_targets == sum(e[1] != IGNORE for e in expected)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "must have at least one, got none"),
        ([(np.array([1]), np.array([0, 1]))], "sequence 0 must have at least 2 tokens, got 1"),
        ([(IDS, BORDERS), (IDS, np.array([0, 5]))], r"borders of sequence 1 must rise from 0 to 6, got \[0 5\]"),
        ([(IDS, np.array([0, 4, 2, 6]))], "must rise"),
    ],
    ids=["none", "short", "end", "order"],
)
def test_wrong_sequences_are_named(sequences, message):
    with pytest.raises(ValueError, match=message):
        build_batch(sequences)
