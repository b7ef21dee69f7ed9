"""The accuracy bound that every op's output and gradients must keep, as fixtures."""

import pytest
import torch
from fp64_bound import check_against_fp64


@pytest.fixture
def assert_matches_fp64():
    """check(op, reference, inputs, dout=None): output and every gradient against the reference in float64."""
    return check_against_fp64


@pytest.fixture
def with_threads():
    """with_threads(n) sets torch's number of threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
