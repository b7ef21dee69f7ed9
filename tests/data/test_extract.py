import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

from herdkern.data.decompress import read_lines
from herdkern.data.document import read_documents
from herdkern.data.extract import ExtractConfig, extract, extract_shard

SENTENCES = [f"Sentence number {i} of the story is about the river, the hill and the long way home." for i in range(12)]
NAV = '<nav><a href="/">Home</a> <a href="/a">About us</a> <a href="/b">Contact</a></nav>'
FOOT = '<div class="footer"><a href="/t">Terms</a> <p>Copyright 2020 Somebody. All rights reserved.</p></div>'
SIDE = (
    '<div class="sidebar"><ul>'
    + "".join(f'<li><a href="/{i}">Another story {i}</a></li>' for i in range(9))
    + "</ul></div>"
)


def page(body, head="<title>The title</title>"):
    story = "".join(f"<p>{sentence}</p>" for sentence in SENTENCES)
    return f"<html><head>{head}</head><body>{NAV}{SIDE}<div class='post'>{story}{body}</div>{FOOT}</body></html>"


def test_boilerplate_goes_and_paragraphs_stay():
    found = extract(page(""))
    assert found.text == "\n\n".join(SENTENCES)
    assert (found.title, found.reason) == ("The title", "")


@pytest.mark.parametrize(
    ("html", "text"),
    [
        (
            "<p>a <b>b</b>old <i>it</i>alic <a href='x'>link</a> and more words of a sentence, yes.</p>",
            "a bold italic link and",
        ),
        ("<h2>A heading</h2><p>Under the heading stands a sentence, as it should.</p>", "\n\nA heading\n\nUnder"),
        (
            "<ul><li>first item is a sentence.</li><li>second item is one, too.</li></ul>",
            "first item is a sentence.\nsecond",
        ),
        ("<p>line one of the verse,<br>line two of the verse.</p>", "line one of the verse,\nline two of the verse."),
        ("<p>caf&eacute; &lt;tag&gt; &amp;amp; a&nbsp;b, and so on it goes.</p>", "café <tag> &amp; a b, and so on"),
        ("<p>soft&shy;hyphen zero&#8203;width, they are not to be seen.</p>", "softhyphen zerowidth, they"),
        ("<p>ratio \\(a_1 \\le b\\) in the text, and so on it goes.</p>", "ratio $a_1 \\le b$ in the text"),
        ("<p>As follows: \\[ x = y \\] which was to be shown, or so.</p>", "As follows: \n$$x = y$$\n which"),
        ("<p>A <code>snake_case</code> and <kbd>Ctrl</kbd> stay in the text, yes.</p>", "A snake_case and Ctrl stay"),
        (
            "<p>See <img alt='a red fox in the snow' src='f.png'> in the picture, please.</p>",
            "See a red fox in the snow in",
        ),
        ("<p>See <img alt='IMG_2031.jpg' src='f.png'> in the picture, please.</p>", "See in the picture"),
        (
            "<p>One<span hidden>SECRET</span> two<span style='display: none'>SECRET</span>, three, four, five.</p>",
            "One two, three",
        ),
    ],
)
def test_inline_and_block_text(html, text):
    assert re.sub(r" *\n *", "\n", text) in re.sub(r" *\n *", "\n", extract(page(html)).text)


def test_data_table_becomes_tabbed_rows_and_layout_table_does_not():
    rows = "".join(f"<tr><td>river {i}</td><td>{i * 7} km</td><td></td><td>long and wide.</td></tr>" for i in range(4))
    text = extract(page(f"<table><tr><th>Name</th><th>Length</th><th>x</th><th>Note</th></tr>{rows}</table>")).text
    assert "Name\tLength\tx\tNote\nriver 0\t0 km\t\tlong and wide.\nriver 1\t7 km" in text
    layout = "<table><tr><td></td><td><p>" + "</p><p>".join(SENTENCES) + "</p></td></tr></table>"
    assert extract(f"<body>{layout}</body>").text == "\n\n".join(SENTENCES)


CODE = 'def f(a, b):\n\tif a &lt; b:\n\n\n        return  "x &amp; y"   # two  spaces\n\n    # <b>last</b>'
PLAIN = 'def f(a, b):\n\tif a < b:\n\n\n        return  "x & y"   # two  spaces\n\n    # last'


@pytest.mark.parametrize(
    "html",
    [
        "<pre>{}</pre>",
        "<pre>\n{}</pre>",
        "<div class='highlight'><pre><span></span><code class='python'>{}</code></pre></div>",
        "<table class='highlighttable'><tr><td class='linenos'><pre>1\n2</pre></td><td><pre>{}</pre></td></tr></table>",
        "<pre><span class='lineno'>1</span>{}</pre>",
        "<figure class='code-block sidebar'><pre>{}</pre></figure>",
    ],
)
def test_code_is_kept_to_the_byte(html):
    found = extract(page(html.format(CODE)))
    assert f"\n\n{PLAIN}" in found.text
    assert "linenos" not in found.text
    assert 0 < found.code_share < 0.5


@pytest.mark.parametrize(
    ("html", "tex"),
    [
        ('<math><mi>x</mi><annotation encoding="application/x-tex">x^2</annotation></math>', "$x^2$"),
        ('<math display="block" alttext="\\frac{1}{2}"><mn>1</mn></math>', "$$\\frac{1}{2}$$"),
        ('<math alttext="{\\displaystyle a+b}"></math>', "$a+b$"),
        ("<math><mfrac><mi>a</mi><msup><mi>b</mi><mn>2</mn></msup></mfrac></math>", "$\\frac{a}{b^2}$"),
        ("<math><msqrt><mi>α</mi><mo>≤</mo><mn>12</mn></msqrt></math>", "$\\sqrt{\\alpha \\le 12}$"),
        (
            "<math><munderover><mo>∑</mo><mi>i</mi><mi>n</mi></munderover><mi>sin</mi><mi>x</mi></math>",
            "$\\sum_i^n\\sin x$",
        ),
        ("<math><mover><mi>v</mi><mo>→</mo></mover><mo>=</mo><mtext>speed</mtext></math>", "$\\vec{v}=\\text{speed}$"),
        ('<script type="math/tex">a_b</script>', "$a_b$"),
        ('<script type="math/tex; mode=display">a &amp; b\n\\\\ c</script>', "$$a &amp; b\n\\\\ c$$"),
        ('<span class="MathJax_Preview">junk</span><script type="math/tex">z</script>', "$z$"),
        ('<img class="tex" alt="\\alpha_1">', "$\\alpha_1$"),
        ('<img alt="\\sum_{i}^{n} x_i">', "$\\sum_{i}^{n} x_i$"),
        (
            '<span class="katex"><span class="katex-mathml"><math><semantics><mi>q</mi><annotation '
            'encoding="application/x-tex">q_0</annotation></semantics></math></span>'
            '<span class="katex-html" aria-hidden="true">q0</span></span>',
            "$q_0$",
        ),
        (
            '<mjx-container display="true"><mjx-math>x</mjx-math><math><mi>w</mi></math></mjx-container>',
            "$$w$$",
        ),
    ],
)
def test_maths_becomes_tex(html, tex):
    found = extract(page(f"<p>The formula {html} is true, and the proof follows below.</p>"))
    assert re.search(rf"The formula\s+{re.escape(tex)}\s+is true", found.text), found.text[-300:]
    assert found.num_formulas == 1
    assert "junk" not in found.text


DEEP = 100_000


@pytest.mark.parametrize("tag", ["div", "ul><li", "section", "blockquote", "center"])
def test_blocks_nested_100_000_deep_are_refused_at_once(tag):
    assert extract(f"<{tag}>" * DEEP + "text " * 100).reason == "nested_too_deep"


@pytest.mark.parametrize(
    "tag", ["span", "b", "font", "p><b", "table><tr><td", "a href=x", "svg><g", "math><mrow", "q", "x-y"]
)
def test_other_nesting_100_000_deep_ends(tag):
    found = extract(f"<p>{' '.join(SENTENCES)}</p>" + f"<{tag}>" * DEEP + "text")
    assert found.reason or SENTENCES[0] in found.text


def test_deep_but_real_nesting_is_read():
    assert SENTENCES[0] in extract("<div>" * 2000 + page("") + "</div>" * 2000).text


@pytest.mark.parametrize(
    ("html", "reason"),
    [
        ("", "empty_page"),
        (b"", "empty_page"),
        ("  \n", "empty_page"),
        ("<p>few words</p>", "too_short"),
        ("\0\0\0", "too_short"),
        ("<ul>" + '<li><a href="/x">a link to some other page</a></li>' * 50 + "</ul>", "mostly_links"),
        ("x" * 5001, "page_too_large"),
        ("<i>a</i>" * 600, "too_many_nodes"),
    ],
)
def test_reasons_for_no_text(html, reason):
    found = extract(html, ExtractConfig(max_page_bytes=5000, max_nodes=1000))
    assert (found.text, found.reason) == ("", reason)


@pytest.mark.parametrize(
    ("head", "charset", "encoding"),
    [
        ("", "", "utf-8"),
        ("", "", "cp1252"),
        ("", "ISO-8859-1", "cp1252"),
        ("<meta charset='windows-1251'>", "", "cp1251"),
        ("<meta http-equiv='Content-Type' content='text/html; charset=koi8-r'>", "", "koi8-r"),
        ("<meta charset='nonsense'>", "no-such-charset", "utf-8"),
        ("<meta charset='utf-16'>", "", "utf-8"),
        ("<meta charset='hex'>", "", "utf-8"),
        ("", "gb2312", "gb18030"),
        ("", "shift_jis", "cp932"),
    ],
)
def test_charset(head, charset, encoding):
    word = {"cp1251": "мост", "koi8-r": "река", "gb18030": "河流", "cp932": "川"}.get(encoding, "café “ö”")
    html = page(f"<p>The word is {word}, and so it is written here.</p>", head)
    assert f"The word is {word}, and" in extract(html.encode(encoding), http_charset=charset).text


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16"])
def test_byte_order_mark_wins(mark):
    html = page("<p>The word is café, and so it is written here.</p>", "<meta charset='koi8-r'>")
    assert "café" in extract(html.encode(mark), http_charset="cp1252").text


def test_damaged_bytes_do_not_stop_reading():
    data = page("<p>Die Brücke über den Fluß, sie ist sehr schön, sagt man.</p>").encode() + b"\xff\xfe\x80"
    assert "Brücke über den Fluß" in extract(data).text
    for seed in range(50):
        noise = bytearray(data)
        for i in range(seed, len(noise), 17 + seed):
            noise[i] ^= 1 << seed % 8
        extract(bytes(noise))


def test_same_page_same_text_twice():
    assert extract(page("<p>x</p>")) == extract(page("<p>x</p>"))


def test_stage_keeps_provenance_and_reasons(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.html").write_text(page(""))
    (tmp_path / "in" / "b.html").write_text("<p>short</p>")
    (tmp_path / "in" / "c.jsonl").write_text('{"text": "ready text", "source": "notes"}\n{"text": "other"}\nbroken\n')
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        counters = extract_shard(sorted((tmp_path / "in").iterdir()), tmp_path / name, ExtractConfig())
    assert (counters["docs_in"], counters["docs_out"]) == (5, 3)
    assert counters["dropped"] == {"invalid_json": 1, "too_short": 1}
    kept = list(read_documents(tmp_path / "one" / "documents.jsonl.zst"))
    assert [(d.record, d.source) for d in kept] == [
        ("in/a.html#0", "web"),
        ("c.jsonl#1", "notes"),
        ("c.jsonl#2", "web"),
    ]
    assert kept[0].meta["title"] == "The title"
    dropped = list(read_documents(tmp_path / "one" / "dropped.jsonl.zst"))
    assert [(d.record, d.meta["reason"]) for d in dropped] == [
        ("in/b.html#0", "too_short"),
        ("c.jsonl#3", "invalid_json"),
    ]
    for name in ("documents.jsonl.zst", "dropped.jsonl.zst"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# Against labelled pages.

DATA = os.environ.get("HERDKERN_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="HERDKERN_DATA is not set: labelled pages are not in the repository")


def rows(name):
    path = Path(DATA or "") / "html-extraction" / f"{name}.jsonl.zst"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return [json.loads(line) for _, _, line in read_lines(path, max_line_bytes=1 << 28)]


def token_f1(text, gold):
    got, want = (Counter(re.findall(r"\w+", part)) for part in (text, gold))
    common = sum((got & want).values())
    return 2 * common / max(1, sum(got.values()) + sum(want.values()))


@needs_data
def test_articles_token_f1():
    assert mean(token_f1(extract(r["html"]).text, r["main_text"]) for r in rows("article_extraction_benchmark")) >= 0.93


@needs_data
def test_formulas_and_boilerplate_of_rendered_pages():
    found = wanted = 0
    for row in rows("rendered_math_pages"):
        text = extract(row["html"]).text
        assert not [phrase for phrase in row["boilerplate"] if phrase in text]
        if row["mode"] != "mathml-plain":  # the only mode without the TeX in the page
            packed = "".join(text.split())
            wanted += len(row["formulas"])
            found += sum(f"${''.join(formula['latex'].split())}$" in packed for formula in row["formulas"])
    assert found == wanted


@needs_data
def test_phrases_of_news_pages_at_least_as_well_as_trafilatura():
    right = total = 0
    for row in rows("trafilatura_eval_phrases"):
        text = " ".join(extract(row["html"]).text.split())
        right += sum(" ".join(phrase.split()) in text for phrase in row["must_contain"])
        right += sum(" ".join(phrase.split()) not in text for phrase in row["must_not_contain"])
        total += len(row["must_contain"]) + len(row["must_not_contain"])
    trafilatura = (425 + 442 - 62) / 890  # counted once with PyPI's release, see the folder's README
    assert right / total >= trafilatura


@needs_data
def test_code_of_documentation_pages():
    from selectolax.lexbor import LexborHTMLParser

    kept = total = 0
    for row in rows("sphinx_docs_math_code"):
        text = extract(row["html"]).text
        tree = LexborHTMLParser(row["html"])
        main = tree.css_first("[role=main]") or tree.css_first("div.body") or tree.root
        for gutter in main.css(".linenos, .headerlink"):
            gutter.decompose()
        blocks = [block.text().strip("\n").rstrip() for block in main.css("pre")]
        total += len(blocks)
        kept += sum(block in text for block in blocks)
    assert kept / total >= 0.99


PIECES = (
    "<div>", "</div>", "<p>", "<table>", "<tr>", "<td>", "</table>", "<pre>", "</pre>", "<math>", "</math>", "<mfrac>",
    "<mi>x", "<script type='math/tex'>", "</script>", "<svg>", "<a href='x'>", "</a>", "<li>", "<ul>", "<!--", "-->",
    "<![CDATA[", "]]>", "<template>", "<noscript>", "<select>", "<option>", "<frameset>", "<plaintext>", "<title>",
    "<body hidden>", "&#x110000;", "&amp", "<math><annotation encoding='TeX'>", "<img alt='\\frac{1}{2}'>", "\\(",
    "\\)", "$", "\0", "\x0b", "<br>", "<h1>", "<span class='katex'>", "<mjx-container>", "<base href='::'>",
    "<svg><foreignObject><p>", "text and more text. ",
)  # fmt: skip


def mutated_page(rng):
    size = rng.randrange(1, 60)
    html = "".join(rng.choice(PIECES) for _ in range(size)).encode()
    noise = bytearray(html)
    for _ in range(rng.randrange(3)):
        noise[rng.randrange(len(noise))] = rng.randrange(256)
    return bytes(noise)


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.full)])
def test_any_bytes_give_text_or_a_reason(count):
    rng = random.Random(count)
    for _ in range(count):
        html = mutated_page(rng)
        found = extract(html, http_charset=rng.choice(("", "utf-8", "utf-16", "euc-jp", "x")))
        assert bool(found.text) != bool(found.reason), html
        found.text.encode()
        assert not set(found.text) & {"\ufdd0", "\ufdd1"}


HOSTILE = {
    "open tex": lambda n: "<p>A sentence, with words. " + "\\(" * n + "\\[" * n + "</p>",
    "nested katex": lambda n: "<p>A sentence, with words, of some length.</p>" + "<span class=katex>" * n,
    "formatting times paragraphs": lambda n: "<p>" + "".join(f"<b id={i}>" for i in range(n)) + "<p>x" * n,
    "formatting alone": lambda n: "<p>" + "".join(f"<font size={i}>x" for i in range(n)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_would_take_square_time_or_memory_ends(kind):
    found = extract(HOSTILE[kind](20_000))  # formatting times paragraphs: 4e8 elements for 500 kB
    assert found.reason == ("too_many_nodes" if kind.startswith("formatting") else found.reason)


def test_much_formatting_that_is_closed_or_equal_is_no_harm():
    line = "<p>Some <b>bold</b>, <i>slanted and <em>both</em></i> words make a sentence here. <font color=red>It ends."
    assert extract(line * 3000).reason == ""
    assert extract("<b><i>misnested</b></i> <p>A sentence with words, and its end. " * 3000).reason == ""


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("<div class=l>a = 1</div><div class=l>b = 2</div>", "a = 1\nb = 2"),
        ("<div>a = 1\n</div><div>b = 2\n</div>", "a = 1\nb = 2"),
        ("<div>a</div>\n<div>b</div>\n\nc", "a\nb\n\nc"),
        ("<ol><li><span>a</span> b</li><li>c</li></ol>d", "a b\nc\nd"),
        ("a<br>b\n  <b>c</b> = <i>1</i>", "a\nb\n  c = 1"),
    ],
)
def test_lines_of_code_in_elements_of_their_own_stay_lines(code, text):
    words = "This is a paragraph about the code, with words and more words. It ends here."
    assert (
        extract(f"<article><p>{words}</p><pre>{code}</pre><p>{words}</p></article>").text
        == f"{words}\n\n{text}\n\n{words}"
    )
