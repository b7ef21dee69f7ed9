"""Which backend a call takes, the instruction set levels, threads, and a forked child."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from herdkern.ops import backend, rope_table
from herdkern.ops.backend import (
    available_isas,
    choose,
    forced_isa,
    why_not_capability,
    why_not_native,
    why_not_triton,
)

# herdkern.ops.rms_norm is the function; its module has the same name
loss_op, rms_norm_op, rope_op, swiglu_op = (
    sys.modules[f"herdkern.ops.{name}"] for name in ("linear_cross_entropy", "rms_norm", "rope", "swiglu")
)
LEVELS = ["baseline", "avx2", "avx512", "amx"]


def test_choose_takes_the_first_that_can():
    assert choose("op", "auto", {"native": None, "reference": None}) == "native"
    with pytest.warns(UserWarning, match="op: using 'reference' because native: no such chip"):
        assert choose("op", "auto", {"native": "no such chip", "reference": None}) == "reference"


def test_an_explicit_backend_never_falls_back():
    assert choose("op", "reference", {"native": None, "reference": None}) == "reference"
    expected = "op: no backend can run this call (asked for 'native'): native: no such chip"
    with pytest.raises(NotImplementedError, match=re.escape(expected)):
        choose("op", "native", {"native": "no such chip", "reference": None})
    with pytest.raises(NotImplementedError, match="triton: op has no such backend"):
        choose("op", "triton", {"native": None, "reference": None})


def test_every_reason_is_named():
    with pytest.raises(NotImplementedError, match="native: a; reference: b"):
        choose("op", "auto", {"native": "a", "reference": "b"})


def test_backend_variable(monkeypatch):
    monkeypatch.setenv("HERDKERN_BACKEND", "reference")
    assert backend._default_backend() == "reference"
    monkeypatch.setenv("HERDKERN_BACKEND", "")
    assert backend._default_backend() == "auto"
    monkeypatch.setenv("HERDKERN_BACKEND", "cuda")
    with pytest.raises(ValueError, match="HERDKERN_BACKEND must be one of auto, native, triton, reference, got 'cuda'"):
        backend._default_backend()


def test_default_backend_stands_for_auto(monkeypatch):
    monkeypatch.setattr(backend, "_DEFAULT_BACKEND", "reference")
    assert choose("op", "auto", {"native": None, "reference": None}) == "reference"


def test_reasons_against_native():
    x = torch.zeros(2)
    assert why_not_native(x, torch.float32) is None
    assert why_not_native(x, torch.bfloat16) == "dtype must be bfloat16, got float32"
    assert why_not_native(x.double(), torch.float32, torch.bfloat16) == "dtype must be float32 or bfloat16, got float64"


def test_a_missing_extension_is_the_reason(monkeypatch):
    monkeypatch.setattr(backend, "_ops", None)
    monkeypatch.setattr(backend, "_NO_NATIVE_CPU", "herdkern._ops cannot be imported (why)")
    assert why_not_native(torch.zeros(2), torch.float32) == "herdkern._ops cannot be imported (why)"
    assert backend.active_isa() is None
    assert available_isas() == []
    with pytest.raises(ImportError, match=re.escape("cannot be imported (why)")):
        backend.native_module()


def test_threads_follow_torch(with_threads):
    with_threads(3)
    assert backend.num_threads() == 3
    assert backend.num_threads(1) == 1


@pytest.mark.parametrize("level", LEVELS)
def test_levels(level):
    before = backend.active_isa()
    if level in available_isas():
        with forced_isa(level):
            assert backend.active_isa() == level
    else:
        expected = f"HERDKERN_ISA must be a level that this machine runs, got '{level}'; its highest is "
        with pytest.raises(RuntimeError, match=re.escape(expected)), forced_isa(level):
            pass
    assert backend.active_isa() == before


def test_unknown_level():
    expected = "HERDKERN_ISA must be baseline, avx2, avx512 or amx, got 'sse9'; unset it to use the highest level"
    with pytest.raises(ValueError, match=expected), forced_isa("sse9"):
        pass


def run_python(script, **variables):
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


def test_level_variable_is_read_when_the_ops_are_loaded():
    script = "import herdkern.ops.backend as b; print(b.active_isa())"
    assert run_python(script, HERDKERN_ISA="baseline").stdout.strip() == "baseline"
    failed = run_python(script, HERDKERN_ISA="sse9")
    assert failed.returncode != 0
    assert "HERDKERN_ISA must be baseline, avx2, avx512 or amx, got 'sse9'" in failed.stderr


def kernels(x, weight, head, dout, table, positions, targets):
    """Every kernel once, forward and backward, on work for several threads, without a parallel op of torch."""
    y, _, rstd = rms_norm_op._forward_cpu(x, None, weight, 1e-5, "llama", 0.0)
    results = [y, *rms_norm_op._backward_cpu(dout, None, x, weight, rstd, "llama", 0.0, True, True)]
    results += [swiglu_op._forward_cpu(x, y), *swiglu_op._backward_cpu(dout, x, y, True, True)]
    turned = torch.empty(600, 4, 64)
    rope_op._launch("rope", [(x.view(600, 4, 64), turned)], *table, positions, None, False, False)
    results.append(turned)
    results += loss_op._forward_cpu(x, head, targets, -100, 2, 0.0, 0.0, 0.0, True, True)
    return [result.numpy().tobytes() for result in results]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_gets_the_same_bits_and_does_not_hang(with_threads, monkeypatch):
    # torch's own parallel ops hang in such a child, its filling of new memory among them
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with_threads(2)
    inputs = torch.randn(600, 256), torch.randn(256), torch.randn(500, 256), torch.randn(600, 256)
    inputs = *inputs, rope_table(600, 64), torch.arange(600), torch.arange(600) % 500
    expected = kernels(*inputs)  # the pool of threads exists now, and a child does not inherit it
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if kernels(*inputs) == expected else 3)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hung")


def test_reasons_against_triton(monkeypatch):
    x = torch.zeros(2)
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not_triton(x, "triton", torch.float32) is None
    assert "needs a CUDA tensor" in why_not_triton(x, "auto", torch.float32)  # never interpreted unasked
    assert why_not_triton(x, "triton", torch.bfloat16) == "dtype must be bfloat16, got float32"
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    assert why_not_triton(x, "triton", torch.float32) == "triton is not installed; pip install 'herdkern[triton]'"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "needs a CUDA tensor" in why_not_triton(x, "triton", torch.float32)


def test_kernels_of_another_device_are_no_fallback(recwarn):
    assert choose("op", "auto", {"native": "no native kernels for device cuda", "triton": None}) == "triton"
    assert not recwarn


@pytest.mark.parametrize(
    ("capability", "targets", "runs"),
    [
        ((8, 0), "80;90a;100a;120+PTX", True),
        ((8, 9), "80;90a;100a;120+PTX", True),  # plain code runs on later GPUs of its generation
        ((9, 0), "80;90a;100a;120+PTX", True),
        ((10, 0), "80;90a;100a;120+PTX", True),
        ((10, 3), "80;90a;100a;120+PTX", False),  # "a" does not
        ((12, 1), "80;90a;100a;120+PTX", True),
        ((13, 0), "80;90a;100a;120+PTX", True),  # by the portable code
        ((9, 0), "80+PTX", True),
        ((8, 0), "90a+PTX", False),
        ((7, 5), "75+PTX", False),
    ],
)
def test_which_gpus_a_build_runs_on(capability, targets, runs):
    reason = why_not_capability(capability, targets)
    assert (reason is None) == runs
    assert runs or f"{capability[0]}.{capability[1]}" in reason


def test_native_on_a_gpu_needs_the_build_and_its_function(monkeypatch):
    class Gpu:
        dtype, is_cpu, is_cuda, device = torch.float32, False, True, torch.device("cuda:0")

    assert why_not_native(Gpu(), torch.float32) == "no native kernels for device cuda"
    monkeypatch.setattr(backend, "_cuda", None)
    monkeypatch.setattr(backend, "_NO_NATIVE_CUDA", "herdkern._cuda cannot be imported (why)")
    assert why_not_native(Gpu(), torch.float32, cuda="rope") == "herdkern._cuda cannot be imported (why)"
    with pytest.raises(ImportError, match="why"):
        backend.cuda_module()
    monkeypatch.setattr(backend, "_cuda", object())
    monkeypatch.setattr(backend, "_CUDA_FUNCTIONS", frozenset(["rope"]))
    monkeypatch.setattr(backend, "_REASON_OF_DEVICE", {0: None})
    assert why_not_native(Gpu(), torch.float32, cuda="rope") is None
    assert "has no swiglu_forward" in why_not_native(Gpu(), torch.float32, cuda="swiglu_forward")


def test_ops_load_no_triton():
    code = "import herdkern.ops, herdkern.nn, sys; sys.exit(bool({'triton', 'herdkern.ops.triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
