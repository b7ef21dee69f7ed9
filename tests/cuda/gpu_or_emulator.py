"""Where the tests of csrc/cuda run: on a GPU by herdkern._cuda, else on the CPU by the emulated module."""

import pytest
import torch

from herdkern.ops import backend

ON_GPU = torch.cuda.is_available() and backend.cuda_targets() is not None


@pytest.fixture
def device(request, monkeypatch):
    """The device of the tensors that a test gives to the kernels."""
    if ON_GPU:
        return torch.device("cuda")
    monkeypatch.setattr(backend, "_cuda", request.getfixturevalue("cuda_simt"))
    return torch.device("cpu")


@pytest.fixture
def orders(request):
    """orders(call): what `call` returns, after it was seen to be the same bits on every run and in every lane order."""

    def check(call):
        first = call()
        for order in (None, None) if ON_GPU else ("descending", "random"):
            if order is not None:
                from simt_build import set_order

                set_order(order, seed=1)
                request.addfinalizer(lambda: set_order("ascending"))
            for a, b in zip(first, call(), strict=True):
                assert torch.equal(a, b), order
        return first

    return check
