"""Main text of HTML pages: herdkern, trafilatura, resiliparse.

The pages are library documentation as pydoc renders it. The tools differ in what they take for content; before any time
is taken herdkern must have found a word of each page's docstring, and each peer any text. One call extracts all pages
on one core.
"""

import pydoc
import sys
from collections.abc import Callable
from functools import cache

from harness import Bench, Case, pytest_cases

from herdkern.data.extract import extract

SMALL = ("textwrap", "getpass", "shlex", "heapq", "bisect", "json", "csv", "glob")
LARGE = ("argparse", "subprocess", "email.message", "unittest.mock", "logging")
WORDS = {
    "small": ("wrap", "password", "split", "heap", "sorted", "JavaScript", "dialect", "pathname"),
    "large": ("parser", "Popen", "payload", "Mock", "handler"),
}


@cache
def pages(names: tuple[str, ...]) -> list[str]:
    html = pydoc.HTMLDoc()
    return [html.page(name, html.document(pydoc.locate(name), name)) for name in names]


def extractors() -> dict[str, Callable[[str], str]]:
    fns: dict[str, Callable[[str], str]] = {"herdkern": lambda page: extract(page).text}
    try:
        import trafilatura

        fns["trafilatura"] = lambda page: trafilatura.extract(page, include_comments=False) or ""
    except ImportError as e:
        print(f"without trafilatura: {e}", file=sys.stderr)
    try:
        from resiliparse.extract.html2text import extract_plain_text

        fns["resiliparse"] = lambda page: extract_plain_text(page, main_content=True)
    except ImportError as e:
        print(f"without resiliparse: {e}", file=sys.stderr)
    return fns


def case(name: str, names: tuple[str, ...]) -> Case:
    def setup() -> dict[str, Callable[[], list[str]]]:
        html = pages(names)

        def all_of(fn: Callable[[str], str]) -> Callable[[], list[str]]:
            return lambda: [fn(page) for page in html]

        return {peer: all_of(fn) for peer, fn in extractors().items()}

    def check(fns: dict[str, Callable[[], list[str]]]) -> None:
        for word, text in zip(WORDS[name], fns["herdkern"](), strict=True):
            assert word in text, word
        for peer, fn in fns.items():
            assert any(fn()), peer

    return Case(name=name, setup=setup, check=check, bytes=sum(map(len, pages(names))))


BENCH = Bench("extract", [case("small", SMALL), case("large", LARGE)])
test_extract = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
