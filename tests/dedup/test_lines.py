import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from herdkern.data.document import Document, read_documents, write_documents
from herdkern.dedup import LineDedupConfig, dedup_lines
from herdkern.dedup.lines import is_code_or_formula, line_keys, num_buckets
from herdkern.engine import Run

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def word(number):
    """A word of letters alone: digits all count as 0."""
    return "".join(chr(97 + int(digit)) for digit in str(number))


def run_lines(folder, shards, config):
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, shard in enumerate(shards):
        paths.append(folder / f"in-{number}.jsonl.zst")
        write_documents(paths[-1], shard)
    with Run(folder / "run") as run:
        result = dedup_lines(run, paths, config)
    kept = [d for path in result.files("documents.jsonl.zst") for d in read_documents(path)]
    dropped = [d for path in result.files("dropped.jsonl.zst") for d in read_documents(path)]
    return result, kept, dropped


def planted(rng, num_documents=200):
    """Documents of their own lines plus lines planted exactly 1 to 12 times, spread at random."""
    lines = [[f"own line {word(i)} {word(j)} of this document" for j in range(5)] for i in range(num_documents)]
    for count in range(1, 13):
        for number in range(10):
            for _ in range(count):
                where = lines[int(rng.integers(num_documents))]
                variants = ["Planted: {} {}", "planted {} {}!", "  PLANTED,  {} — {} "]
                text = variants[int(rng.integers(3))].format(NUMBERS[count], word(number))
                where.insert(int(rng.integers(len(where) + 1)), text)
    return [Document(id=f"{i:04d}", text="\n".join(ls), lang="en") for i, ls in enumerate(lines)]


@pytest.mark.parametrize("max_count", [1, 6, 11])
@pytest.mark.parametrize("num_partitions", [1, 5])
def test_counts_are_exact(tmp_path, max_count, num_partitions):
    rng = np.random.default_rng(max_count)
    documents = planted(rng)
    documents = [documents[i] for i in rng.permutation(len(documents))]
    config = LineDedupConfig(max_count=max_count, num_partitions=num_partitions)
    result, kept, dropped = run_lines(tmp_path, [documents[:70], documents[70:75], documents[75:]], config)
    left = Counter()
    for document in kept:
        for line in document.text.split("\n"):
            words = line.lower().replace("—", " ").replace("planted:", "planted").replace("planted,", "planted").split()
            if words[0] == "planted":
                left[words[1]] += 1
            else:
                left["own"] += 1
    expected = {NUMBERS[count]: 10 * count for count in range(1, max_count + 1)}
    assert left == {"own": 5 * len(documents), **expected}
    assert dropped == []
    assert result.counters["lines_removed"] == sum(10 * count for count in range(max_count + 1, 13))


def test_buckets_are_independent(tmp_path):
    documents = [Document(id=f"{i:05d}", text=f"repeated line\nown {word(i)} line") for i in range(40)]
    config = LineDedupConfig(bucket_size=10, max_count=9)
    _, kept, _ = run_lines(tmp_path, [documents], config)
    assert num_buckets(40, 10) == 4
    import hashlib

    buckets = defaultdict(list)
    for document in kept:
        digest = hashlib.blake2b(document.id.encode(), digest_size=8).digest()
        buckets[int.from_bytes(digest, "little") % 4].append("repeated" in document.text)
    assert sum(map(len, buckets.values())) == 40
    for present in buckets.values():
        assert all(present) if len(present) <= 9 else not any(present)
    assert {len(present) > 9 for present in buckets.values()} == {True, False}


@pytest.mark.parametrize(("documents", "buckets"), [(0, 1), (14, 1), (15, 2), (19, 2), (24, 2), (25, 3), (100, 10)])
def test_number_of_buckets(documents, buckets):
    assert num_buckets(documents, 10) == buckets


def test_languages_are_counted_apart(tmp_path):
    documents = [Document(id=f"{i}", text=f"same line\nown {word(i)}", lang="en" if i % 2 else "de") for i in range(8)]
    _, kept, _ = run_lines(tmp_path / "apart", [documents], LineDedupConfig())
    assert all("same line" in d.text for d in kept)
    _, kept, _ = run_lines(tmp_path / "together", [documents], LineDedupConfig(within_language=False))
    assert not any("same line" in d.text for d in kept)


def test_documents_or_occurrences_may_be_counted(tmp_path):
    documents = [Document(id=f"{i}", text=f"again and again\nagain and again\nown {word(i)}") for i in range(4)]
    _, kept, _ = run_lines(tmp_path / "occurrence", [documents], LineDedupConfig())
    assert not any("again" in d.text for d in kept)
    _, kept, _ = run_lines(tmp_path / "document", [documents], LineDedupConfig(count="document"))
    assert all("again" in d.text for d in kept)


def test_order_and_shards_do_not_matter(tmp_path):
    documents = planted(np.random.default_rng(9), 90)
    wanted = None
    for number in range(3):
        order = np.random.default_rng(number).permutation(len(documents))
        shards = [[documents[i] for i in part] for part in np.array_split(order, number + 1)]
        config = LineDedupConfig(num_partitions=number + 1, bucket_size=60)
        _, kept, _ = run_lines(tmp_path / str(number), shards, config)
        result = sorted((d.id, d.text) for d in kept)
        wanted = wanted or result
        assert result == wanted


def test_a_document_with_nothing_left_is_dropped_with_the_reason(tmp_path):
    documents = [Document(id=f"{i}", text="Home\n\nContact us\n") for i in range(7)]
    documents += [Document(id="x", text="Home\nA page of its own\n\nContact us")]
    result, kept, dropped = run_lines(tmp_path, [documents], LineDedupConfig())
    assert [d.text for d in kept] == ["A page of its own"]
    assert kept[0].meta == {"lines_removed": 2}
    assert [d.meta["reason"] for d in dropped] == ["duplicate_lines"] * 7
    assert dropped[0].text == "Home\n\nContact us\n"
    assert result.counters["dropped"] == {"duplicate_lines": 7}
    removed = (tmp_path / "run/data/dedup_lines/task-00000/removed_lines.jsonl").read_text().splitlines()
    assert removed == ['{"line": "Contact us", "count": 8}', '{"line": "Home", "count": 8}']


def test_a_document_that_loses_too_much_may_be_dropped(tmp_path):
    documents = [Document(id=f"{i}", text=f"the same long line in every one of these\n{word(i)}") for i in range(8)]
    _, kept, dropped = run_lines(tmp_path, [documents], LineDedupConfig(min_kept_share=0.5))
    assert kept == []
    assert len(dropped) == 8
    assert dropped[0].meta["share_removed"] > 0.9


def test_blank_lines_close_over_a_gap_and_stay_elsewhere(tmp_path):
    page = "Top\n\n\nfirst {0}\n\nSkip this\n\nsecond {0}\n\n\nthird {0}\n\nEnd"
    documents = [Document(id=f"{i}", text=page.format(word(i))) for i in range(7)]
    _, kept, _ = run_lines(tmp_path, [documents], LineDedupConfig())
    assert kept[0].text == "first a\n\nsecond a\n\n\nthird a"


CODE = [
    "    return x", "\tx", "name\tvalue", "}", "foo();", "if x == 1:", "for i in range(3):", "import os", "def f(a):",
    "class A:", "x = y", "@property", "#include <a.h>", ">>> f(1)", "return f(x)", "else:", "a -> b", "std::vector",
    "$a^2 + b^2$", "\\begin{align}", "\\frac{a}{b}", "// note", "print(x)", "import numpy as np", "import os, sys",
]  # fmt: skip
PROSE = ["Home", "Contact us", "Copyright 2024 Example Ltd.", "We use cookies to improve this site.", "Next | Previous",
         "Share on Facebook", "It costs $5 or $10.", "Read more...", "class of its own", "import duties rose",
         "for example", "If so, try again later.", "Return to top", "Print this page"]  # fmt: skip


@pytest.mark.parametrize("line", CODE)
def test_lines_of_code_and_formulas_are_known(line):
    assert is_code_or_formula(line)


@pytest.mark.parametrize("line", PROSE)
def test_prose_and_boilerplate_are_not_taken_for_code(line):
    assert not is_code_or_formula(line)


def test_a_long_line_with_one_dollar_is_read_once():
    assert is_code_or_formula("$" + "x=" * 1_000_000) is False  # in square time this would take hours
    assert is_code_or_formula("cost $5 or $x_1$") is True


def test_code_and_formulas_survive_unless_asked(tmp_path):
    documents = [Document(id=f"{i}", text="\n".join([*CODE, *PROSE, f"own {word(i)}"])) for i in range(9)]
    _, kept, _ = run_lines(tmp_path / "aware", [documents], LineDedupConfig())
    assert all(d.text.split("\n") == [*CODE, f"own {word(int(d.id))}"] for d in kept)
    _, kept, _ = run_lines(tmp_path / "blunt", [documents], LineDedupConfig(code_aware=False))
    assert all(d.text.split("\n") == ["}", f"own {word(int(d.id))}"] for d in kept)  # a line without words never counts


def test_source_code_documents_stay_untouched(tmp_path):
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    documents = [Document(id=p.name, text=p.read_text(encoding="utf-8"), source="code") for p in files]
    result, kept, _ = run_lines(tmp_path, [documents], LineDedupConfig())
    assert [d.text for d in kept] == [d.text for d in documents]
    assert result.counters["lines_removed"] == 0


def test_equal_lines_have_equal_keys():
    keys = line_keys(["Page 12 of 99\npage 34, of 10!\n  PAGE  55 OF 71\npage one of two\n---\n"])[0]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert keys[4] == keys[5] == 0
    assert [len(k) for k in line_keys(["", "a", "a\n", "\n\n"])] == [1, 1, 2, 3]


def test_no_documents(tmp_path):
    _, kept, dropped = run_lines(tmp_path, [[], []], LineDedupConfig())
    assert kept == dropped == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_count": 0}, "max_count must be at least 1, got 0"),
        ({"bucket_size": 0}, "bucket_size must be at least 1, got 0"),
        ({"count": "both"}, "count must be 'occurrence' or 'document', got 'both'"),
        ({"min_kept_share": 1.5}, r"min_kept_share must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LineDedupConfig(**arguments)
