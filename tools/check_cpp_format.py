"""Fails if clang-format would change a file of csrc."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(str(path) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu"))
sys.exit(subprocess.run([Path(sys.executable).parent / "clang-format", "--dry-run", "-Werror", *SOURCES]).returncode)
