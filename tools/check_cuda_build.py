"""Compiles herdkern._cuda for every target without a GPU; fails on spills, stack frames and a Hopper kernel without its
instructions.

    python tools/check_cuda_build.py [--json FILE] [--page FILE] [--objects DIR]     runs no kernel

Needs nvcc (12.8 or later), and cuobjdump, which comes with the triton package; without them it says so and how to get
them. A kernel whose name contains "hopper" must, for sm_90a, hold warpgroup products (HGMMA) and bulk copies (UBLKCP,
UTMALDG). Occupancy is what registers, static shared memory and the largest block allow.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NO_NVCC = (
    "_cuda was not checked: there is no nvcc. Install CUDA 12.8 or later, or from the package registry: pip install "
    "nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl, and set CUDA_HOME to the folder nvidia/cu13 of the "
    "environment's site-packages"
)
# Kernels that may use local memory, with the reason: none.
NOT_HOT: dict[str, str] = {}
# Warps, blocks and bytes of shared memory of a processor, bytes that CUDA keeps of each block's.
PROCESSORS = {"sm_80": (64, 32, 163), "sm_90": (64, 32, 227), "sm_100": (64, 32, 227), "sm_120": (48, 24, 99)}
WIDE_ONLY = r"swiglu_\w+<(?:bf16|fp16|float), [48]>"  # kernels that move 16 bytes at a time and nothing else


def built() -> Path | None:
    """The folder of the objects of a fresh build; None if there is no nvcc.

    Raises: SystemExit with the compiler's message if it does not build.
    """
    command = [sys.executable, "setup.py", "-q", "build_ext", "--only=_cuda", "--build-lib", "build/cuda"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HERDKERN_CUDA": "1"}, capture_output=True, text=True)
    if "needs nvcc, found none" in done.stderr:
        return None
    if done.returncode:
        sys.exit(f"check_cuda_build: _cuda does not build\n{done.stdout}{done.stderr}")
    return next((ROOT / "build").glob(f"temp.*{sys.implementation.cache_tag}/_cuda"))


def disassembler() -> str | None:
    """cuobjdump: the one on PATH, that of the nvidia-cuda-cuobjdump package's folder, triton's."""
    folders = [p for name in ("nvidia", "triton") if (spec := find_spec(name)) for p in spec.submodule_search_locations]
    found = (tool for folder in folders for tool in sorted(Path(folder).rglob("bin/cuobjdump")))
    return shutil.which("cuobjdump") or next(map(str, found), None)


def resources(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(kernel, target) -> registers and memory, from what ptxas -v says."""
    found = {}
    for part in re.split(r"Compiling entry function ", text)[1:]:
        name, target = re.match(r"'(\w+)' for '(\w+)'", part).groups()  # type: ignore[union-attr]
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.*?(\d+) bytes.*?(\d+) bytes", part).groups())  # type: ignore[union-attr]
        used = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found[name, target] = {
            "registers": int(used[1]) if used else 0,
            "shared_bytes": int(shared[1]) if shared else 0,
            "stack_bytes": stack,
            "spill_bytes": stores + loads,
        }
    return found


def instructions(tool: str, file: Path) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, target) -> what the machine code of an object holds."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    counts: collections.Counter[str] = collections.Counter()
    target = ""
    lines = subprocess.Popen([tool, "-sass", file], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert lines.stdout is not None
    for line in lines.stdout:
        if "code for sm_" in line:
            target = line.split()[-1]
        elif "Function : " in line:
            counts = collections.Counter()
            found[line.split()[-1], target] = counts  # type: ignore[assignment]
        elif "/*0" in line and ";" in line:
            operation = re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
            if operation is None:
                continue
            name = operation[1].partition(".")[0]
            counts["instructions"] += 1
            if name in ("LDL", "STL"):
                counts["local_accesses"] += 1
            elif name in ("HMMA", "HGMMA", "UBLKCP", "UTMALDG", "LDGSTS", "LDSM"):
                counts[name] += 1
            if name in ("LDG", "STG", "LDGSTS", "LD", "ST"):  # the last two: global memory for all the compiler knows
                counts["accesses"] += 1
                counts["accesses_of_16_bytes"] += ".128" in operation[1]
    if lines.wait():
        sys.exit(f"check_cuda_build: {tool} -sass {file} failed")
    return found


def largest_blocks(tool: str, file: Path) -> dict[str, int]:
    """kernel -> threads of its largest block (__launch_bounds__), from the portable code of an object."""
    text = subprocess.run([tool, "-ptx", file], capture_output=True, text=True).stdout
    entries = re.findall(r"\.entry (\w+)\(.*?\)\s*((?:\.\w+ [\d, ]+\s*)*)\{", text, re.S)
    limits = {name: re.search(r"\.maxntid (\d+)", marks) for name, marks in entries}
    return {name: int(limit[1]) if limit else 1024 for name, limit in limits.items()}


def occupancy(row: dict[str, Any]) -> float:
    """Share of a processor's warps that are at work with blocks of the largest size."""
    max_warps, max_blocks, shared_kib = PROCESSORS[row["target"].rstrip("af")]
    warps = -(-row["threads"] // 32)
    registers_of_warp = -(-row["registers"] * 32 // 256) * 256
    by_registers = 65536 // registers_of_warp // warps if registers_of_warp else max_blocks
    by_shared = shared_kib * 1024 // (row["shared_bytes"] + 1024)
    return min(max_blocks, max_warps // warps, by_registers, by_shared) * warps / max_warps


def faults(row: dict[str, Any]) -> list[str]:
    """What a kernel must not be."""
    found = []
    is_hot = not any(re.search(pattern, row["kernel"]) for pattern in NOT_HOT)
    if is_hot and row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes")
    if is_hot and row["stack_bytes"]:
        found.append(f"has a stack frame of {row['stack_bytes']} bytes")
    if is_hot and row["local_accesses"]:
        found.append(f"has {row['local_accesses']} accesses of local memory")
    if re.search(WIDE_ONLY, row["kernel"]) and row["accesses_of_16_bytes"] != row["accesses"]:
        found.append(f"has {row['accesses'] - row['accesses_of_16_bytes']} accesses of less than 16 bytes")
    if "hopper" in row["kernel"] and row["target"] == "sm_90a":
        found += [] if row["HGMMA"] else ["has no HGMMA"]
        found += [] if row["UBLKCP"] or row["UTMALDG"] else ["has no bulk copies"]
    return found


def demangled(names: list[str]) -> dict[str, str]:
    """Names of kernels as they are written, without namespaces and arguments."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [
        re.sub(r"^void |herdkern::cuda::|\(anonymous namespace\)::|\([^()]*\)$", "", line) for line in text.splitlines()
    ]
    return dict(zip(names, (name.replace("__nv_bfloat16", "bf16").replace("__half", "fp16") for name in short)))


def rows_of(folder: Path, tool: str) -> list[dict[str, Any]]:
    """One row for each kernel and target."""
    objects = sorted(folder.glob("*.cu.o"))
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        code = list(pool.map(lambda file: instructions(tool, file), objects))
        blocks = list(pool.map(lambda file: largest_blocks(tool, file), objects))
    rows = []
    for file, of_code, of_block in zip(objects, code, blocks, strict=True):
        said = resources(file.with_name(file.name + ".ptxas").read_text(encoding="utf-8"))
        names = demangled(sorted({name for name, _ in said}))
        for (name, target), numbers in said.items():
            counts = of_code.get((name, target)) or of_code.get((name, target.rstrip("af")))
            if counts is None:
                sys.exit(f"check_cuda_build: {file.name} has no machine code of {names[name]} for {target}")
            row = {"source": file.name.removesuffix(".o"), "kernel": names[name], "target": target, **numbers}
            row["threads"] = of_block.get(name, 1024)
            keys = ("instructions", "local_accesses", "accesses", "accesses_of_16_bytes", "HMMA", "HGMMA", "LDGSTS")
            row |= {key: counts.get(key, 0) for key in (*keys, "LDSM", "UBLKCP", "UTMALDG")}
            rows.append(row | {"occupancy": round(occupancy(row), 2)})
    return rows


def page_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line for each kernel, those for float16 and single elements left to the record."""
    kernels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "fp16" not in row["kernel"] and not re.search(r"<\w+, 1\b", row["kernel"]):
            kernels.setdefault(row["kernel"], []).append(row)
    text = (
        "| kernel | registers | threads | shared, bytes | occupancy | 16-byte accesses |\n|---|---|---|---|---|---|\n"
    )
    for name, found in kernels.items():
        registers, share = (", ".join(str(row[key]) for row in found) for key in ("registers", "occupancy"))
        first = found[0]
        wide = f"{first['accesses_of_16_bytes']} of {first['accesses']}"
        text += f"| `{name}` | {registers} | {first['threads']} | {first['shared_bytes']} | {share} | {wide} |\n"
    return text


def check(folder: Path, tool: str, options: argparse.Namespace) -> int:
    """Reads a build, prints and writes what it is; returns the exit status."""
    rows = rows_of(folder, tool)
    broken = [f"{row['kernel']} {row['target']} {fault}" for row in rows for fault in faults(row)]
    targets = sorted({row["target"] for row in rows}, key=lambda name: int(re.sub(r"\D", "", name)))
    print(f"{'kernel':64} {'threads':>7} registers on {', '.join(targets)}")
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        found = [row for row in rows if row["kernel"] == kernel]
        print(f"{kernel[:64]:64} {found[0]['threads']:>7} {', '.join(str(row['registers']) for row in found)}")
    print("\n".join(broken))
    if options.json:
        report = {"bench": "cuda_build", "note": "compiled ahead of time, not run", "targets": targets, "rows": rows}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.page:
        page = Path(options.page)
        table = f"<!-- cuda build -->\n{page_table(rows)}<!-- /cuda build -->"
        text = page.read_text(encoding="utf-8")
        page.write_text(re.sub(r"<!-- cuda build -->.*<!-- /cuda build -->", table, text, flags=re.S), encoding="utf-8")
    print(f"{len(rows)} kernels of _cuda, {len(broken)} faults. Compiled only: no kernel was run, nothing was timed.")
    return 1 if broken or not rows else 0


def imports_alone(folder: Path) -> str:
    """ "" if the built module can be imported by itself, on a machine without a driver too; else why not."""
    code = "import _cuda; print(_cuda.targets())"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr


def main(arguments: list[str] | None = None) -> int:
    """Builds and checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--page", metavar="FILE", help="also put a table into this page, between its markers")
    parser.add_argument("--objects", metavar="DIR", type=Path, help="check the objects there and build nothing")
    options = parser.parse_args(arguments)
    began = time.time()
    tool = disassembler()
    if tool is None:
        print("_cuda was not checked: there is no cuobjdump; pip install triton or nvidia-cuda-cuobjdump")
        return 0
    folder = options.objects or built()
    if folder is None:
        print(NO_NVCC)
        return 0
    print(f"_cuda built in {time.time() - began:.0f} s")
    why_not = "" if options.objects else imports_alone(ROOT / "build/cuda/herdkern")
    if why_not:
        print(f"check_cuda_build: _cuda must be importable by itself, got\n{why_not}")
    return max(check(folder, tool, options), 1 if why_not else 0)


if __name__ == "__main__":
    sys.exit(main())
