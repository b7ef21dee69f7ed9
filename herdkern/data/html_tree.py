"""HTML bytes to a flat tree: charset, caps against hostile pages, and what is never content left out.

The tree is kept as parallel lists in document order, so every later step is a loop: no recursion, whatever the nesting.
"""

import codecs
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from selectolax.lexbor import LexborHTMLParser, LexborNode

from herdkern.data.html_math import math_text

MAX_OPEN_BLOCKS = 4000  # the parser walks the open blocks at every block: quadratic beyond any real page
BLOCK_TAGS = frozenset(
    "address article aside blockquote body caption center dd details dialog dir div dl dt fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 header hgroup hr html legend li main menu nav ol p pre section summary table tbody "
    "td tfoot th thead tr ul listing xmp plaintext".split()
)
SKIPPED_TAGS = frozenset(
    "script style template svg iframe frame frameset noframes object embed applet canvas audio video source track "
    "input select option optgroup button textarea datalist meter progress map area head nav footer aside dialog menu "
    "rp rt base link meta param portal slot search noembed".split()
)
_SKIPPED_ROLES = frozenset(
    "navigation banner contentinfo complementary search dialog alertdialog alert menu menubar toolbar tooltip "
    "tablist".split()
)
_GUTTER = re.compile(
    r"(?:^|\s)(?:linenos?|linenodiv|gutter|line-?numbers?|lineno|blob-num|headerlink|copybutton)(?:\s|$)"
)
_HIDDEN_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden")
_OPENING = re.compile(
    rb"<(/?)(?:div|section|article|main|center|blockquote|ul|ol|dl|menu|dir|figure|details|fieldset|address|header|hgroup"
    rb"|footer|nav|aside|object|applet|marquee|select|form|summary|dialog|search)[\s/>]",
    re.IGNORECASE,
)
MIN_FORMATTING = 40  # fewer open at a time cannot do harm
_FORMATTING = re.compile(
    r"<(/?)(?:(b|big|code|em|font|i|nobr|s|small|strike|strong|tt|u)(?=[\s/>])[^<>]*>?|(?:p|div|li|td|h[1-6]|dd|dt|br)(?=[\s/>]))",
    re.IGNORECASE,
)
_NO_ATTRIBUTES: dict[str, str | None] = {}
_META_CHARSET = re.compile(rb"<meta[^>]{0,400}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.\-]{2,40})", re.IGNORECASE)
_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
# WHATWG: labels that mean a superset of what they say.
_SUPERSETS = {"ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "gb2312": "gb18030", "gbk": "gb18030"}
_SUPERSETS |= {"euc_kr": "cp949", "shift_jis": "cp932", "tis-620": "cp874", "utf-16": "utf-16-le", "utf-7": "cp1252"}


class PageError(ValueError):
    """A page that cannot be read; `reason` is the code under which it is counted."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(slots=True)
class FlatTree:
    """Elements and texts of a page in document order, boilerplate tags left out.

    tags: element name, "" for text.  texts: of text entries, "" for elements.  parents: index, -1 at the root.
    attributes: of elements.  ends: first index behind the subtree.  verbatim: a text that must not be respaced (maths).
    """

    tags: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    attributes: list[dict[str, str | None]] = field(default_factory=list)
    verbatim: set[int] = field(default_factory=set)
    title: str = ""
    ends: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tags)

    def add(self, tag: str, text: str, parent: int, attributes: dict[str, str | None]) -> int:
        """Append an entry and return its index."""
        self.tags.append(tag)
        self.texts.append(text)
        self.parents.append(parent)
        self.attributes.append(attributes)
        return len(self.tags) - 1

    def close(self) -> None:
        """Compute `ends` from `parents`, from the back."""
        size = len(self.tags)
        ends = list(range(1, size + 1))
        for index in range(size - 1, 0, -1):
            parent = self.parents[index]
            if ends[index] > ends[parent]:
                ends[parent] = ends[index]
        self.ends = ends


def decode_html(data: bytes, http_charset: str = "") -> str:
    """The text of `data` by byte order mark, HTTP charset, <meta charset>, UTF-8 if it is valid, else windows-1252.

    A declared charset that Python does not know is passed over; bytes that do not fit become U+FFFD.
    """
    for mark, name in _BOMS:
        if data.startswith(mark):
            return data[len(mark) :].decode(name, "replace")
    declared = _META_CHARSET.search(data[:4096])
    for label in (http_charset, declared.group(1).decode("ascii") if declared else ""):
        try:
            name = codecs.lookup(label.strip(" \"'")).name if label.isascii() else ""
        except (LookupError, ValueError):
            continue
        name = _SUPERSETS.get(name, name)
        if declared and label is not http_charset and name.startswith("utf-16"):
            name = "utf-8"  # WHATWG: a page whose <meta> could be read is not UTF-16
        try:
            return data.decode(name, "strict" if name == "utf-8" else "replace")
        except UnicodeDecodeError:
            if label is http_charset and declared:
                continue
            return data.decode(name, "replace")
        except (LookupError, ValueError, AssertionError):  # codecs that decode no text, such as hex
            continue
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    if bad and bad > sum(map("\x7f".__lt__, text)) - bad:  # legacy text hardly ever forms a valid sequence
        return data.decode("cp1252", "replace")
    return text


def open_blocks(data: bytes) -> int:
    """The most block tags open at a time, by counting tags alone; what the parser would have to walk."""
    if data.count(b"<") <= MAX_OPEN_BLOCKS:
        return 0
    depth = deepest = 0
    for match in _OPENING.finditer(data):
        if match.group(1):
            depth = max(0, depth - 1)
        else:
            depth += 1
            deepest = max(deepest, depth)
    return deepest


def formatting_copies(html: str) -> int:
    """About how many elements the parser adds or looks at because formatting was left open.

    It opens all of that again in each block, and compares each new one with it.
    Source: WHATWG HTML, 13.2.4.3, the list of active formatting elements (of equal ones at most three).
    """
    if html.count("<") < 2 * MIN_FORMATTING:
        return 0
    active: defaultdict[str, list[str]] = defaultdict(list)  # name -> the tags that are open
    equal: Counter[str] = Counter()
    num_active = copies = 0
    for match in _FORMATTING.finditer(html):
        closing, name = match.group(1), match.group(2)
        if not closing and num_active > MIN_FORMATTING:
            copies += num_active
        if not name:
            continue
        if not closing:
            tag = match.group()
            if equal[tag] < 3:
                equal[tag] += 1
                num_active += 1
                active[name.lower()].append(tag)
        elif active[name.lower()]:
            num_active -= 1
            equal[active[name.lower()].pop()] -= 1
    return copies


def parse_html(html: str, *, max_nodes: int = 2_000_000, keep_hidden: bool = False) -> FlatTree:
    """The flat tree of `html`; maths is already TeX between dollars.

    keep_hidden: keep elements that are hidden until a script shows them, and <noscript>.
    Raises: PageError with reason nested_too_deep or too_many_nodes.
    """
    depth = open_blocks(html.encode("utf-8", "replace"))
    if depth > MAX_OPEN_BLOCKS:
        raise PageError("nested_too_deep", f"{depth} blocks are open at a time, at most {MAX_OPEN_BLOCKS} are parsed")
    copies = formatting_copies(html)
    if copies > max_nodes:
        raise PageError("too_many_nodes", f"formatting left open would cost {copies} elements")
    parser = LexborHTMLParser(html.replace("\0", ""))
    tree = FlatTree()
    title = parser.css_first("head > title")
    tree.title = " ".join(title.text().split()) if title is not None else ""
    root = parser.body or parser.root
    if root is not None:
        _flatten(root, tree, max_nodes, keep_hidden)
    tree.close()
    return tree


def _flatten(root: LexborNode, tree: FlatTree, max_nodes: int, keep_hidden: bool) -> None:
    index_of: dict[int, int] = {}  # of the elements kept, by the parser's node
    for count, node in enumerate(root.traverse(include_text=True)):
        if count > max_nodes:
            raise PageError("too_many_nodes", f"more than {max_nodes} nodes")
        parent = -1
        if count:
            above = node.parent
            found = index_of.get(above.mem_id) if above is not None else None
            if found is None:
                continue  # below something left out
            parent = found
        tag = node.tag
        if tag == "-text":
            text = node.text_content
            if text:
                tree.add("", text, parent, _NO_ATTRIBUTES)
            continue
        if tag is None or tag[0] == "-":
            continue
        attributes = node.attributes or _NO_ATTRIBUTES
        if attributes or tag == "math":
            math = math_text(node, tag, attributes)
            if math is not None:
                if math:
                    tree.verbatim.add(tree.add("", math, parent, _NO_ATTRIBUTES))
                continue
        if parent >= 0 and _is_left_out(tag, attributes, keep_hidden):
            continue
        index_of[node.mem_id] = tree.add(tag, "", parent, attributes)


def _is_left_out(tag: str, attributes: dict[str, str | None], keep_hidden: bool) -> bool:
    if tag in SKIPPED_TAGS:
        return True
    if tag == "noscript":
        return not keep_hidden
    if not attributes:
        return False
    role = attributes.get("role")
    if role and role in _SKIPPED_ROLES:
        return True
    classes = attributes.get("class")
    if classes and _GUTTER.search(classes) and tag not in ("table", "pre", "code"):
        return True
    if keep_hidden:
        return False
    if "hidden" in attributes or attributes.get("aria-hidden") == "true":
        return True
    style = attributes.get("style")
    return bool(style) and _HIDDEN_STYLE.search(style or "") is not None
