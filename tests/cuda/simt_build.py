"""Builds what runs csrc/cuda on a CPU (tests/cuda/simt), into build/simt, with ninja: only what has changed.

libsimt.so        the emulator
libkernels.so     every csrc/cuda/*.cu; apart from the rest, since all its thread-local storage is poisoned
_cuda_simt*.so    module.cpp and bind_*.cpp, as herdkern._cuda has them
libcontrols.so    the negative controls
libtiles.so       the tile list checked score by score
"""

import ctypes
import fcntl
import importlib.machinery
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
SIMT, CUDA = Path(__file__).resolve().parent / "simt", ROOT / "csrc/cuda"
BUILD = ROOT / "build/simt"
# -ffp-contract=off: as csrc/cpu is built; products that are to be joined to sums are written as fma.
FLAGS = ["-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-march=native", "-ffp-contract=off", "-DHK_SIMT"]
# Every access to memory of a kernel calls simt/shadow.cpp; the compiler's own run-time library is not linked.
WATCHED = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-Wno-unknown-pragmas", "-x", "c++"]
MODULE = f"_cuda_simt{sysconfig.get_config_var('EXT_SUFFIX')}"
HEADERS = "bindings.h"
ORDERS = {"ascending": 0, "descending": 1, "random": 2}


def ninja_file() -> str:
    """Rules and edges of build/simt/build.ninja."""
    import pybind11

    compiler = shlex.join(shlex.split(os.environ.get("CXX", "g++")))
    includes = [f"-I{ROOT / 'csrc'}", f"-I{SIMT}"]
    python = ["-O0", f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    named = ["-DHK_MODULE=_cuda_simt", *python, "-include", HEADERS]
    lines = [
        "rule cc",
        f"  command = {compiler} -MD -MF $out.d {shlex.join(FLAGS + includes)} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        # Bindings are mostly pybind11's headers: compiled once, and nothing in them is worth optimising.
        f"build {HEADERS}.gch: cc {HEADERS}",
        f"  flags = {shlex.join([*python, '-x', 'c++-header'])}",
        "rule link",
        f"  command = {compiler} -shared -o $out $in -L. '-Wl,-rpath,$$ORIGIN' $libraries -pthread",
    ]
    libraries: dict[str, tuple[list[Path], list[str], list[str]]] = {
        "libsimt.so": (sorted(SIMT.glob("*.cpp")), ["-fvisibility=default"], []),
        "libkernels.so": (sorted(CUDA.glob("*.cu")), ["-fvisibility=default", *WATCHED], ["libsimt.so"]),
        MODULE: (sorted(CUDA.glob("*.cpp")), named, ["libkernels.so", "libsimt.so"]),
        "libtiles.so": ([SIMT.parent / "tile_list_checks.cpp"], ["-fvisibility=default"], []),
        "libcontrols.so": ([SIMT / "controls.cu", SIMT / "controls_hopper.cu"], WATCHED, ["libsimt.so"]),
    }
    for library, (sources, flags, needed) in libraries.items():
        objects = [f"{source.name}.o" for source in sources]
        for source, name in zip(sources, objects, strict=True):
            first = f" | {HEADERS}.gch" if library == MODULE else ""
            lines += [f"build {name}: cc {source}{first}", f"  flags = {shlex.join(flags)}"]
        lines += [f"build {library}: link {' '.join(objects)} | {' '.join(needed)}"]
        lines += [f"  libraries = {' '.join(f'-l:{name}' for name in needed)}"]
    return "\n".join([*lines, ""])


def build(*targets: str) -> Path:
    """Build `targets`, names of libraries, and return their folder.

    Raises: RuntimeError with the compiler's words if one does not compile.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # workers of one test run share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        text, path = ninja_file(), BUILD / "build.ninja"
        headers = BUILD / HEADERS
        if not headers.exists():
            headers.write_text("#include <pybind11/pybind11.h>\n#include <pybind11/stl.h>\n\n#include <array>\n")
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        ninja = [sys.executable, "-m", "ninja", "-C", str(BUILD), "-j", os.environ.get("MAX_JOBS", "2"), *targets]
        done = subprocess.run(ninja, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the emulated build of csrc/cuda failed:\n{done.stdout}{done.stderr}")
    return BUILD


@cache
def controls() -> ctypes.CDLL:
    """The library of negative controls."""
    library = ctypes.CDLL(str(build("libcontrols.so") / "libcontrols.so"))
    library.run_control.restype = ctypes.c_char_p
    return library


@cache
def emulator() -> ctypes.CDLL:
    """The emulator's own library: simt_set, simt_declare, simt_forget_declared."""
    return ctypes.CDLL(str(build("libsimt.so") / "libsimt.so"))


@cache
def emulated_module() -> ModuleType:
    """The module that herdkern._cuda would be, on CPU pointers; pybind11 keeps one of a name, so it has its own."""
    path = str(build(MODULE) / MODULE)
    loader = importlib.machinery.ExtensionFileLoader("herdkern._cuda_simt", path)
    spec = importlib.util.spec_from_file_location("herdkern._cuda_simt", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def set_order(order: str, seed: int = 0, num_threads: int = 1) -> None:
    """Let lanes, warps and blocks run in this order from now on: ascending, descending or random."""
    emulator().simt_set(ORDERS[order], ctypes.c_uint64(seed), num_threads)
