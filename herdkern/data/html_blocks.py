"""A flat tree to text blocks: paragraphs, headings, list items, table rows and code, each with what a scorer needs.

Source of the block view: Kohlschütter, Fankhauser, Nejdl 2010, "Boilerplate detection using shallow text features".
"""

import re
from dataclasses import dataclass

from herdkern.data.html_tree import BLOCK_TAGS, FlatTree

HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6"))
MAX_CELL_CHARACTERS = 500  # a cell with more is a column of a layout, not of data
_PREFORMATTED = frozenset(("pre", "listing", "xmp", "plaintext"))
_CODE = frozenset(("code", "tt", "kbd", "samp"))
_TABLE_PARTS = frozenset(("tbody", "thead", "tfoot"))
_IN_CELL_BLOCKS = frozenset(
    ("table", "pre", "ul", "ol", "dl", "h1", "h2", "h3", "h4", "blockquote", "article", "section")
)
_NEWLINE, _SPACE = "\ufdd0", "\ufdd1"  # noncharacters: a newline and a space that respacing keeps
_SPACES = re.compile(r"[ \t\n\r\f]+")
_AROUND_NEWLINE = re.compile(f" ?{_NEWLINE} ?")
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff\u200e\u200f]")
_INLINE_TEX = re.compile(r"\\\(((?:(?!\\\().)+?)\\\)", re.DOTALL)  # a second \( ends the search: linear time
_DISPLAY_TEX = re.compile(r"\\\[((?:(?!\\\[).)+?)\\\]", re.DOTALL)
_FILE_NAME = re.compile(r"^\S*\.(?:jpe?g|png|gif|svg|webp|bmp)$|^(?:img|image|dsc|photo)[-_ ]?\d+", re.IGNORECASE)


@dataclass(slots=True)
class Block:
    """A run of text between block borders.

    kind: "text", "heading", "item", "row" or "code".  node: the block element that holds it.
    length: characters that are not spaces; link_length, code_length: those of them in links, in code or formulas.
    num_formulas: formulas, all as TeX between dollars.
    """

    text: str
    kind: str
    node: int
    length: int
    link_length: int
    code_length: int = 0
    num_formulas: int = 0


def blocks_of(tree: FlatTree, *, keep_alt: bool = True) -> list[Block]:
    """The blocks of `tree` in document order; `keep_alt` keeps image descriptions of 3 to 50 words."""
    return _Renderer(tree, keep_alt).run()


def is_data_table(tree: FlatTree, table: int) -> bool:
    """Whether the table at index `table` holds rows of short cells, rather than the layout of the page."""
    rows = wide = filled = 0  # rows, rows with two filled cells or more, filled cells of the row
    characters = 0
    index, end = table + 1, tree.ends[table]
    while index < end:
        tag = tree.tags[index]
        if tag in _IN_CELL_BLOCKS:
            return False
        if tag == "tr":
            rows += 1
            wide += filled > 1
            filled = 0
        elif tag in ("td", "th"):
            characters = 0
        elif not tag:
            size = len(tree.texts[index].strip())
            if size and not characters:
                filled += 1
            characters += size
            if characters > MAX_CELL_CHARACTERS:
                return False
        index += 1
    wide += filled > 1
    return rows >= 1 and wide * 2 >= rows and tree.attributes[table].get("role") != "presentation"


class _Renderer:
    def __init__(self, tree: FlatTree, keep_alt: bool):
        self.tree, self.keep_alt = tree, keep_alt
        self.blocks: list[Block] = []
        self.code_end = -1
        self.pieces: list[str]
        self.reset()

    def run(self) -> list[Block]:
        tree = self.tree
        index, size = 0, len(tree)
        open_blocks: list[int] = []  # block elements around index
        link_end = -1
        while index < size:
            while open_blocks and tree.ends[open_blocks[-1]] <= index:
                self.flush(open_blocks.pop())
            tag = tree.tags[index]
            if not tag:
                self.add_text(index, index < link_end)
            elif tag in _PREFORMATTED:
                self.flush(open_blocks[-1] if open_blocks else 0)
                self.add_code(index)
                index = tree.ends[index]
                continue
            elif tag == "table" and is_data_table(tree, index):
                self.flush(open_blocks[-1] if open_blocks else 0)
                self.add_rows(index)
                index = tree.ends[index]
                continue
            elif tag in BLOCK_TAGS:
                self.flush(open_blocks[-1] if open_blocks else 0)
                open_blocks.append(index)
            elif tag == "a" and tree.attributes[index].get("href"):
                link_end = max(link_end, tree.ends[index])
            elif tag == "br":
                self.pieces.append(_NEWLINE)
            elif tag == "img":
                self.add_alt(index)
            elif tag in _CODE or (tag == "span" and tree.attributes[index].get("class") == "code"):
                self.code_end = max(self.code_end, tree.ends[index])
            index += 1
        while open_blocks:
            self.flush(open_blocks.pop())
        return self.blocks

    def add_text(self, index: int, in_link: bool) -> None:
        text = self.tree.texts[index]
        if index in self.tree.verbatim:
            if text.startswith("$$"):
                text = f"\n{text}\n"
            self.code_length += len(text)
            self.num_formulas += 1
            text = text.replace("\n", _NEWLINE).replace(" ", _SPACE)
        count = len(text) - text.count(" ") - text.count("\n")
        self.length += count
        if in_link:
            self.link_length += count
        if index < self.code_end:
            self.code_length += count
        self.pieces.append(text)

    def add_alt(self, index: int) -> None:
        alternative = (self.tree.attributes[index].get("alt") or "").strip()
        if self.keep_alt and 3 <= len(alternative.split()) <= 50 and not _FILE_NAME.search(alternative):
            self.pieces.append(f" {alternative} ")

    def add_code(self, index: int) -> None:
        tree = self.tree
        pieces: list[str] = []
        line_end = -1  # of a block element inside, which some pages use for each line
        for inner in range(index + 1, tree.ends[index]):
            tag, piece = tree.tags[inner], tree.texts[inner]
            starts_line = tag in BLOCK_TAGS or (piece and 0 <= line_end <= inner)
            if starts_line and pieces and not pieces[-1].endswith("\n") and not piece.startswith("\n"):
                pieces.append("\n")
            if piece or tag in BLOCK_TAGS:
                line_end = tree.ends[inner] if tag in BLOCK_TAGS else -1 if inner >= line_end else line_end
            if piece or tag == "br":
                pieces.append(piece or "\n")
        text = "".join(pieces).replace("\r\n", "\n").replace("\r", "\n")
        body = text.rstrip(" \n\t")
        length = len("".join(body.split()))
        if length:
            self.blocks.append(Block(text.rstrip("\n"), "code", index, length, 0, length))

    def add_rows(self, table: int) -> None:
        tree = self.tree
        cells: list[str] = []
        row = table
        index, end = table + 1, tree.ends[table]
        link_end = -1
        length = link_length = num_formulas = 0

        def finish() -> None:
            nonlocal length, link_length, num_formulas
            text = "\t".join(cells).rstrip("\t")
            if text.strip():
                kind = "text" if tree.tags[row] == "caption" else "row"
                self.blocks.append(Block(text, kind, row, max(length, 1), link_length, 0, num_formulas))
            cells.clear()
            length = link_length = num_formulas = 0

        while index < end:
            tag = tree.tags[index]
            if tag in ("tr", "caption"):
                finish()
                row = index
            if tag in ("td", "th", "caption"):
                stop = tree.ends[index]
                self.reset()
                for inner in range(index + 1, stop):
                    name = tree.tags[inner]
                    if not name:
                        self.add_text(inner, inner < link_end)
                    elif name == "a" and tree.attributes[inner].get("href"):
                        link_end = max(link_end, tree.ends[inner])
                    elif name == "img":
                        self.add_alt(inner)
                    elif name == "br" or name in BLOCK_TAGS:
                        self.pieces.append(" ")
                cells.append(" ".join(self.text().split()))
                length += self.length
                link_length += self.link_length
                num_formulas += self.num_formulas
                index = stop
                continue
            index += 1
        finish()
        self.reset()

    def text(self) -> str:
        """The pieces as text: runs of white space become one space, line breaks and maths stay."""
        text = _SPACES.sub(" ", "".join(self.pieces))
        text = _AROUND_NEWLINE.sub("\n", text)
        if "\\" in text:
            text, num_inline = _INLINE_TEX.subn(lambda match: f"${match.group(1).strip()}$", text)
            text, num_display = _DISPLAY_TEX.subn(lambda match: f"\n$${match.group(1).strip()}$$\n", text)
            self.num_formulas += num_inline + num_display
        text = _INVISIBLE.sub("", text).replace(_SPACE, " ").replace("\xa0", " ")
        if "\n" not in text:
            return text.strip()
        return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")

    def flush(self, node: int) -> None:
        """End the current block, which lies directly in the block element `node`."""
        if not self.pieces:
            return
        text = self.text()
        if text.strip():
            if not self.blocks or "\n" not in text:
                text = text.strip()
            self.blocks.append(
                Block(
                    text,
                    self.kind(node),
                    node,
                    max(self.length, 1),
                    self.link_length,
                    self.code_length,
                    self.num_formulas,
                )
            )
        self.reset()

    def reset(self) -> None:
        """Begin a new block."""
        self.pieces = []
        self.length = self.link_length = self.code_length = self.num_formulas = 0

    def kind(self, node: int) -> str:
        """The kind by the nearest heading, list item or cell around `node`."""
        steps = 0
        while node >= 0 and steps < 4:
            tag = self.tree.tags[node]
            if tag in HEADINGS:
                return "heading"
            if tag in ("li", "dt", "dd"):
                return "item"
            if tag in ("td", "article", "section", "main", "body") or tag in _TABLE_PARTS:
                return "text"
            node = self.tree.parents[node]
            steps += 1
        return "text"


def join_blocks(blocks: list[Block]) -> str:
    """The text of `blocks`: items and rows on lines of their own, a blank line between everything else."""
    pieces: list[str] = []
    previous = ""
    for block in blocks:
        if pieces:
            pieces.append("\n" if block.kind == previous and block.kind in ("item", "row") else "\n\n")
        pieces.append(block.text)
        previous = block.kind
    return "".join(pieces)
