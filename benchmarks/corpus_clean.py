"""From a file of a package to documents: markup is dropped, blank lines are joined, long texts are cut.

What is cleaned by its file name: HTML and DocBook by selectolax, manual pages by a reader of roff's lines, dictionaries
and source code not at all.
"""

import gzip
import re
from collections.abc import Iterator

from selectolax.lexbor import LexborHTMLParser

MAX_FILE_BYTES = 64 << 20
MIN_CHARACTERS = 200
DOCUMENT_CHARACTERS = 24_000
ENTRY_CHARACTERS = 4_000  # of a dictionary or of sayings, whose entries have nothing to do with each other
MARKUP = re.compile(r"\.(x?html?|page)$")
DROPPED = ["script", "style", "head", "nav", "svg", "info"]
BLOCKS = (
    "p,div,br,li,tr,h1,h2,h3,h4,h5,h6,pre,table,ul,ol,dl,dt,dd,section,title,item,para,note,header,footer,blockquote"
)
ROFF_COMMENT = re.compile(r"[.'] *(\\\"|\\#|\\}|$)")
ROFF_SILENT = set("de ie el if nr ds ft ad hy nh in ne sp so TH Dd Dt Os tr am rm als mso . nop".split())
ROFF_BREAKS = set("SH SS TP PP P IP LP HP Sh Ss Pp It".split())
ROFF_FONT = re.compile(
    r"\\f(?:\[[^\]]*\]|\(..|.)|\\s(?:[-+]?\d|\[[^\]]*\])|\\[&/,|^%:)c]|\\[mMh](?:\[[^\]]*\]|'[^']*')"
)
ROFF_SIGN = re.compile(r"\\(?:\((..)|\[([^\]]*)\]|(.))", re.S)
ROFF_SIGNS = {
    **{"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": "\u00a0", "0": " ", "'": "´", "`": "`", ".": ".", "t": "\t"},
    **{"aq": "'", "cq": "’", "oq": "‘", "lq": "“", "rq": "”", "dq": '"', "ga": "`", "ha": "^", "ti": "~", "rs": "\\"},
    **{"bu": "•", "em": "—", "en": "–", "hy": "-", "co": "©", "rg": "®", "<-": "←", "->": "→", "mu": "×", "de": "°"},
    **{"ss": "ß", ":a": "ä", ":o": "ö", ":u": "ü", "'e": "é", "`e": "è", "Fo": "«", "Fc": "»", "+-": "±", ">=": "≥"},
}
BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)+")
LINE_END = re.compile(r"[ \t\r]*\n")


def documents_of(name: str, data: bytes, kind: str) -> Iterator[str]:
    """The documents of one file; none if it is no UTF-8 text, too short or made by a machine.

    kind: of the source, see corpus.py; "dictionary" and "sayings" are cut into small documents.
    """
    if name.endswith((".gz", ".dz")):
        data = gzip.decompress(data)
    if b"\0" in data[:4096] or len(data) > MAX_FILE_BYTES:
        return
    text = data.decode("utf-8", "ignore")
    if len(text.encode()) < 0.999 * len(data):  # another encoding; a few bytes may be damaged
        return
    if MARKUP.search(name):
        text = strip_markup(text)
    elif "/man/" in name:
        text = strip_roff(text)
    elif kind == "sayings":
        text = text.replace("\n%\n", "\n\n")
    text = BLANK_LINES.sub("\n\n", LINE_END.sub("\n", text)).strip()
    if kind == "source" and text.count("\n") * 400 < len(text):
        return  # minified
    for part in cut(text, ENTRY_CHARACTERS if kind in ("dictionary", "sayings") else DOCUMENT_CHARACTERS):
        if len(part) >= MIN_CHARACTERS:
            yield part


def strip_markup(text: str) -> str:
    """The text of an HTML or DocBook page, a line for each block."""
    tree = LexborHTMLParser(text)
    tree.strip_tags(DROPPED)
    if tree.body is None:
        return ""
    for node in tree.css(BLOCKS):
        node.insert_before("\n")
        node.insert_after("\n")
    return tree.body.text()


def strip_roff(text: str) -> str:
    """A manual page without its requests: the words of a macro stay, the macro goes."""
    lines = []
    for line in text.split("\n"):
        if line[:1] in (".", "'"):
            if ROFF_COMMENT.match(line):
                continue
            macro, _, words = line[1:].lstrip().partition(" ")
            if macro in ROFF_SILENT:
                continue
            if macro in ROFF_BREAKS:
                lines.append("")
            line = words.replace('"', "").strip()
            if not line:
                continue
        lines.append(line)
    plain = ROFF_FONT.sub("", "\n".join(lines))
    return ROFF_SIGN.sub(roff_sign, plain)


def roff_sign(match: re.Match) -> str:
    name = match[1] or match[2] or match[3] or ""
    if name[:1] == "u" and re.fullmatch(r"u[0-9A-F]{4,6}", name) and not 0xD800 <= int(name[1:], 16) < 0xE000:
        return chr(int(name[1:], 16))
    return ROFF_SIGNS.get(name, "")


def cut(text: str, size: int) -> Iterator[str]:
    """Parts of about `size` characters, cut between paragraphs; a paragraph that is longer is cut inside."""
    if len(text) <= size * 3 // 2:
        yield text
        return
    part: list[str] = []
    length = 0
    for paragraph in text.split("\n\n"):
        for begin in range(0, len(paragraph), size):
            piece = paragraph[begin : begin + size]
            part.append(piece)
            length += len(piece) + 2
            if length >= size:
                yield "\n\n".join(part)
                part, length = [], 0
    if part:
        yield "\n\n".join(part)
