"""The page around a report: one self-contained HTML file, no script, no request, light and dark, wide and narrow.

Samples and dropped documents are hostile input. Text reaches the page through `escape` alone, and the page forbids
itself scripts, frames and every load (Content-Security-Policy), so a slip would still run nothing.
"""

import difflib
import html
from collections.abc import Sequence
from pathlib import Path

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")

_PICTURES = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys((*range(128, 160), *range(8234, 8239), *range(8294, 8298)), 65533)  # C1, direction


def page(title: str, lead: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """A whole HTML document.

    title, lead, footer: plain text.  sections: (anchor, heading, body); body is HTML whose text was escaped already.
    """
    links = "".join(f'<a href="#{anchor}">{escape(heading)}</a>' for anchor, heading, _ in sections)
    body = "".join(
        f'<section><h2 id="{anchor}">{escape(heading)}</h2>{content}</section>' for anchor, heading, content in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f'<body><header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>'
        f"<nav><div>{links}</div></nav>\n<main>{body}</main>\n<footer>{escape(footer)}</footer></body></html>\n"
    )


def cards(items: Sequence[tuple[str, str]]) -> str:
    """A row of large figures: (figure, what it is)."""
    inner = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in items
    )
    return f'<div class="cards">{inner}</div>'


def panel(heading: str, body: str, note: str = "") -> str:
    """A framed part of a section; body is HTML."""
    head = f"<h3>{escape(heading)}</h3>" if heading else ""
    return f'<div class="panel">{head}{body}{f"<p class=note>{escape(note)}</p>" if note else ""}</div>'


def grid(panels: Sequence[str]) -> str:
    """Panels side by side where there is room, below each other on a phone."""
    return f'<div class="grid">{"".join(panels)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[int] = ()) -> str:
    """A table of plain text cells; columns in `numeric` are set flush right."""

    def cell(tag: str, column: int, text: str) -> str:
        return f"<{tag}{' class=n' if column in numeric else ''}>{escape(text)}</{tag}>"

    top = "".join(cell("th", i, text) for i, text in enumerate(head))
    lines = "".join("<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>" for row in rows)
    header = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table>{header}<tbody>{lines}</tbody></table></div>'


def text_block(text: str, limit: int = 1200) -> str:
    """`text` as it is, in a scrolling box; what lies past `limit` characters is counted, not shown."""
    rest = f"\n… {len(text) - limit:,} more characters" if len(text) > limit else ""
    return f'<div class="text">{escape(text[:limit] + rest)}</div>'


def clean(text: str) -> str:
    """`text` with control characters shown as their pictures, so that a page cannot be upset by them."""
    return text.translate(_PICTURES)


def escape(text: str) -> str:
    """`text` as HTML that shows exactly that text, in an element or a quoted attribute."""
    return html.escape(clean(text))


def details(summary: str, note: str, body: str, *, is_open: bool = False) -> str:
    """A part that opens on a click; summary and note are plain text, body is HTML."""
    extra = f'<span class="note">{escape(note)}</span>' if note else ""
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}{extra}</summary>{body}</details>"


def side_by_side(left: str, right: str, limit: int = 1500) -> tuple[str, str]:
    """Two texts as HTML with the words that differ marked: removed on the left, added on the right."""
    a, b = _words(left[:limit]), _words(right[:limit])
    out_a, out_b = [], []
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        piece_a, piece_b = escape("".join(a[a0:a1])), escape("".join(b[b0:b1]))
        out_a.append(piece_a if kind == "equal" or not piece_a else f"<del>{piece_a}</del>")
        out_b.append(piece_b if kind == "equal" or not piece_b else f"<ins>{piece_b}</ins>")
    tails = [" …" if len(text) > limit else "" for text in (left, right)]
    return "".join(out_a) + tails[0], "".join(out_b) + tails[1]


def _words(text: str) -> list[str]:
    words: list[str] = []
    for piece in text.split(" "):
        lines = piece.split("\n")
        for i, line in enumerate(lines):
            words.append(line + ("\n" if i < len(lines) - 1 else " "))
    return words
