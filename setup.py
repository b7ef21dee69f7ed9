"""Builds the native extensions with ninja: one compiler job per source and per x86-64 level.

_ops   csrc/cpu   kernels behind herdkern.ops; no torch, one build serves every torch version
_text  csrc/text  tokenizer, MinHash and clustering
_cuda  csrc/cuda  kernels for NVIDIA GPUs, where HERDKERN_CUDA asks for them: 1 (must be), auto (where nvcc is), 0 (the
                  default). HERDKERN_CUDA_ARCHS names the targets. What ptxas says of registers and spills is kept
                  beside the objects. Neither a GPU nor a driver is needed, to build or to import.

Every kernel source of _ops is compiled once for each level of LEVELS with HK_ISA set to the level's name;
csrc/cpu/isa.cpp picks a level when the module is loaded. MAX_JOBS sets the number of compiler jobs.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# -ffp-contract=off: a product is rounded before it is added unless a kernel asks for fma, so that levels agree where
# the source does.
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-g0"]
BASELINE = ("baseline", [])
LEVELS = [
    BASELINE,
    ("avx2", ["-march=x86-64-v3"]),
    ("avx512", ["-march=x86-64-v4", "-mprefer-vector-width=512"]),
    ("amx", ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]),
]
# A100, H100 and H200, B200, RTX 50 and, by its portable code, what comes later. "a": with the instructions of that
# generation alone.
CUDA_ARCHS = "80;90a;100a;120"
CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-g0",
    "-Xptxas=-v",
    "--compress-mode=size",
]


def is_levelled(source):
    """Is this source of csrc/cpu a kernel? What binds or probes (module, isa, bind_*) is built once."""
    return source.name not in ("module.cpp", "isa.cpp") and not source.name.startswith("bind_")


def cpu_units():
    """(source, flags, object name) of _ops. Baseline objects come first on purpose: when two objects carry the same
    inline library function the linker keeps the first, so code built for a newer level never enters the baseline path.
    """
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    levels = LEVELS if IS_X86 else [BASELINE]
    once = [(s, ["-DHK_ISA=baseline"], s.stem) for s in sources if not is_levelled(s)]
    kernels = [
        (s, [*flags, f"-DHK_ISA={level}", f"-DHK_ISA_{level.upper()}=1"], f"{s.stem}.{level}")
        for level, flags in levels
        for s in sources
        if is_levelled(s)
    ]
    return [(s, [*flags, "-fopenmp", *(["-DHK_X86=1"] if IS_X86 else [])], name) for s, flags, name in once + kernels]


def text_units():
    """(source, flags, object name) of _text: a source named *_avx2.cpp, *_avx512.cpp or *_vbmi2.cpp is built for that
    level."""
    levels = dict(LEVELS) | {"vbmi2": [*dict(LEVELS)["avx512"], "-mavx512vbmi2"]}
    levelled = {"avx2", "avx512", "vbmi2"}
    units = []
    for source in sorted((ROOT / "csrc/text").glob("*.cpp"), key=lambda s: (s.stem.split("_")[-1] in levelled, s.name)):
        suffix = source.stem.rpartition("_")[2]
        level = levels[suffix] if suffix in levelled else []
        if suffix in levelled and not IS_X86:
            continue
        units.append((source, [*level, "-pthread", *(["-DHK_X86=1"] if IS_X86 else [])], source.stem))
    return units


def cuda_archs():
    """Targets of _cuda, as compute capabilities without a dot."""
    return [arch for arch in os.environ.get("HERDKERN_CUDA_ARCHS", CUDA_ARCHS).replace(",", ";").split(";") if arch]


def find_nvcc():
    """The CUDA compiler: NVCC, that of CUDA_HOME, the one on PATH, the usual place; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    named = [os.environ.get("NVCC"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in named if name and (found := shutil.which(name))), None)


def cuda_root(nvcc):
    """The folder that holds nvcc's bin, include and lib64: nvcc's own word, since the one on PATH may be a script."""
    said = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    return Path(next(line.partition("=")[2] for line in said.splitlines() if line.startswith("#$ TOP=")).strip())


def wants_cuda():
    """Is _cuda built? Ends the build where it must be and there is no compiler."""
    asked = os.environ.get("HERDKERN_CUDA") or "0"
    if asked not in ("0", "1", "auto"):
        sys.exit(f"setup.py: HERDKERN_CUDA must be 0, 1 or auto, got {asked!r}")
    if asked == "1" and find_nvcc() is None:
        sys.exit(
            "setup.py: HERDKERN_CUDA=1 needs nvcc, found none; install CUDA 12.8 or later or set NVCC or CUDA_HOME"
        )
    return asked != "0" and find_nvcc() is not None


def cuda_units():
    """(source, flags, object name) of _cuda: sources of kernels for every target, bindings without CUDA's headers."""
    archs = cuda_archs()
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    last = archs[-1].rstrip("af")  # whatever comes after it compiles this form when it loads
    targets.append(f"-gencode=arch=compute_{last},code=compute_{last}")
    units = [(s, targets, f"{s.stem}.cu") for s in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    named = f'-DHK_CUDA_TARGETS="{";".join(archs)}+PTX"'
    return units + [(s, [named], s.stem) for s in sorted((ROOT / "csrc/cuda").glob("*.cpp"))]


def cuda_link_flags():
    libraries = next((p for p in (cuda_root(find_nvcc()) / "lib64", cuda_root(find_nvcc()) / "lib") if p.is_dir()), ".")
    return [f"-L{libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]


EXTENSIONS = {"_ops": (cpu_units, lambda: ["-fopenmp"]), "_text": (text_units, lambda: ["-pthread"])}
if wants_cuda():
    EXTENSIONS["_cuda"] = (cuda_units, cuda_link_flags)


def ninja_executable():
    """The ninja of the build environment's package, or the one on PATH."""
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except (ImportError, AttributeError):
        return "ninja"


class NinjaBuild(build_ext):
    """build_ext that hands each extension to ninja; `--only NAME` builds one of them."""

    user_options = [*build_ext.user_options, ("only=", None, "build this extension alone, for example _text")]  # noqa: RUF012

    def initialize_options(self):
        super().initialize_options()
        self.only = None

    def finalize_options(self):
        super().finalize_options()
        if self.only:
            self.extensions = [ext for ext in self.extensions if ext.name.endswith("." + self.only)]

    def build_extension(self, ext):
        name = ext.name.rpartition(".")[2]
        units, link_flags = EXTENSIONS[name]
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = (ROOT / self.build_temp / name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        includes = [pybind11.get_include(), *self.include_dirs, str(ROOT / "csrc")]
        flags = [*COMMON_FLAGS, *(f"-isystem{i}" if "csrc" not in i else f"-I{i}" for i in includes)]
        lines = [
            "rule cc",
            f"  command = {shlex.join(compiler)} -MD -MF $out.d {shlex.join(flags)} $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {shlex.join(compiler)} -shared -s -o $out $in {shlex.join(link_flags())}",
            *(nvcc_rule() if name == "_cuda" else []),
        ]
        objects = []
        for source, unit_flags, object_name in units():
            objects.append(f"{object_name}.o")
            rule = "nvcc" if source.suffix == ".cu" else "cc"
            lines += [f"build {object_name}.o: {rule} {ninja_path(source)}", f"  flags = {shlex.join(unit_flags)}"]
        lines += [f"build {ninja_path(target)}: link {' '.join(objects)}", f"default {ninja_path(target)}", ""]
        (folder / "build.ninja").write_text("\n".join(lines))
        command = [ninja_executable(), "-C", str(folder), "-j", os.environ.get("MAX_JOBS") or str(fitting_jobs())]
        if subprocess.run(command, stdout=None if self.verbose else subprocess.DEVNULL).returncode != 0:
            sys.exit(f"setup.py: building herdkern.{name} failed; the compiler's message is above")


def fitting_jobs():
    """Compilers at a time: one for each core, and 2 GiB of free memory for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return cores
    return max(1, min(cores, free // (2 << 20)))


def nvcc_rule():
    """Ninja's rule for kernels; what ptxas says stays in OBJECT.ptxas."""
    command = [find_nvcc(), "-MD", "-MF", "$out.d", *CUDA_FLAGS, f"-I{ROOT / 'csrc'}"]
    line = " ".join(part if part.startswith("$") else shlex.quote(part) for part in command)
    return [
        "rule nvcc",
        f"  command = {line} $flags -c $in -o $out 2> $out.ptxas || {{ cat $out.ptxas >&2; exit 1; }}",
        "  depfile = $out.d",
        "  deps = gcc",
    ]


def ninja_path(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def sources_of(name):
    """Only for the sdist's manifest; ninja gets the full list with flags."""
    return sorted({str(s.relative_to(ROOT)) for s, _, _ in EXTENSIONS[name][0]()})


setup(
    ext_modules=[Extension(f"herdkern.{name}", sources_of(name)) for name in EXTENSIONS],
    cmdclass={"build_ext": NinjaBuild},
)
