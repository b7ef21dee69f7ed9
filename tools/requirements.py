"""Prints the requirements of pyproject.toml, one a line: the package's, then those of each extra named."""

import re
import sys
from pathlib import Path


def requirements(text: str, extras: list[str]) -> list[str]:
    """Requirement strings of `text` (a pyproject.toml whose lists hold one string a line), without spaces."""
    found = []
    for name in ["dependencies", *extras]:
        match = re.search(rf"^{name} = \[(.*?)\]\s*$", text, re.M | re.S)
        if match is None:
            sys.exit(f"requirements.py: {name} must be a list in pyproject.toml")
        found += re.findall(r'"([^"]+)"', re.sub(r"#.*", "", match.group(1)))
    return [requirement.replace(" ", "") for requirement in found]


if __name__ == "__main__":
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    print("\n".join(requirements(pyproject.read_text(encoding="utf-8"), sys.argv[1:])))
