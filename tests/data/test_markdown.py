import pytest

from herdkern.data.markdown import strip_markdown


@pytest.mark.parametrize(
    ("markdown", "plain"),
    [
        ("# Title #\n\ntext", "Title\n\ntext"),
        ("Title\n=====\ntext\n---\nmore", "Title\ntext\nmore"),
        ("a **bold** and *thin* and __strong__ and _em_ word", "a bold and thin and strong and em word"),
        ("***both*** ~~gone~~", "both gone"),
        ("2*3*4 and a * b * c, snake_case_name, __init__.py", "2*3*4 and a * b * c, snake_case_name, __init__.py"),
        ("see [the docs](https://a.b/c_(d)) and [ref][1]\n\n[1]: https://x.y 'T'", "see the docs and ref"),
        ("[![badge](https://a/b.svg)](https://c) ![alt text](x.png)", "badge alt text"),
        ("- one\n- [x] two\n  - three\n1. four", "one\ntwo\n  three\nfour"),
        ("> quoted\n> > twice", "quoted\ntwice"),
        ("use `**x**` and ``a`b``", "use **x** and a`b"),
        ("$a_i * b_i$ and $$x_{1}^*$$", "$a_i * b_i$ and $$x_{1}^*$$"),
        ("| a | b |\n|---|:-:|\n| 1 | **2** |", "a\tb\n1\t2"),
        ("<p align='center'>\n  <img\n   src='x'>\n</p>\n\ntext<br/> &amp; more", "text & more"),
        ("a <!-- hidden\nmore --> b", "a  b"),
        ("<https://x.y/> and <me@x.y>", "https://x.y/ and me@x.y"),
        (r"\*not\* \_this\_", "*not* _this_"),
        ("---\n\n***\n\ntext", "text"),
        ("", ""),
    ],
)
def test_markers_go_and_words_stay(markdown, plain):
    assert strip_markdown(markdown) == plain


def test_code_keeps_every_character():
    code = "def f(*args, **kw):\n    # comment\n    return `x`\n\n\n    - 1"
    assert strip_markdown(f"before\n\n```python\n{code}\n```\nafter") == f"before\n\n{code}\nafter"
    assert strip_markdown("text:\n\n    # not a heading\n    * not a bullet\n\nend") == (
        "text:\n\n    # not a heading\n    * not a bullet\n\nend"
    )
    assert strip_markdown("~~~\n# a\n```\n~~~") == "# a\n```"


def test_unclosed_fence_and_many_markers_end():
    assert strip_markdown("```\n# x") == "# x"
    for text in ("*" * 5000, "[" * 5000, "_a" * 3000, "`" * 5000, "<a" * 3000, "![" * 2000, "**a" * 2000):
        strip_markdown(text)
