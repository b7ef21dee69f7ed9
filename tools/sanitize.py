"""Builds the native code with a sanitizer and runs tests on it:
`python tools/sanitize.py KIND [--only _ops|_text] [pytest arguments]`.

address  AddressSanitizer and UndefinedBehaviorSanitizer: memory errors, overflow, wrong shifts, bad alignment
thread   ThreadSanitizer, with the kernels' threads from std::thread (OpenMP's own waiting is invisible to it)

--only builds one of the two extensions, for tests that need no more: `address --only _text tests/tokenizer`.

The build lies in build/sanitize-KIND and leaves the one in place alone. Any report fails the run. Before the tests, a
small program with a planted error must be reported, or silence would prove nothing. Needs g++, or a wrapper of it that
CXX names, with its sanitizer libraries, and Linux.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer",
    "thread": "-fsanitize=thread -DHK_STD_THREADS",
}
LIBRARIES = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}
# Python and torch keep memory until the end, so leaks are not looked for. OPENBLAS and torch stay at one thread where
# their own pools would be reported. Deadlocks are not looked for: Arrow's allocator takes more locks before a fork than
# ThreadSanitizer can follow.
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=77", "UBSAN_OPTIONS": "print_stacktrace=1"},
    "thread": {
        "TSAN_OPTIONS": "exitcode=77:report_signal_unsafe=0:ignore_noninstrumented_modules=1:detect_deadlocks=0"
    },
}
# What each kind must report: a write one past the end, and two threads of the kernels' own pool that add to one number.
CONTROLS = {
    "address": """
int main(int count, char**) {
  int* row = new int[4]();
  row[3 + count] = 1;
  return row[0];
}
""",
    "thread": """
#include "cpu/threads.h"
bool herdkern::cpu::in_forked_child() { return false; }
int main() {
  int sum = 0;
  std::atomic<int> waiting{2};
  herdkern::cpu::baseline::parallel_ranges(1000, 2, [&](int64_t begin, int64_t end) {
    for (--waiting; waiting > 0;) std::this_thread::yield();  // or one thread does both halves
    for (int64_t i = begin; i < end; ++i) ++sum;
  });
  return sum < 0;
}
""",
}


def library(name: str) -> str:
    """The full path of a library that comes with the compiler."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    path = found.strip()
    if not os.path.isabs(path):
        sys.exit(f"sanitize: {name} must be installed with g++, got none; install the compiler's sanitizer libraries")
    return path


def build(kind: str, only: str | None) -> Path:
    """Builds the package with its extensions, or one of them, into build/sanitize-KIND and returns that folder."""
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
        *(["build_ext", f"--only={only}"] if only else []),
    ]
    compiler = os.environ.get("CXX", "g++")
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"CXX": f"{compiler} {FLAGS[kind]}"})
    return folder


def check_control(kind: str) -> None:
    """Exits unless the sanitizer reports the planted error of `kind`."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "control")
        flags = [*FLAGS[kind].split(), "-std=c++17", "-O1", "-pthread", "-DHK_ISA=baseline", f"-I{ROOT / 'csrc'}"]
        command = ["g++", *flags, "-x", "c++", "-", "-o", str(program)]
        subprocess.run(command, input=CONTROLS[kind], text=True, check=True)
        ran = subprocess.run(["setarch", "-R", program], capture_output=True, text=True, env=os.environ | OPTIONS[kind])
    if not any(report in ran.stderr for report in ("runtime error", "AddressSanitizer", "data race")):
        sys.exit(f"sanitize: the planted error must be reported, got none; is g++ complete? {ran.stderr[:500]}")
    print(f"sanitize: the planted error of kind {kind} is reported")


def main() -> int:
    """Runs the command line and returns its exit status."""
    if len(sys.argv) < 2 or sys.argv[1] not in FLAGS:
        print(__doc__)
        return 2
    kind, arguments = sys.argv[1], sys.argv[2:]
    only = arguments[1] if arguments[:1] == ["--only"] and len(arguments) > 1 else None
    arguments = arguments[2 if only else 0 :] or ["tests/ops"]
    check_control(kind)
    folder = build(kind, only)
    environment = (
        os.environ
        | OPTIONS[kind]
        | {
            "LD_PRELOAD": " ".join(map(library, LIBRARIES[kind])),
            "PYTHONPATH": str(folder),
            "OMP_NUM_THREADS": "2",
        }
    )
    tests = [str(ROOT / a) if os.path.exists(ROOT / a.partition("::")[0]) else a for a in arguments]
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
