from html.parser import HTMLParser

import pytest

from herdkern.report import read_run, write_report
from herdkern.report.html import clean, side_by_side, table, text_block

VOID = {"meta", "img", "br"}


class Tags(HTMLParser):
    """Collects every tag and attribute and checks that the elements nest."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert tags.open == []
    return tags


def test_hostile_text_stays_text(run_dir):
    """Script in prompts, samples, dropped text, URLs, reasons, names, vocabulary and versions is shown, never run."""
    html = write_report(run_dir).read_text(encoding="utf-8")
    tags = parsed(html).tags
    assert not {"script", "img", "iframe", "link", "object", "form", "base"} & {tag for tag, _ in tags}
    assert not [name for _, attrs in tags for name in attrs if name.startswith("on")]
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10
    assert "\x00" not in html
    assert "\x1b" not in html


def test_page_asks_for_nothing_outside_itself(run_dir):
    tags = parsed(write_report(run_dir).read_text(encoding="utf-8")).tags
    references = [attrs[name] for _, attrs in tags for name in ("href", "src", "srcset", "action") if name in attrs]
    assert references
    assert all(reference.startswith("#") for reference in references)
    policy = next(attrs["content"] for tag, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


@pytest.mark.parametrize(
    "anchor", ["summary", "evaluation", "samples", "training", "funnel", "dropped", "duplicates", "tokens"]
)
def test_every_section_is_linked_and_present(run_dir, anchor):
    tags = parsed(write_report(run_dir).read_text(encoding="utf-8")).tags
    assert [attrs for tag, attrs in tags if tag == "h2" and attrs.get("id") == anchor]
    assert [attrs for tag, attrs in tags if tag == "a" and attrs.get("href") == f"#{anchor}"]


def test_annealing_steps_are_marked(run_dir):
    assert ">anneal</text>" in write_report(run_dir).read_text(encoding="utf-8")


def test_same_run_gives_the_same_page(run_dir):
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_clean_shows_control_characters():
    assert clean("a\x00b\x1b\n\tc\x7f") == "a␀b␛\n\tc␡"


def test_text_block_counts_what_it_leaves_out():
    assert "… 90 more characters" in text_block("x" * 100, limit=10)


def test_side_by_side_marks_the_words_that_differ():
    left, right = side_by_side("one two <b> four", "one 2 <b> four")
    assert "<del>two </del>" in left
    assert "<ins>2 </ins>" in right
    assert "&lt;b&gt;" in left
    assert "<b>" not in left + right


def test_table_escapes_cells():
    assert "<td>&lt;i&gt;</td>" in table(["a"], [["<i>"]])


def test_read_run_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"read_run: run_dir must be a run folder .* got "):
        read_run(tmp_path)


def test_a_begun_run_has_a_report(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "early"}')
    html = write_report(tmp_path, tmp_path / "early.html").read_text(encoding="utf-8")
    assert "herdkern · early" in html
