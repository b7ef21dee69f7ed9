"""Which implementation an op call takes, and why not another: the only place that probes the machine."""

import contextlib
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

_ops: ModuleType | None = None
_NO_NATIVE_CPU = ""
try:
    _ops = importlib.import_module("herdkern._ops")
except ImportError as error:
    _NO_NATIVE_CPU = f"herdkern._ops cannot be imported ({error}); reinstall with a C++17 compiler"

_cuda: ModuleType | None = None
_NO_NATIVE_CUDA = ""
try:
    _cuda = importlib.import_module("herdkern._cuda")
except ImportError as error:
    _NO_NATIVE_CUDA = f"herdkern._cuda cannot be imported ({error}); build with HERDKERN_CUDA=1, see docs/wheels.md"
_CUDA_FUNCTIONS = frozenset(dir(_cuda)) if _cuda is not None else frozenset()

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # imported by the first call that needs it
_NO_TRITON_DEVICE = "needs a CUDA tensor (TRITON_INTERPRET=1 and backend='triton' interpret its kernels on CPU tensors)"

Backend = Literal["auto", "native", "triton", "reference"]


def choose(op: str, backend: Backend, why_not: dict[str, str | None]) -> str:
    """Return the first backend of `why_not` (best first) whose reason is None; an explicit `backend` never falls back.

    It warns where "auto" ends at the reference; native and Triton kernels are one for the CPU, one for the GPU.

    Raises: NotImplementedError with every reason if no backend can run the call.
    """
    asked = _DEFAULT_BACKEND if backend == "auto" else backend
    candidates = why_not if asked == "auto" else {asked: why_not.get(asked, f"{op} has no such backend")}
    refused: list[str] = []
    for name, reason in candidates.items():
        if reason is None:
            if refused and name == "reference":
                warnings.warn(f"{op}: using {name!r} because " + "; ".join(refused), stacklevel=3)
            return name
        refused.append(f"{name}: {reason}")
    raise NotImplementedError(f"{op}: no backend can run this call (asked for {asked!r}): " + "; ".join(refused))


def why_not_native(x: Tensor, *dtypes: torch.dtype, cuda: str = "") -> str | None:
    """Return None if the native kernels can run on `x`, else the reason: its device, its dtype or a missing build.

    cuda: the function of herdkern._cuda that would run on a CUDA tensor; "": the op has none.
    """
    if x.dtype not in dtypes:
        return f"dtype must be {' or '.join(map(dtype_name, dtypes))}, got {dtype_name(x.dtype)}"
    if x.device.type == "meta" or x.is_cpu:
        return _NO_NATIVE_CPU or None
    if not x.is_cuda or not cuda:
        return f"no native kernels for device {x.device.type}"
    if _cuda is None:
        return _NO_NATIVE_CUDA
    return (
        _why_not_device(x.device.index) if cuda in _CUDA_FUNCTIONS else f"herdkern._cuda has no {cuda}; build it anew"
    )


_REASON_OF_DEVICE: dict[int | None, str | None] = {}


def _why_not_device(index: int | None) -> str | None:
    """The reason why the compiled targets do not run on this CUDA device."""
    if index not in _REASON_OF_DEVICE:
        capability = torch.cuda.get_device_capability(index)
        _REASON_OF_DEVICE[index] = why_not_capability(capability, cuda_targets() or "")
    return _REASON_OF_DEVICE[index]


# What torch.compiler.assume_constant_result does, which would load the whole compiler here.
_why_not_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not_capability(capability: tuple[int, int], targets: str) -> str | None:
    """Return None if a build for `targets` (as HERDKERN_CUDA_ARCHS, "+PTX" at the end) runs at `capability`."""
    if capability < (8, 0):
        return f"compute capability must be at least 8.0, got {capability[0]}.{capability[1]}"
    names = targets.removesuffix("+PTX").split(";")
    for name in names:
        number = int(name.rstrip("af"))
        target = number // 10, number % 10
        # plain code runs on later GPUs of its generation, "a" on that one alone, PTX on all later ones
        if capability == target or (name.isdigit() and capability[0] == target[0] and capability > target):
            return None
        if name == names[-1] and targets.endswith("+PTX") and capability > target:
            return None
    return f"herdkern._cuda has code for {targets}, not for compute capability {capability[0]}.{capability[1]}"


def why_not_triton(x: Tensor, backend: Backend, *dtypes: torch.dtype) -> str | None:
    """Return None if the Triton kernels can run on `x`, else the reason: its device, its dtype or a missing package.

    CPU tensors run only where the caller asked for "triton" by name and TRITON_INTERPRET=1 is set: for tests.
    """
    if not x.is_cuda:
        asked = _DEFAULT_BACKEND if backend == "auto" else backend
        if not x.is_cpu or asked != "triton" or os.environ.get("TRITON_INTERPRET") != "1":
            return _NO_TRITON_DEVICE
    if x.dtype not in dtypes:
        return f"dtype must be {' or '.join(map(dtype_name, dtypes))}, got {dtype_name(x.dtype)}"
    return None if _HAS_TRITON else "triton is not installed; pip install 'herdkern[triton]'"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype as error messages write it, for example "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def native_module() -> ModuleType:
    """Return the extension module herdkern._ops.

    Raises: ImportError with the loader's own reason if it is missing.
    """
    if _ops is None:
        raise ImportError(_NO_NATIVE_CPU)
    return _ops


def cuda_module() -> ModuleType:
    """Return the extension module herdkern._cuda.

    Raises: ImportError with the loader's own reason if it is missing.
    """
    if _cuda is None:
        raise ImportError(_NO_NATIVE_CUDA)
    return _cuda


def call_cuda(x: Tensor, function: str, *args: Any) -> Any:
    """Call a function of herdkern._cuda, whose last argument is a stream, on the device and current stream of `x`.

    Tensors on the CPU are for the emulated module of tests/cuda, which has no streams.
    Raises: ImportError with the loader's own reason if herdkern._cuda is missing.
    """
    call = getattr(cuda_module(), function)
    if not x.is_cuda:
        return call(*args, 0)
    with torch.cuda.device_of(x):
        return call(*args, torch.cuda.current_stream().cuda_stream)


def cuda_targets() -> str | None:
    """Return what herdkern._cuda is compiled for, as "80;90a;100a;120+PTX"; None if it is not built."""
    return None if _cuda is None else cast(str, _cuda.targets())


def num_threads(requested: int | None = None) -> int:
    """Return the threads a kernel may use: `requested`, else torch.get_num_threads()."""
    return torch.get_num_threads() if requested is None else requested


def faster_peers(op: str) -> list[dict[str, Any]]:
    """Recorded benchmark cases of `op` that a torch path won: dicts of case, peer, times_faster and measured_on.

    `choose` does not look at shapes, because a time holds for one machine: where such a case is yours, measure, and
    call the peer yourself (torch.compile is `backend="reference"` inside a compiled function).
    op: a name of benchmarks/bench_<op>.py, as "rms_norm", "linear_cross_entropy" or "adamw"; unknown ones have none.
    """
    text = (Path(__file__).parent / "faster_peers.json").read_text(encoding="utf-8")
    return list(json.loads(text).get(op.removeprefix("linear_"), []))


def active_isa() -> str | None:
    """Return the instruction set level that the CPU kernels run at (baseline, avx2, avx512, amx); None if not built."""
    return None if _ops is None else cast(str, _ops.active_isa())


def available_isas() -> list[str]:
    """Return the levels that this machine runs, lowest first; empty if the CPU kernels are not built."""
    levels = ["baseline", "avx2", "avx512", "amx"]
    return [] if _ops is None else levels[: levels.index(_ops.detected_isa()) + 1]


@contextlib.contextmanager
def forced_isa(level: str) -> Iterator[None]:
    """Run the body at a lower instruction set level; for tests, and not while another thread runs a kernel.

    Raises: ValueError for an unknown level, RuntimeError for one that the machine lacks.
    """
    module = native_module()
    before = module.active_isa()
    module.set_isa(level)
    try:
        yield
    finally:
        module.set_isa(before)


def _default_backend() -> Backend:
    """The backend that "auto" stands for: HERDKERN_BACKEND, else the best one for each call."""
    value = os.environ.get("HERDKERN_BACKEND") or "auto"
    if value not in get_args(Backend):
        raise ValueError(f"HERDKERN_BACKEND must be one of {', '.join(get_args(Backend))}, got {value!r}")
    return cast(Backend, value)


_DEFAULT_BACKEND: Backend = _default_backend()
if _ops is not None:
    _ops.set_isa(os.environ.get("HERDKERN_ISA", ""))
