"""Text for the benchmarks: library source and package descriptions that the running Python carries."""

import sysconfig
from itertools import chain, zip_longest
from pathlib import Path


def installed_texts(num_bytes: int) -> list[str]:
    """Documents of num_bytes in all (the last one is cut): package descriptions and standard-library source by turns,
    then package source. The same installation gives the same documents.

    Raises: RuntimeError if the installation holds less text.
    """
    standard, installed = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    prose = sorted(
        p for p in installed.glob("*.dist-info/**/*") if p.suffix in (".md", ".rst", ".txt", "") and p.is_file()
    )
    code = sorted([*standard.glob("*.py"), *standard.glob("[a-hj-r]*/*.py")])
    turns = [path for pair in zip_longest(prose, code) for path in pair if path]
    texts = []
    left = num_bytes
    for path in chain(turns, (path for top in sorted(installed.iterdir()) for path in sorted(top.rglob("*.py")))):
        data = path.read_bytes()
        if b"\0" in data:
            continue
        text = data.decode("utf-8", "ignore")[:left]
        texts.append(text)
        left -= len(text)
        if left == 0:
            return texts
    raise RuntimeError(f"installed_texts: this Python must carry {num_bytes} characters of text, lacks {left}")
