"""Main content of web pages as plain text: boilerplate out, code and maths kept, no markup of any kind left.

Every block gets a score from its length, links, punctuation and the names around it; the content is the subtree of the
page with the highest sum, less the parts inside it whose own sum is negative.
Source: Kohlschütter et al. 2010 (block features); the Llama 3 report, section 3.1.1 (what to keep).
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from herdkern.data.document import BadRecord, Document, DocumentWriter, document_id
from herdkern.data.html_blocks import Block, blocks_of, join_blocks
from herdkern.data.html_tree import FlatTree, PageError, decode_html, parse_html
from herdkern.data.sources import MAX_RECORD_BYTES, RawPage, read_records

_UNLIKELY = re.compile(
    r"(?:^|[-_\s])(?:nav|navbar|navigation|menu|submenu|foot|footer|footnav|sidebar|side-?bar|rail|breadcrumbs?|share|shares"
    r"|sharing|sharebar|social|socials|related|relatedposts|recommend\w*|promo\w*|ads?|advert\w*|adsense|sponsor\w*|cookies?"
    r"|consent|gdpr|newsletter|subscribe|subscription|signup|sign-up|signin|login|popup|modal|overlay|comments?|commentlist"
    r"|disqus\w*|respond|replies|pagination|pager|widgets?|toolbar|masthead|skip|skip-?link|noprint|tags|taglist|tag-links"
    r"|banner|outbrain|taboola|teasers?|trending|popular|most-?read|more-?stories|read-?more|see-?also|upsell|paywall"
    r"|copyright|legal|disclaimer|postmeta|post-?meta|entry-?meta|article-?meta|byline|author-?bio|author-?box|authorbox"
    r"|about-?author|biography|bio|credits?|rating|ratings|prevnext|prev-?next|post-?nav|post-?navigation|sphinxsidebar"
    r"|toc|table-of-contents|catlinks|editsection|mw-editsection|navbox|printfooter|jump|shoutbox|syndication|tools|topbar|sharedaddy|sd-block|cta"
    r"|postmetadata|reviews?|rewards?|donat\w+|widgetcontainer|textwidget|aside|placeholder|authors?|feedback|slider"
    r"|carousel|notification|tooltip|dropdown|likes?|survey|quiz|poll"
    r"|site-?header|page-?header|dateline|timestamp|metadata|job-?alert|download-?links?|hatnote|noticebox)(?:[-_\s]|$)",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_LIKELY = re.compile(
    r"(?:^|[-_\s])(?:article|articlebody|article-?body|story|storybody|story-?body|body|content|contents|main|maincontent|post"
    r"|postbody|post-?body|entry|entry-?content|text|blog|page-?content|document|documentwrapper|markdown-?body|hentry"
    r"|rst-content|highlight|node)(?:[-_\s]|$)",
    re.IGNORECASE,
)
_UNNAMED = frozenset(("body", "html", "a", "span", "code", "tt"))  # names of these say nothing
MAIN_SHARE, PART_COST = 0.5, 40.0
_CONTENT_NAME = re.compile(  # names that are seldom given to anything else
    r"(?:^|[-_\s])(?:article|articlebody|article-?body|story-?body|body|main|maincontent|entry-?content|page-?content|hentry"
    r"|highlight)(?:[-_\s]|$)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?…:;。！？؟।][\"'”’»)\]]*\s*$")
_PAUSES = re.compile(r"[,;،、，.!?。！？]")
_BOILERPLATE_TEXT = re.compile(
    r"^(?:share|tweet|print|email|advertis\w+|sponsored|read more|continue reading|related|follow us|subscribe|sign up"
    r"|log in|copyright|©|all rights reserved|comments?|leave a reply|tags?:|filed under|posted (?:in|on|by)|previous"
    r"|next|skip to|back to top|loading|click here|view comments|photo:|more:|topics:)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """max_page_bytes, max_record_bytes: larger ones are refused.  min_characters: shorter results count as empty.

    keep_alt: see blocks_of.  source: written into the documents that do not name one.
    """

    max_page_bytes: int = 16 << 20
    max_nodes: int = 2_000_000
    min_characters: int = 40
    keep_alt: bool = True
    max_record_bytes: int = MAX_RECORD_BYTES
    source: str = "web"


@dataclass(frozen=True, slots=True)
class Extraction:
    """text: the main content, "" if there is none, then `reason` says why.  title: of the page.

    code_share: share of the text's characters that the page marks as code.  num_formulas: formulas found as maths.
    """

    text: str
    title: str
    reason: str = ""
    code_share: float = 0.0
    num_formulas: int = 0


def extract(html: str | bytes, config: ExtractConfig | None = None, *, http_charset: str = "") -> Extraction:
    """The main content of one page as plain text.

    html: text, or bytes that are decoded by byte order mark, `http_charset`, <meta charset>.
    Returns: paragraphs separated by blank lines, items and table rows on lines of their own, cells by tabs, code as it
    stands, formulas as TeX between dollars. Never raises for a page: `reason` is empty_page, page_too_large,
    nested_too_deep, too_many_nodes, mostly_links or too_short.
    """
    config = config or ExtractConfig()
    if len(html) > config.max_page_bytes:
        return Extraction("", "", "page_too_large")
    page = decode_html(html, http_charset) if isinstance(html, bytes) else html
    if not page.strip():
        return Extraction("", "", "empty_page")
    try:
        tree = parse_html(page, max_nodes=config.max_nodes)
        blocks = _content(tree, config)
        if _text_length(blocks) < config.min_characters:
            tree = parse_html(page, max_nodes=config.max_nodes, keep_hidden=True)
            blocks = _content(tree, config)
    except PageError as error:
        return Extraction("", "", error.reason)
    length = _text_length(blocks)
    if length >= config.min_characters:
        code_share = sum(block.code_length for block in blocks) / length
        num_formulas = sum(block.num_formulas for block in blocks)
        return Extraction(join_blocks(blocks), tree.title, "", round(min(1.0, code_share), 4), num_formulas)
    has_blocks = _text_length(blocks_of(tree, keep_alt=False)) >= config.min_characters
    return Extraction("", tree.title, "mostly_links" if has_blocks else "too_short")


def _text_length(blocks: list[Block]) -> int:
    return sum(block.length for block in blocks)


def _content(tree: FlatTree, config: ExtractConfig) -> list[Block]:
    blocks = blocks_of(tree, keep_alt=config.keep_alt)
    if not blocks:
        return []
    priors = _priors(tree, blocks)
    scores = [_score(block, priors[block.node], tree) for block in blocks]
    sums = _subtree_sums(tree, blocks, scores)
    top = max(range(len(sums)), key=lambda index: (sums[index], index))  # the deepest of equals
    return _trimmed(
        [
            block
            for block, score in zip(blocks, scores, strict=True)
            if top <= block.node < tree.ends[top] and _is_kept(block, score, sums, tree, top)
        ]
    )


def _priors(tree: FlatTree, blocks: list[Block]) -> list[int]:
    """For every entry +1 inside a container named like content, -1 inside one named like boilerplate, else 0.

    A container that holds MAIN_SHARE of the page's sentences is content, whatever its name.
    """
    sentences = [max(0.0, _score(block, 0, tree)) for block in blocks]
    mass = _subtree_sums(tree, blocks, sentences)
    main = MAIN_SHARE * mass[0]
    priors = [0] * len(tree)
    for index, attributes in enumerate(tree.attributes):
        parent, tag = tree.parents[index], tree.tags[index]
        prior = priors[parent] if parent >= 0 else 0
        if tag and prior >= 0:
            if tag in ("article", "main") or attributes.get("itemprop") == "articleBody":
                prior = 1
            elif attributes and tag not in _UNNAMED:
                names = f"{attributes.get('class') or ''} {attributes.get('id') or ''}"
                if names != " ":
                    unlikely, surely, likely = _name_kinds(names)
                    if unlikely:
                        prior = prior if surely or mass[index] >= main else -1
                    elif likely:
                        prior = prior or 1
        priors[index] = prior
    return priors


@lru_cache(maxsize=1 << 14)
def _name_kinds(names: str) -> tuple[bool, bool, bool]:
    """Whether class names and id are those of boilerplate, of nothing but content, of content."""
    names = _CAMEL.sub("-", names)
    return bool(_UNLIKELY.search(names)), bool(_CONTENT_NAME.search(names)), bool(_LIKELY.search(names))


def _score(block: Block, prior: int, tree: FlatTree) -> float:
    """Positive for content, negative for boilerplate, in characters."""
    length, links = block.length, block.link_length
    if block.kind == "code":
        return 0.5 * length if prior < 0 else length
    ratio = min(1.0, links / length)
    score = length * (1.0 - 2.5 * ratio)
    if block.kind == "heading":
        return 2.0 if ratio < 0.6 and prior >= 0 else -10.0
    if 2 * block.code_length > length:
        score = 0.5 * length * (1.0 - ratio)  # signatures and names, seldom sentences, often linked
    else:
        score = _sentence_score(block, score, tree.tags[block.node] == "p")
    if length < 200 and _BOILERPLATE_TEXT.search(block.text):
        score = min(score, 0.0) - 20.0
    if prior < 0:
        score = -0.3 * length - 10
    return score


def _sentence_score(block: Block, score: float, is_paragraph: bool) -> float:
    """`score` raised for text with sentence ends and pauses, lowered for short text without."""
    ends_well = _SENTENCE_END.search(block.text) is not None
    num_pauses = len(_PAUSES.findall(block.text))
    if not ends_well and (block.length < 30 or (block.length < 120 and _is_numbers(block))):
        return min(score, 0.0) - 6.0
    if block.length < 90 and not ends_well and num_pauses == 0:
        return 0.2 * score - 2.0 if score > 0 else score - 10.0
    return 1.2 * score if score > 0 and (is_paragraph or num_pauses >= 2) else score


def _is_numbers(block: Block) -> bool:
    """Whether a text is dates, versions and figures rather than words or formulas."""
    return "$" not in block.text and sum(map(str.isalpha, block.text)) < 0.6 * block.length


def _subtree_sums(tree: FlatTree, blocks: list[Block], scores: list[float]) -> list[float]:
    """For every entry the sum of the scores below it; a bad part, which can be cut out, costs at most PART_COST."""
    sums = [0.0] * len(tree)
    for block, score in zip(blocks, scores, strict=True):
        sums[block.node] += score
    for index in range(len(tree) - 1, 0, -1):
        sums[tree.parents[index]] += max(sums[index], -PART_COST)
    return sums


def _trimmed(blocks: list[Block]) -> list[Block]:
    """`blocks` without the names, dates and links before the first sentence and behind the last one."""
    room = 0.15 * _text_length(blocks)
    first, last = 0, len(blocks)
    while first < last and _is_weak(blocks[first]) and blocks[first].length < room:
        room -= blocks[first].length
        first += 1
    while first < last and (blocks[last - 1].kind == "heading" or _is_weak(blocks[last - 1])):
        last -= 1
        room -= blocks[last].length
        if room < 0:
            last += 1
            break
    return blocks[first:last]


def _is_weak(block: Block) -> bool:
    if block.length >= 90 or block.kind in ("heading", "code") or 2 * block.code_length > block.length:
        return False
    return "$" not in block.text and _SENTENCE_END.search(block.text) is None


def _is_kept(block: Block, score: float, sums: list[float], tree: FlatTree, top: int) -> bool:
    if block.kind == "code":
        return True
    node = block.node
    while node > top:
        if sums[node] < -15 or (sums[node] < 0 and tree.tags[node] in ("ul", "ol", "table", "div", "section")):
            return False
        node = tree.parents[node]
    return score > -15 or (block.kind == "heading" and score > -5)


def extract_shard(inputs: list[Path], out: Path, config: ExtractConfig) -> dict[str, Any]:
    """Stage: raw files to out/documents.jsonl.zst; what gave none goes to out/dropped.jsonl.zst with its reason.

    Inputs of any kind that sources.py reads; documents that are text already pass through with a source set.
    """
    counters: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    with DocumentWriter(out / "documents.jsonl.zst") as writer, DocumentWriter(out / "dropped.jsonl.zst") as refuse:

        def drop(record: str, url: str, reason: str, detail: str) -> None:
            dropped[reason] += 1
            meta = {"detail": detail} if detail else {}
            document = Document(
                id=document_id(record), text="", url=url, source=config.source, record=record, meta=meta
            )
            refuse.write(document, reason=reason)

        def on_bad(bad: BadRecord) -> None:
            counters["docs_in"] += 1
            drop(bad.record, "", bad.reason, bad.detail)

        for path in inputs:
            for item in read_records(path, on_bad=on_bad, max_record_bytes=config.max_record_bytes):
                counters["docs_in"] += 1
                if isinstance(item, Document):
                    writer.write(item if item.source else replace(item, source=config.source))
                    continue
                counters["html_bytes"] += len(item.content)
                document = _document(item, config)
                if isinstance(document, str):
                    drop(item.record, item.url, document, "")
                else:
                    writer.write(document)
    counts = {"docs_out": writer.num_documents, "text_bytes": writer.text_bytes}
    return {**counters, **counts, "dropped": dict(sorted(dropped.items()))}


def _document(page: RawPage, config: ExtractConfig) -> Document | str:
    """The document of a page, or the reason why there is none."""
    found = extract(page.content, config, http_charset=page.charset)
    if not found.text:
        return found.reason
    meta = {"title": found.title, "code_share": found.code_share, "formulas": found.num_formulas}
    return Document(
        id=document_id(page.url, page.record, found.text),
        text=found.text,
        url=page.url,
        source=config.source,
        timestamp=page.timestamp,
        record=page.record,
        meta={key: value for key, value in meta.items() if value},
    )
