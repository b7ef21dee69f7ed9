"""The README is true: its map is the tree, every file it names exists, its Python runs, its commands parse."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from herdkern import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def map_paths() -> list[str]:
    """Paths of the README's map (the block after its marker): folders end in "/", indentation nests."""
    block = re.search(r"<!-- map -->\n+```\n(.*?)```", README, re.S)
    assert block, "README.md must hold the map in a code block after <!-- map -->"
    paths: list[str] = []
    open_folders: list[tuple[int, str]] = []
    for line in block.group(1).splitlines():
        names, _, _ = line.strip().partition("  ")
        if not names:
            continue
        indent = len(line) - len(line.lstrip())
        open_folders = [(depth, name) for depth, name in open_folders if depth < indent]
        prefix = open_folders[-1][1] if open_folders else ""
        for name in names.split():
            stem, brace, ends = name.partition("{")
            paths += [prefix + stem + end for end in ends.rstrip("}").split(",")] if brace else [prefix + name]
        if names.endswith("/"):
            open_folders.append((indent, prefix + names))
    return paths


def tracked_like() -> set[str]:
    """Every source file of the package and of csrc."""
    found = [*ROOT.glob("herdkern/**/*.py"), *ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cpp")]
    return {str(path.relative_to(ROOT)) for path in found}


def test_every_path_of_the_map_exists():
    assert [path for path in map_paths() if not list(ROOT.glob(path.rstrip("/")))] == []


def test_every_source_file_is_on_the_map():
    """A file is on the map by its own name, or by a pattern (`bench_*.py`) beside it."""
    named = {str(found.relative_to(ROOT)) for path in map_paths() for found in ROOT.glob(path.rstrip("/"))}
    missing = {path for path in tracked_like() if path not in named and not path.endswith("__init__.py")}
    assert sorted(missing) == []


def test_readme_is_short():
    """The map grows with the tree and is not counted."""
    assert len(README.splitlines()) - len(map_paths()) < 150


def python_blocks() -> list[tuple[str, str]]:
    blocks = []
    for page in PAGES:
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)):
            blocks.append((f"{page.name}-{number}", code))
    return blocks


@pytest.mark.parametrize(("name", "code"), python_blocks(), ids=[name for name, _ in python_blocks()])
def test_python_block_runs(name, code, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{name}:\n{done.stderr}"


def links() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            found.append((str(page.relative_to(ROOT)), target))
    return found


@pytest.mark.parametrize(("page", "target"), links())
def test_relative_link_leads_somewhere(page, target):
    assert (ROOT / page).parent.joinpath(target).exists()


def commands() -> list[str]:
    """`herdkern ...` lines of the shell blocks."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.S)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return sorted({line.partition("  #")[0].strip() for line in lines if line.startswith("herdkern ")})


@pytest.mark.parametrize("command", commands())
def test_command_exists(command):
    """The command and its recipe are known: asking for its help succeeds."""
    words = command.split()[1:]
    depth = 2 if words[0] in ("run", "tokenizer") and len(words) > 1 and not words[1].startswith("-") else 1
    try:
        status = cli.main([*words[:depth], "--help"])
    except SystemExit as end:
        status = end.code
    assert status == 0


def test_make_targets_that_the_pages_name_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    named = {name for page in PAGES for name in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text("utf-8"), re.M)}
    assert named <= targets
