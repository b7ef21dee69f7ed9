"""Builds the native code with a sanitizer and runs tests on it: `python tools/sanitize.py KIND [pytest arguments]`.

address  AddressSanitizer and UndefinedBehaviorSanitizer: memory errors, overflow, wrong shifts, bad alignment
thread   ThreadSanitizer, with the kernels' threads from std::thread (OpenMP's own waiting is invisible to it)

The build lies in build/sanitize-KIND and leaves the one in place alone. Any report fails the run. Needs g++ with its
sanitizer libraries and Linux.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer",
    "thread": "-fsanitize=thread -DHK_STD_THREADS",
}
LIBRARIES = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}
# Python and torch keep memory until the end, so leaks are not looked for. OPENBLAS and torch stay at one thread where
# their own pools would be reported.
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=77", "UBSAN_OPTIONS": "print_stacktrace=1"},
    "thread": {"TSAN_OPTIONS": "exitcode=77:report_signal_unsafe=0:ignore_noninstrumented_modules=1"},
}


def library(name: str) -> str:
    """The full path of a library that comes with the compiler."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    path = found.strip()
    if not os.path.isabs(path):
        sys.exit(f"sanitize: {name} must be installed with g++, got none; install the compiler's sanitizer libraries")
    return path


def build(kind: str) -> Path:
    """Builds the package with its extensions into build/sanitize-KIND and returns that folder."""
    folder = ROOT / "build" / f"sanitize-{kind}"
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-temp",
        f"{folder}-objects",
        "--build-lib",
        str(folder),
    ]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"CXX": f"g++ {FLAGS[kind]}"})
    return folder


def main() -> int:
    """Runs the command line and returns its exit status."""
    if len(sys.argv) < 2 or sys.argv[1] not in FLAGS:
        print(__doc__)
        return 2
    kind, arguments = sys.argv[1], sys.argv[2:] or ["tests/ops"]
    folder = build(kind)
    environment = (
        os.environ
        | OPTIONS[kind]
        | {
            "LD_PRELOAD": " ".join(map(library, LIBRARIES[kind])),
            "PYTHONPATH": str(folder),
            "OMP_NUM_THREADS": "2",
        }
    )
    tests = [str(ROOT / a) if (ROOT / a.partition("::")[0]).exists() else a for a in arguments]
    pytest = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(ROOT),
    ]
    # setarch -R: the sanitizers' shadow memory must not collide with addresses the kernel draws at random
    command = ["setarch", "-R", sys.executable, *pytest, *tests]
    return subprocess.run(command, cwd=folder, env=environment).returncode  # not ROOT: its package would come first


if __name__ == "__main__":
    sys.exit(main())
