"""Compiles every Triton kernel for sm_80, sm_90, sm_100 and sm_120 without a GPU; fails if a hot one spills registers.

    python tools/check_gpu_build.py [--target 90] [--case PART] [--json FILE]     needs triton, runs no kernel

The cases below call the ops on tensors of real sizes; each launch is caught and its kernel compiled as the launch would
have it compiled: with the types, constants and alignments of its arguments. The table shows registers of a thread,
shared memory of a block, bytes of stack, instructions that touch local memory (spills), and how many accesses of global
memory move 16 bytes. --cases FILE takes CASES from another Python file.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGETS = (80, 90, 100, 120)  # A100, H100 and H200, B200, RTX 50


@dataclasses.dataclass(frozen=True)
class Case:
    """A call that launches kernels. One that is hot may not spill."""

    name: str
    call: Callable[[], Any]
    hot: bool = True
    targets: tuple[int, ...] = TARGETS


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel as one launch compiles it: what jit.run was given."""

    case: str
    hot: bool
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: tuple[int, ...]


def cases() -> list[Case]:
    """The launches that are checked: the sizes of the benchmarks, those of large models, odd ones."""
    import torch
    from gpu_build_attention import attention_cases

    from herdkern.ops import rope_table
    from herdkern.ops.adamw import AdamwSettings
    from herdkern.ops.triton import adamw, linear_cross_entropy, rms_norm, rope, swiglu

    bf16, fp32 = torch.bfloat16, torch.float32

    def leaf(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=True)  # never read: the kernels do not run

    def backward(outputs: Any) -> None:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.empty(out.shape, dtype=out.dtype) for out in outputs])

    def norm(dim: int, dtype: torch.dtype = bf16, residual: bool = False, casting: str = "llama") -> None:
        x = leaf(4096, dim, dtype=dtype)
        extra = leaf(4096, dim, dtype=dtype) if residual else None
        made = rms_norm.forward(x, extra, leaf(dim, dtype=dtype), 1e-5, casting, float(casting == "gemma"))
        backward(made[: 2 if residual else 1])

    def gated(dim: int, dtype: torch.dtype = bf16, packed: bool = False) -> None:
        if packed:
            backward(swiglu.forward(leaf(4096, 2 * dim, dtype=dtype), None))
        else:
            backward(swiglu.forward(leaf(4096, dim, dtype=dtype), leaf(4096, dim, dtype=dtype)))

    def turned(places: str, interleaved: bool = False, dtype: torch.dtype = bf16, head_dim: int = 128) -> None:
        positions = torch.zeros(4096, dtype=torch.int64) if places == "positions" else None
        borders = torch.zeros(17, dtype=torch.int32) if places == "documents" else None
        q, k = leaf(4096, 32, head_dim, dtype=dtype), leaf(4096, 8, head_dim, dtype=dtype)
        backward(rope.rope_qk(q, k, *rope_table(8, head_dim), positions, borders, interleaved, False))

    def loss(vocab_size: int, dtype: torch.dtype = bf16, options: tuple[float, ...] = (0.0, 0.0, 0.0)) -> None:
        numbers = (-100, 2, *options)
        targets = torch.zeros(8, dtype=torch.int64)
        hidden, weight = leaf(8, 16, dtype=dtype), leaf(vocab_size, 16, dtype=dtype)
        linear_cross_entropy.forward(hidden, weight, targets, *numbers, False, False)  # evaluation
        made = linear_cross_entropy.forward(hidden, weight, targets, *numbers, True, True)
        backward(made[:2])  # with a gradient of the log-probabilities

    def step(dtype: torch.dtype, master: bool = False, seed: int | None = None) -> None:
        params = [torch.empty(4096, 4096, dtype=dtype), torch.empty(4096, dtype=dtype)]
        moments = [torch.empty(p.shape) for p in params]
        rows = [(p, p, m, m, m if master else None, torch.zeros(())) for p, m in zip(params, moments, strict=True)]
        adamw.adamw_step(rows, [AdamwSettings()] * len(rows), range(len(rows)), 0.0, seed)
        with contextlib.suppress(ValueError):  # of the root of what was never computed
            adamw.grad_norm(params)

    return [
        Case("rms_norm bf16 4096", lambda: norm(4096)),
        Case("rms_norm bf16 4096 residual", lambda: norm(4096, residual=True)),
        Case("rms_norm fp32 4096 residual", lambda: norm(4096, fp32, residual=True)),
        Case("rms_norm bf16 14336", lambda: norm(14336)),
        Case("rms_norm bf16 16384 residual", lambda: norm(16384, residual=True)),
        Case("rms_norm bf16 128 (heads)", lambda: norm(128)),
        Case("rms_norm bf16 4096 gemma residual", lambda: norm(4096, residual=True, casting="gemma")),
        Case("rms_norm bf16 4096 none", lambda: norm(4096, casting="none"), hot=False),
        Case("rms_norm bf16 1023 (odd)", lambda: norm(1023), hot=False),
        Case("swiglu bf16 14336", lambda: gated(14336)),
        Case("swiglu bf16 14336 packed", lambda: gated(14336, packed=True)),
        Case("swiglu fp32 14336", lambda: gated(14336, fp32)),
        Case("swiglu bf16 1023 packed (odd)", lambda: gated(1023, packed=True), hot=False),
        Case("rope bf16 32+8 heads of 128", lambda: turned("running")),
        Case("rope bf16 32+8 heads of 128 positions", lambda: turned("positions")),
        Case("rope bf16 32+8 heads of 128 documents", lambda: turned("documents")),
        Case("rope bf16 32+8 heads of 128 interleaved", lambda: turned("documents", interleaved=True)),
        Case("rope fp32 32+8 heads of 64", lambda: turned("documents", dtype=fp32, head_dim=64)),
        Case("rope bf16 32+8 heads of 80 (odd)", lambda: turned("documents", head_dim=80), hot=False),
        Case("linear_cross_entropy bf16 128256", lambda: loss(128256)),
        Case("linear_cross_entropy bf16 32000", lambda: loss(32000)),
        Case("linear_cross_entropy fp32 32000", lambda: loss(32000, fp32)),
        Case(
            "linear_cross_entropy bf16 32000 smoothing, z-loss, softcap", lambda: loss(32000, bf16, (0.1, 1e-4, 30.0))
        ),
        Case("adamw fp32", lambda: step(fp32)),
        Case("adamw bf16 master", lambda: step(bf16, master=True)),
        Case("adamw bf16 stochastic rounding", lambda: step(bf16, seed=1)),
        *(Case(**case) for case in attention_cases()),
    ]


def caught_launches(wanted: list[Case]) -> list[Launch]:
    """What the cases launch, each kernel with its arguments once."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run
    try:
        for case in wanted:

            def record(kernel: Any, *args: Any, grid: Any, warmup: bool, case: Case = case, **kwargs: Any) -> None:
                launches.append(Launch(case.name, case.hot, kernel, args, kwargs, case.targets))

            JITFunction.run = record
            case.call()
    finally:
        JITFunction.run = run
    return launches


def source_and_options(launch: Launch, target: Any) -> tuple[Any, dict[str, Any]]:
    """What triton compiles for this launch on that target: the steps of JITFunction.run before it needs a device."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {"debug": False, "instrumentation_mode": "", **launch.kwargs}
    bound, specialization, options = bind(*launch.args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def different(launches: list[Launch]) -> list[Launch]:
    """The launches that compile to different kernels, the first of each; hot if one of a hot case is the same."""
    from triton.backends.compiler import GPUTarget

    found: dict[str, Launch] = {}
    for launch in launches:
        source, _ = source_and_options(launch, GPUTarget("cuda", TARGETS[0], 32))
        key = f"{source.hash()} {launch.kwargs.get('num_warps')} {launch.kwargs.get('num_stages')} {launch.targets}"
        if launch.hot and key in found:
            found[key] = dataclasses.replace(found[key], hot=True)
        found.setdefault(key, launch)
    return list(found.values())


def compiled(launch: Launch, capability: int) -> dict[str, Any]:
    """One row of the table, or its error."""
    import triton
    from triton.backends.compiler import GPUTarget

    row: dict[str, Any] = {"case": launch.case, "kernel": launch.kernel.__name__, "target": f"sm_{capability}"}
    target = GPUTarget("cuda", capability, 32)
    try:
        source, options = source_and_options(launch, target)
        built = triton.compile(source, target=target, options=options)
        row |= resources(built.asm["cubin"])
    except Exception as error:  # whatever the compiler raises is this row's result
        return row | {"hot": launch.hot, "error": f"{type(error).__name__}: {error}"[:500]}
    return row | {
        "hot": launch.hot,
        "dynamic_shared_bytes": built.metadata.shared,
        "warps": built.metadata.num_warps,
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, memory and accesses of a compiled kernel, read by cuobjdump of the triton package."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage says {usage!r}")
    accesses = re.findall(r"\b(?:LDG|STG|LDGSTS)\.E[.\w]*", code)
    return {
        "registers": int(found[1]),
        "stack_bytes": int(found[2]),
        "local_bytes": int(found[4]),
        "spill_instructions": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "wgmma": len(re.findall(r"\bHGMMA\b", code)),
        "accesses": len(accesses),
        "accesses_of_16_bytes": sum(".128" in access for access in accesses),
    }


def spills(row: dict[str, Any]) -> bool:
    """Whether the kernel uses memory for what should be registers."""
    return bool(row["stack_bytes"] or row["local_bytes"] or row["spill_instructions"])


def lacks_wgmma(row: dict[str, Any]) -> bool:
    """Whether a kernel of attention on Hopper multiplies without its warp-group instructions."""
    multiplies = row["case"].startswith("attention") and row["kernel"] != "_tile_list_kernel"
    return multiplies and row["target"] == "sm_90" and not row["wgmma"]


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line for each kernel and target."""
    columns = ("registers", "dynamic_shared_bytes", "stack_bytes", "spill_instructions")
    print(f"{'case and kernel':88} {'target':>7} {'regs':>5} {'shared':>7} {'stack':>6} {'spills':>6} {'16 B':>9}")
    for row in rows:
        name = f"{row['case']}: {row['kernel'].strip('_')}{'' if row['hot'] else ' (not hot)'}"
        if "error" in row:
            print(f"{name:88} {row['target']:>7} FAILED {row['error']}")
            continue
        wide = f"{row['accesses_of_16_bytes']}/{row['accesses']}"
        numbers = (f"{row[column]:>{width}}" for column, width in zip(columns, (5, 7, 6, 6), strict=True))
        faults = "  SPILLS" * spills(row) + "  NO WGMMA" * (row["hot"] and lacks_wgmma(row))
        print(f"{name:88} {row['target']:>7} {' '.join(numbers)} {wide:>9}{faults}")


def page_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line for each kernel of a case, in the form that takes most registers on each target."""
    forms: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        if "error" not in row:
            by_target = forms.setdefault(f"{row['case']} | `{row['kernel'].strip('_')}`", {})
            by_target.setdefault(row["target"], []).append(row)
    text = "| case | kernel | registers | shared, bytes | spills | 16-byte accesses |\n|---|---|---|---|---|---|\n"
    for name, by_target in forms.items():
        worst = [max(found, key=lambda row: row["registers"]) for found in by_target.values()]
        registers = ", ".join(str(row["registers"]) for row in worst)
        spilled = max(row["spill_instructions"] for found in by_target.values() for row in found)
        wide = f"{worst[0]['accesses_of_16_bytes']} of {worst[0]['accesses']}"
        text += f"| {name} | {registers} | {worst[0]['dynamic_shared_bytes']} | {spilled} | {wide} |\n"
    return text


def load_cases(path: str) -> list[Case]:
    """The cases of another file."""
    spec = importlib.util.spec_from_file_location("gpu_build_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [Case(*case) for case in module.CASES]


_launches: list[Launch] = []  # inherited by the forked workers: kernels cannot be pickled


def _compile_one(job: tuple[int, int]) -> dict[str, Any]:
    return compiled(_launches[job[0]], job[1])


def main(arguments: list[str] | None = None) -> int:
    """Compiles what was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--case", default="", metavar="PART", help="only cases whose name contains PART")
    parser.add_argument("--cases", metavar="FILE", help="a Python file with CASES = [(name, call, hot), ...]")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--page", metavar="FILE", help="also put a table into this page, between its markers")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        print("check_gpu_build: triton must be installed, got no such package; pip install 'herdkern[triton]'")
        return 2
    sys.path.insert(0, str(ROOT / "tools"))
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    import torch
    import triton

    began = time.time()
    wanted = load_cases(options.cases) if options.cases else cases()
    _launches[:] = different(caught_launches([case for case in wanted if options.case in case.name]))
    wanted_targets = options.target or TARGETS
    jobs = [(i, target) for i, launch in enumerate(_launches) for target in launch.targets if target in wanted_targets]
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        rows = pool.map(_compile_one, jobs, chunksize=1)
    print_table(rows)
    failed = [row for row in rows if "error" in row or (row["hot"] and (spills(row) or lacks_wgmma(row)))]
    summary = f"{len(rows)} kernels compiled with triton {triton.__version__} in {time.time() - began:.0f} s"
    print(f"\n{summary}; {len(failed)} failed or spill. Compiled only: no kernel was run, nothing was timed.")
    if options.json:
        report = {"bench": "gpu_build", "note": "compiled ahead of time, not run", "triton": triton.__version__}
        text = json.dumps(report | {"torch": torch.__version__, "rows": rows}, indent=1)
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    if options.page:
        page = Path(options.page)
        found = f"<!-- gpu build -->\n{page_table(rows)}<!-- /gpu build -->"
        text = re.sub(r"<!-- gpu build -->.*<!-- /gpu build -->", found, page.read_text(encoding="utf-8"), flags=re.S)
        page.write_text(text, encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
