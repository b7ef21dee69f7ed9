"""Fixtures that run csrc/cuda on a CPU."""

import ctypes

import pytest
from simt_build import emulated_module, emulator, set_order


@pytest.fixture(params=["ascending", "descending", "random"])
def lane_order(request):
    """The test runs once for each order of lanes, warps and blocks."""
    set_order(request.param, seed=1)
    yield request.param
    set_order("ascending")


@pytest.fixture
def cuda_simt():
    """The emulated _cuda; takes addresses of CPU memory, and 0 as the stream."""
    return emulated_module()


@pytest.fixture
def declared():
    """declared(tensor, ...): kernels may touch the memory of these alone, to the byte."""

    def declare(*tensors):
        for x in tensors:
            begin = x.data_ptr()
            extent = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
            emulator().simt_declare(ctypes.c_void_p(begin), ctypes.c_size_t(extent * x.element_size()))

    yield declare
    emulator().simt_forget_declared()
