"""Borders from lengths, position ids, document ids and padding masks: examples, round trips, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from herdkern.documents import (
    cu_seqlens_from_document_ids,
    cu_seqlens_from_lengths,
    cu_seqlens_from_padding_mask,
    cu_seqlens_from_position_ids,
    document_ids_from_cu_seqlens,
    pad_input,
    position_ids_from_cu_seqlens,
    unpad_input,
)

LENGTHS = st.lists(st.integers(0, 9), max_size=12)
INTEGERS = [torch.int8, torch.int32, torch.int64]


def borders_by_loop(lengths: list[int]) -> list[int]:
    borders = [0]
    for length in lengths:
        borders.append(borders[-1] + length)
    return borders


@given(LENGTHS, st.booleans())
def test_lengths(lengths, as_tensor):
    given_as = torch.tensor(lengths, dtype=torch.int32) if as_tensor else lengths
    borders = cu_seqlens_from_lengths(given_as)
    assert borders.dtype == torch.int32
    assert borders.is_contiguous()
    assert borders.tolist() == borders_by_loop(lengths)


def test_lengths_may_come_one_by_one():
    assert cu_seqlens_from_lengths(length for length in (2, 0, 3)).tolist() == [0, 2, 2, 5]


@given(LENGTHS)
def test_positions_count_every_document_from_0(lengths):
    positions = position_ids_from_cu_seqlens(cu_seqlens_from_lengths(lengths), sum(lengths))
    assert positions.dtype == torch.int64
    assert positions.tolist() == [place for length in lengths for place in range(length)]


@given(st.lists(st.integers(1, 9), max_size=12))
def test_borders_survive_position_ids(lengths):
    borders = cu_seqlens_from_lengths(lengths)
    again = cu_seqlens_from_position_ids(position_ids_from_cu_seqlens(borders))
    assert again.dtype == torch.int32
    assert again.tolist() == borders.tolist()


@given(st.lists(st.integers(1, 9), max_size=12))
def test_borders_survive_document_ids(lengths):
    borders = cu_seqlens_from_lengths(lengths)
    ids = document_ids_from_cu_seqlens(borders)
    assert ids.tolist() == [d for d, length in enumerate(lengths) for _ in range(length)]
    again = cu_seqlens_from_document_ids(ids)
    assert again.dtype == torch.int32
    assert again.tolist() == borders.tolist()


@given(LENGTHS)
def test_empty_documents_are_counted_by_document_ids(lengths):
    ids = document_ids_from_cu_seqlens(cu_seqlens_from_lengths(lengths), sum(lengths)).tolist()
    assert ids == [d for d, length in enumerate(lengths) for _ in range(length)]


@given(st.lists(st.integers(-1, 2), max_size=30), st.integers(1, 4))
def test_document_ids_by_loop(ids, batch_size):
    ids = ids[: len(ids) // batch_size * batch_size]
    row_len = len(ids) // batch_size
    expected = [0] if row_len == 0 else [*range(0, len(ids), row_len)]
    for at in range(len(ids)):
        if at % max(row_len, 1) and (ids[at] != ids[at - 1] or ids[at] == -1):
            expected.append(at)
    rows = torch.tensor(ids, dtype=torch.int64).view(batch_size, row_len)
    assert cu_seqlens_from_document_ids(rows).tolist() == sorted({*expected, len(ids)})


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize(
    ("positions", "borders"),
    [
        ([0, 1, 2, 0, 1, 0], [0, 3, 5, 6]),
        ([5, 6, 7], [0, 3]),  # a piece of a document
        ([0, 1, 5, 6], [0, 2, 4]),  # a jump is a border
        ([1, 1, 1], [0, 1, 2, 3]),
        ([[0, 1], [2, 3]], [0, 2, 4]),  # a row's end is a border, whatever the positions say
        ([[0, 0, 1]], [0, 1, 3]),
        ([7], [0, 1]),
        ([], [0]),
        ([[], []], [0]),
    ],
    ids=str,
)
def test_position_ids(positions, borders, dtype):
    assert cu_seqlens_from_position_ids(torch.tensor(positions, dtype=dtype)).tolist() == borders


@pytest.mark.parametrize("shape", ["(T,)", "(1, T)"])
def test_id_that_comes_back_is_another_document(shape):
    ids = torch.tensor([7, 7, 3, 7, -1, -1])
    ids = ids if shape == "(T,)" else ids[None]
    assert cu_seqlens_from_document_ids(ids).tolist() == [0, 2, 3, 4, 5, 6]


@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), max_size=5), st.sampled_from([torch.bool, torch.int64])
)
def test_padding_mask_round_trip(rows, dtype):
    mask = torch.tensor(rows, dtype=dtype).reshape(-1, 5)
    hidden = torch.arange(1.0, mask.numel() * 2 + 1).view(*mask.shape, 2)
    packed, indices, borders = unpad_input(hidden, mask)
    assert borders.dtype == torch.int32
    assert borders.tolist() == borders_by_loop([sum(row) for row in rows])
    assert indices.tolist() == [at for at, real in enumerate(mask.flatten().tolist()) if real]
    assert torch.equal(packed, hidden.flatten(0, 1)[indices])
    assert torch.equal(pad_input(packed, indices, *mask.shape), hidden * mask[..., None])


def test_gradient_goes_through_unpad_and_pad():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    packed, indices, _ = unpad_input(hidden, mask)
    (pad_input(packed, indices, 2, 3) * 3.0).sum().backward()
    assert torch.equal(hidden.grad, 3.0 * mask[..., None].expand(2, 3, 4))


def test_nothing_is_read_where_the_sizes_are_known():
    """Under fake tensors every look at a value would raise: a GPU is not waited for either."""
    with FakeTensorMode():
        borders = cu_seqlens_from_lengths(torch.ones(4, dtype=torch.int64))
        assert position_ids_from_cu_seqlens(borders, 4).shape == (4,)
        assert document_ids_from_cu_seqlens(borders, 4).shape == (4,)
        assert pad_input(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64), 2, 5).shape == (2, 5, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cu_seqlens_from_lengths([3, -1]), ValueError, r"lengths must be at least 0, got -1 at index 1"),
        (lambda: cu_seqlens_from_lengths([2**31]), ValueError, r"lengths must sum to at most 2147483647"),
        (lambda: cu_seqlens_from_lengths(5), TypeError, r"lengths must be a tensor or an iterable of .* got int"),
        (lambda: cu_seqlens_from_lengths(None), TypeError, r"lengths must be a tensor or an iterable .* got NoneType"),
        (lambda: cu_seqlens_from_lengths("ab"), TypeError, r"lengths must hold integers"),
        (lambda: cu_seqlens_from_lengths([2**63]), ValueError, r"must be 0 to 2147483647, got 9223372036854775808"),
        (lambda: cu_seqlens_from_lengths([2**62] * 4), ValueError, r"lengths must sum to at most 2147483647"),
        (lambda: cu_seqlens_from_lengths([1.5]), TypeError, r"lengths must hold integers, got float32"),
        (lambda: cu_seqlens_from_lengths(torch.ones(2, 2).long()), ValueError, r"shape \(num_docs,\), got \(2, 2\)"),
        (lambda: cu_seqlens_from_position_ids([0, 1]), TypeError, r"position_ids must be a tensor, got list"),
        (lambda: cu_seqlens_from_position_ids(torch.zeros(2)), TypeError, r"must hold integers, got float32"),
        (lambda: cu_seqlens_from_position_ids(torch.zeros(3, 1, 2).int()), ValueError, r"got \(3, 1, 2\)"),
        (lambda: cu_seqlens_from_document_ids(torch.zeros(()).int()), ValueError, r"document_ids must be .*got \(\)"),
        (
            lambda: position_ids_from_cu_seqlens(torch.zeros(0).int()),
            ValueError,
            r"shape \(num_docs \+ 1,\), got \(0,\)",
        ),
        (lambda: position_ids_from_cu_seqlens(torch.tensor([1, 2])), ValueError, r"must start with 0, got 1"),
        (lambda: document_ids_from_cu_seqlens(torch.tensor([0, 4, 2])), ValueError, r"\(entry 2 follows 4\), got 2"),
        (lambda: cu_seqlens_from_padding_mask(torch.ones(2, 2)), TypeError, r"attention_mask must hold integers"),
        (lambda: cu_seqlens_from_padding_mask(torch.ones(2).bool()), ValueError, r"must be \(batch, row_len\)"),
        (lambda: unpad_input(torch.ones(2, 3), torch.ones(3, 2).bool()), ValueError, r"must be \(3, 2, \.\.\.\)"),
        (lambda: unpad_input([[1]], torch.ones(1, 1).bool()), TypeError, r"hidden_states must be a tensor, got list"),
        (lambda: pad_input(torch.ones(2, 3), torch.ones(3).long(), 1, 3), ValueError, r"one entry for each row"),
        (lambda: pad_input(torch.ones(2, 3), torch.tensor([0, 1]).int(), 1, 3), TypeError, r"indices must be int64"),
        (lambda: pad_input(torch.ones(2, 3), torch.tensor([0, 3]), 1, 3), ValueError, r"must be 0 to .* = 2, got 3"),
        (lambda: pad_input(torch.ones(2, 3), torch.tensor([-1, 0]), 1, 3), ValueError, r"must be 0 to .* got -1"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
