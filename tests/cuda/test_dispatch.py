"""Which kernels a CUDA tensor takes: native where the build has them, in fake tensors too; graphs, on a GPU."""

import types

import pytest
import torch
from gpu_or_emulator import ON_GPU
from torch._subclasses.fake_tensor import FakeTensorMode

from herdkern.ops import backend, rms_norm, rope_qk, rope_table, swiglu
from herdkern.ops.attention_cuda import rows_of_16_bytes

FUNCTIONS = ("rms_norm_backward", "swiglu_backward", "rope", "adamw_step")


@pytest.fixture
def built(monkeypatch):
    """As if herdkern._cuda were built and cuda:0 were an H200."""
    module = types.SimpleNamespace(targets=lambda: "90a+PTX", **dict.fromkeys(FUNCTIONS))
    monkeypatch.setattr(backend, "_cuda", module)
    monkeypatch.setattr(backend, "_CUDA_FUNCTIONS", frozenset(FUNCTIONS))
    monkeypatch.setattr(backend, "_REASON_OF_DEVICE", {0: None})


def calls(device, **options):
    x, weight = torch.ones(4, 64, device=device), torch.ones(64, device=device)
    q, k = torch.ones(4, 3, 16, device=device), torch.ones(4, 1, 16, device=device)
    table = [t.to(device) for t in rope_table(8, 16)]
    return [
        lambda: rms_norm(x, weight, residual=x, **options)[1],
        lambda: swiglu(x, **options),
        lambda: rope_qk(q, k, *table, **options)[0],
    ]


@pytest.mark.usefixtures("built")
def test_fake_cuda_tensors_take_the_native_op():
    with FakeTensorMode():
        for call, shape in zip(calls("cuda:0", backend="native"), [(4, 64), (4, 32), (4, 3, 16)]):
            out = call()
            assert out.shape == shape
            assert out.device == torch.device("cuda:0")


def test_without_the_build_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(backend, "_cuda", None)
    monkeypatch.setattr(backend, "_NO_NATIVE_CUDA", "herdkern._cuda cannot be imported (why)")
    with FakeTensorMode():
        for call in calls("cuda:0", backend="native"):
            with pytest.raises(NotImplementedError, match="_cuda cannot be imported"):
                call()


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU and herdkern._cuda")
def test_native_by_default_and_in_graphs():
    for call, expected in zip(calls("cuda"), calls("cuda", backend="native")):
        assert torch.equal(call(), expected())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        graph.replay()
        assert torch.equal(out, expected())


def test_rows_that_begin_between_16_bytes_are_copied():
    x = torch.zeros(4 * 2 * 16 + 1, dtype=torch.bfloat16)
    aligned, odd = x[:-1].view(4, 2, 16), x[1:].view(4, 2, 16)  # both are contiguous
    assert rows_of_16_bytes(aligned) is aligned
    assert rows_of_16_bytes(odd).data_ptr() % 16 == 0
    assert rows_of_16_bytes(aligned[..., ::2]).stride() == (16, 8, 1)
