"""File calls that fail on purpose: builds tests/engine/faults.c and steers it through a mapped file."""

import contextlib
import ctypes
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

COUNT, FAIL, SHORT, KILL = 0, 1, 2, 3
WRITE, SYNC, RENAME, OPEN, READ, MKDIR = 1, 2, 4, 8, 16, 32
CONTROL = "HERDKERN_FAULTS"


class _Control(ctypes.Structure):
    _fields_ = (
        ("folder", ctypes.c_char * 1024),
        ("place", ctypes.c_char * 1024),
        ("action", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("calls", ctypes.c_int32),
        ("sticky", ctypes.c_int32),
        ("nth", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("hits", ctypes.c_int64),
    )


def why_not() -> str:
    """Why faults cannot be injected here, or ""."""
    if os.uname().sysname != "Linux":
        return "LD_PRELOAD and /proc are needed (Linux)"
    return "" if shutil.which("cc") else "no C compiler (cc) is installed"


@contextlib.contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """A folder in memory where there is one (a sync is free there, and still counted), else `folder` itself."""
    if not os.access("/dev/shm", os.W_OK):
        yield folder
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def build(folder: Path) -> dict[str, str]:
    """Compile the library and make the file that steers it; returns the environment of a process that obeys."""
    library, control = folder / "faults.so", folder / "faults.control"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    control.write_bytes(bytes(ctypes.sizeof(_Control)))
    here = os.pathsep.join(filter(None, [str(source.parent), os.environ.get("PYTHONPATH")]))
    return {"LD_PRELOAD": str(library), CONTROL: str(control), "PYTHONPATH": here}


class Faults:
    """The steering of the library, in the process that it is loaded in or in another one."""

    def __init__(self, control: str):
        with open(control, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._control = _Control.from_buffer(self._map)

    def arm(self, folder: Path, calls: int, *, action: int = COUNT, error: int = 0, nth: int = 0, sticky=False):
        """From now on count `calls` below `folder`, and let the nth (sticky: and all after it) fail."""
        control = self._control
        control.nth = 0
        control.folder, control.place = str(folder).encode(), b""
        control.action, control.error, control.calls, control.sticky = action, error, calls, int(sticky)
        control.count = control.hits = 0
        control.nth = nth

    def disarm(self) -> None:
        """Let every call through again, and count no more."""
        self._control.calls = 0

    @property
    def count(self) -> int:
        """Calls since `arm`."""
        return self._control.count

    @property
    def hits(self) -> int:
        """Calls that were made to fail since `arm`."""
        return self._control.hits

    @property
    def place(self) -> str:
        """The path of the first call that was made to fail."""
        return self._control.place.decode()
