"""The floors of the house: who may import whom, and where torch may not enter. Lazy imports count too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "herdkern"

READERS = {
    "data.document",
    "data.decompress",
    "data.stored_zstd",
}  # import of the house only each other and the engine; the tokenizer reads by them
BELOW = {  # floor -> what it may import of herdkern (itself always)
    "command": set(),
    "engine": {"_text"},
    "tokenizer": {"engine", "_text", "command", *READERS},
    "data": {"tokenizer", "engine", "_text"},
    "dedup": {"data", "tokenizer", "engine", "report", "command", "_text"},
    "documents": set(),
    "memory": set(),
    "ops": {"documents", "_ops", "_cuda"},
    "flash_attn": {"ops", "documents"},
    "integrations": {"ops", "documents"},
    "leak_check": {"documents"},
    "model": {"ops", "documents"},
    "optim": {"ops"},
    "parallel": {"model", "ops", "documents", "_ops", "engine", "command"},
    "train": {"memory", "parallel", "model", "ops", "optim", "data", "tokenizer", "engine", "command"},
    "report": {"data", "engine"},
    "recipes": {"train", "parallel", "model", "ops", "dedup", "data", "tokenizer", "engine", "report", "env"},
    "env": {"ops", "_ops", "_text", "tokenizer", "dedup"},
    "cli": {
        "recipes",
        "report",
        "train",
        "parallel",
        "model",
        "dedup",
        "data",
        "tokenizer",
        "engine",
        "env",
        "command",
    },
    "__main__": {"cli"},
    "nn": {"ops"},
    "__init__": {"leak_check", "integrations", "nn"},
}
WITHOUT_TORCH = {"memory", "engine", "tokenizer", "data", "dedup", "report"}
FILES = sorted(PACKAGE.rglob("*.py"))


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "herdkern" else {module}
    return names


def floor_of_module(name: str) -> str:
    names = name.split(".")[1:]
    return ".".join(names[:2]) if ".".join(names[:2]) in READERS else names[0]


def test_readers_import_only_each_other_and_the_engine():
    for reader in READERS:
        names = {name for name in imported(PACKAGE / f"{reader.replace('.', '/')}.py") if name.startswith("herdkern")}
        assert {name.removeprefix("herdkern.") for name in names} <= {*READERS, "engine"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    floor = floor_of(path)
    assert floor in BELOW, f"herdkern/{floor} has no floor: add it to BELOW"
    targets = {floor_of_module(name) for name in imported(path) if name.startswith("herdkern.")}
    allowed = BELOW[floor] | {floor, "__version__"}
    wrong = {target for target in targets if target not in allowed and target.split(".")[0] not in allowed}
    assert not wrong, f"{path.relative_to(ROOT)} ({floor}) must not import herdkern.{', herdkern.'.join(sorted(wrong))}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if floor_of(p) in WITHOUT_TORCH], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_text_wing_has_no_torch(path):
    assert not {name for name in imported(path) if name.split(".")[0] == "torch"}


def test_native_code_has_no_torch():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    assert not [p for p in sources if "torch/" in p.read_text(encoding="utf-8") and "#include <torch" in p.read_text()]
