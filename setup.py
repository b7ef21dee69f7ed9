"""Builds the native extensions with ninja: one compiler job per source and per x86-64 level.

_ops   csrc/cpu   kernels behind herdkern.ops; no torch, one build serves every torch version
_text  csrc/text  tokenizer, MinHash and clustering

Every kernel source of _ops is compiled once for each level of LEVELS with HK_ISA set to the level's name;
csrc/cpu/isa.cpp picks a level when the module is loaded. MAX_JOBS limits the compiler jobs.
"""

import os
import platform
import shlex
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


EXTENSIONS = {"_ops": (cpu_units, ["-fopenmp"]), "_text": (text_units, ["-pthread"])}


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
            f"  command = {shlex.join(compiler)} -shared -s -o $out $in {shlex.join(link_flags)}",
        ]
        objects = []
        for source, unit_flags, object_name in units():
            objects.append(f"{object_name}.o")
            lines += [f"build {object_name}.o: cc {ninja_path(source)}", f"  flags = {shlex.join(unit_flags)}"]
        lines += [f"build {ninja_path(target)}: link {' '.join(objects)}", f"default {ninja_path(target)}", ""]
        (folder / "build.ninja").write_text("\n".join(lines))
        jobs = os.environ.get("MAX_JOBS")
        command = [ninja_executable(), "-C", str(folder), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command, stdout=None if self.verbose else subprocess.DEVNULL).returncode != 0:
            sys.exit(f"setup.py: building herdkern.{name} failed; the compiler's message is above")


def ninja_path(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def sources_of(name):
    """Only for the sdist's manifest; ninja gets the full list with flags."""
    return sorted({str(s.relative_to(ROOT)) for s, _, _ in EXTENSIONS[name][0]()})


setup(
    ext_modules=[Extension(f"herdkern.{name}", sources_of(name)) for name in EXTENSIONS],
    cmdclass={"build_ext": NinjaBuild},
)
