"""Markdown to plain text: markers out, words, code and formulas untouched.

Source: CommonMark 0.31 for what is a marker; the Llama 3 report, section 3.1.1, for taking all of them out.
"""

import html
import re

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
_HEADING = re.compile(r"^ {0,3}#{1,6}(?:[ \t]+|$)(.*?)(?:[ \t]+#+)?[ \t]*$")
_UNDERLINE = re.compile(r"^ {0,3}(?:=+|-{2,})[ \t]*$")
_RULE = re.compile(r"^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$")
_QUOTE = re.compile(r"^ {0,3}(?:> ?)+")
_BULLET = re.compile(r"^([ \t]*)(?:[-*+]|\d{1,3}[.)])[ \t]+(?:\[[ xX]\][ \t]+)?")
_REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:[ \t]*\S+(?:[ \t]+[\"'(].*[\"')])?[ \t]*$")
_TABLE_RULE = re.compile(r"^[ \t]*\|?[ \t]*:?-{1,}:?[ \t]*(?:\|[ \t]*:?-{1,}:?[ \t]*)*\|?[ \t]*$")
_KEPT = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)|(\$\$?[^$\n]+?\$\$?)")
_IMAGE = re.compile(r"!\[([^\[\]]*)\](?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\[\]]*\])")
_LINK = re.compile(r"\[([^\[\]]*)\](?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\[\]]*\])")
_AUTOLINK = re.compile(r"<((?:https?|mailto|ftp):[^<>\s]+|[^<>\s@]+@[^<>\s]+)>")
_TAG = re.compile(r"</?[A-Za-z][^<>\n]*>")
_LONG_TAG = re.compile(
    r"</?(?:a|abbr|b|br|code|details|div|em|h[1-6]|i|img|kbd|li|ol|p|picture|source|span|strong|sub|summary|sup|table|tbody"
    r"|td|th|thead|tr|ul|video)\b[^<>]*>",
    re.IGNORECASE,
)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_STRONG = re.compile(r"(?<![\\\w*])(\*{1,3})(?=[^\s*])(.+?)(?<=[^\s*\\])\1(?![\w*])")
_UNDERSCORED = re.compile(r"(?<![\\\w])(_{1,3})(?=[^\s_])(.+?)(?<=[^\s_\\])\1(?!\w|\.\w)")
_STRUCK = re.compile(r"~~(?=\S)(.+?)(?<=\S)~~")
_ESCAPE = re.compile(r"\\([!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~])")


def strip_markdown(text: str) -> str:
    """`text` without headings' #, emphasis, quotes, bullets, links' targets, fences and HTML tags.

    Lines in fences and indented code, inline code and $...$ keep every character; table cells are separated by tabs.
    """
    text = _COMMENT.sub("", text.replace("\r\n", "\n"))
    lines = _LONG_TAG.sub(lambda tag: tag.group().replace("\n", " "), text).split("\n")
    stripped: list[str] = []
    fence = ""
    in_list = in_code = False
    for line in lines:
        mark = _FENCE.match(line)
        if fence:
            if mark and mark.group(1).startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
            else:
                stripped.append(line)
            continue
        if mark and not (mark.group(1)[0] == "`" and "`" in line[mark.end() :]):
            fence = mark.group(1)
            continue
        is_blank = not line.strip()
        is_indented = line.startswith(("    ", "\t")) and not in_list and not line.lstrip().startswith("<")
        in_code = is_indented and not is_blank and (in_code or not stripped or not stripped[-1].strip())
        if in_code:
            stripped.append(line)
            continue
        in_list = bool(_BULLET.match(line)) or (in_list and (is_blank or line.startswith((" ", "\t"))))
        plain = _line(line, bool(stripped) and bool(stripped[-1].strip()))
        if plain or (plain is not None and stripped and stripped[-1]):
            stripped.append(plain)
    return "\n".join(stripped).strip("\n")


def _line(line: str, follows_text: bool) -> str | None:
    """The line without its markers, None if it is nothing but a marker."""
    line = _QUOTE.sub("", line)
    if _RULE.match(line) or _REFERENCE.match(line) or (follows_text and _UNDERLINE.match(line)):
        return None
    if "|" in line and _TABLE_RULE.match(line):
        return None
    heading = _HEADING.match(line)
    if heading:
        line = heading.group(1)
    else:
        line = _BULLET.sub(r"\1", line)
    if line.lstrip().startswith("|"):
        line = "\t".join(cell.strip() for cell in line.strip().strip("|").split("|"))
    had_words = bool(line.strip())
    line = _inline(line)
    return None if had_words and not line.strip() else line.rstrip()


def _inline(line: str) -> str:
    """Markers inside a line out; inline code and formulas are set aside meanwhile."""
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match.group(3) or match.group(2).strip() or match.group(0))
        return f"\ufdd2{len(kept) - 1}\ufdd3"

    line = _KEPT.sub(keep, line)
    line = _AUTOLINK.sub(r"\1", line)
    for _ in range(4):  # badges are images inside links
        before = line
        line = _LINK.sub(r"\1", _IMAGE.sub(r"\1", line))
        if line == before:
            break
    if "<" in line or "&" in line:
        line = html.unescape(_TAG.sub("", line)).replace("\xa0", " ")
    for _ in range(3):
        before = line
        line = _UNDERSCORED.sub(r"\2", _STRONG.sub(r"\2", line))
        if line == before:
            break
    line = _ESCAPE.sub(r"\1", _STRUCK.sub(r"\1", line))
    return re.sub("\ufdd2(\\d+)\ufdd3", lambda match: kept[int(match.group(1))], line)
