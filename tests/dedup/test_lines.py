import hashlib
import os
import random
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import line_twin as twin
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdkern import _text
from herdkern.data.document import Document, read_documents, write_documents
from herdkern.dedup import LineDedupConfig, dedup_lines
from herdkern.dedup.lines import is_code_or_formula, line_keys, num_buckets, remove_frequent_lines
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
        ({"keep_first": 7}, r"keep_first must lie in \[0, max_count=6\], got 7"),
        ({"max_memory": 1}, "max_memory must be at least 1 MiB in bytes, got 1"),
        ({"num_partitions": 257}, "num_partitions must be at most 256, got 257"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LineDedupConfig(**arguments)


LEVELS = [level for level in ("avx512", "avx2", "baseline") if level in _text.minhash_levels()]
NASTY = [
    "", "\n", "a", " a ", "--a--", "a\n", "\na", "- a -\n - b - ", "one  two\tthree", "x" * 63, "x" * 64, "x" * 65,
    "a " * 400, "Straße – ÄÖÜ, Ελληνικά ΣΑΣ; Русский Текст! Հայերեն", "é" * 70, "x" + "é" * 70, "日本語abc日本語 かな",
    "a漢b字c" * 30, "ไทย ภาษา", "中文，标点。中文", "\u2003wide\u3000space\xa0here", "e\u0301a\u0308", "٣ ۴ 5 ६",
    "emoji 😀 and 𝒳 𐍈", "_ __ _a", "x" * 61 + "中" + "y" * 80, "x" * 62 + "é" + " " * 70 + "z",
    "x" * 63 + "…" + "y\n" * 5, ("word, " * 11 + "\n") * 40, "a" * 70_000, ("中" * 30_000) + " b", " " * 200 + "end",
    "İ ſ K Å", "\x00\x01a\x7f",
]  # fmt: skip


def twin_keys(data):
    return twin.line_keys(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("number", range(len(NASTY)))
def test_keys_equal_the_plain_definition(number):
    text = NASTY[number]
    variants = [
        text,
        text.upper(),
        f"{text}\n{text.swapcase()}\n\n 12:30, 7 files\n{text}",
        "…" + text,
        "ab" * 20 + text,
    ]
    for level in LEVELS:
        for variant in variants if len(text) < 5000 else variants[:1]:
            assert _text.line_keys([variant], 1, level)[0].tolist() == twin_keys(variant), level


PIECES = st.sampled_from(
    [*"aZ09_ -.,\n\n\t", "é", "Ж", "Σ", "…", "“", "中", "の", "ก", "\u0301", "😀", "\xa0", "word ", "    "]
)


@given(st.lists(PIECES, max_size=300).map("".join))
@settings(max_examples=300, deadline=None)
def test_keys_of_mixed_scripts_equal_the_plain_definition(text):
    wanted = twin_keys(text)
    for level in LEVELS:
        assert _text.line_keys([text], 1, level)[0].tolist() == wanted, level


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_keys_of_any_bytes_are_the_same_on_every_level(data):
    keys = [_text.line_keys([data], 1, level)[0].tolist() for level in LEVELS]
    assert keys.count(keys[0]) == len(keys)
    assert len(keys[0]) == data.count(b"\n") + 1


def library_texts(num_files):
    folder = Path(os.__file__).parent
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))[:num_files]]


def test_threads_and_levels_do_not_change_real_keys():
    texts = library_texts(40)
    wanted = _text.line_keys(texts, 1, "baseline")
    for level in LEVELS:
        for num_threads in (1, 2, 5):
            for got, expected in zip(_text.line_keys(texts, num_threads, level), wanted, strict=True):
                np.testing.assert_array_equal(got, expected)


def test_an_unknown_level_and_a_text_of_another_type_are_named():
    with pytest.raises(ValueError, match="level must be auto or one of"):
        _text.line_keys(["a"], 1, "avx9")
    with pytest.raises(TypeError, match="every text must be str or bytes, got int at index 1"):
        line_keys(["a", 5])


def test_a_lone_surrogate_has_a_key():
    assert len(line_keys(["a \ud800 b\nc"])[0]) == 2


@pytest.mark.parametrize("num_partitions", [1, 7])
@pytest.mark.parametrize("by_document", [False, True])
def test_counts_equal_a_counter(num_partitions, by_document):
    rng = np.random.default_rng(5)
    keys = rng.integers(0, 3000, 40_000).astype(np.uint64) ** np.uint64(3)  # 0 is among them
    keys[rng.random(len(keys)) < 0.2] = 77  # above 4,095, where a slot's own count ends
    begins = np.sort(np.concatenate([[0, len(keys)], rng.integers(0, len(keys), 300)]))
    salts = rng.integers(0, 3, len(begins) - 1).astype(np.uint64)
    wanted = Counter()
    for salt, begin, end in zip(salts.tolist(), begins[:-1], begins[1:], strict=True):
        some = keys[begin:end][keys[begin:end] != 0].tolist()
        wanted.update((salt, key) for key in (set(some) if by_document else some))
    for num_passes in (1, 3):
        got = {}
        salted, origins, parts = _text.partition_lines(keys, begins, salts, by_document, num_partitions)
        assert sorted(origins.tolist()) == np.flatnonzero(keys).tolist()
        for part in range(num_partitions):
            ours = salted[parts[part] : parts[part + 1]]
            our_origins = origins[parts[part] : parts[part + 1]]
            assert (np.diff(our_origins.astype(np.int64)) > 0).all()
            for number in range(part * num_passes, (part + 1) * num_passes):
                table = _text.LineCounts(number, number + 1, num_partitions * num_passes)
                for piece in np.array_split(ours, 3):
                    table.add(piece)
                places, counts = table.find_frequent(ours, 0)
                documents = np.searchsorted(begins, our_origins[places], side="right") - 1
                for place, document, count in zip(our_origins[places], documents, counts.tolist(), strict=True):
                    assert got.setdefault((int(salts[document]), int(keys[place])), count) == count
                assert table.num_keys() == len({int(k) & ~1 for k in ours[places]})
                for limit in (0, 6, 4095, 5000):
                    some = {int(ours[p]) & ~1 for p in table.find_frequent(ours, limit)[0]}
                    assert table.num_frequent(limit) == len(some)
        assert got == wanted


def test_a_distinct_line_takes_at_most_sixteen_bytes():
    rng = np.random.default_rng(0)
    keys = rng.integers(1, 1 << 63, 600_000, dtype=np.uint64) << np.uint64(1)
    for share in (0.2, 0.35, 0.6, 1.0):
        table = _text.LineCounts(0, 1, 1, len(keys))
        table.add(keys[: int(share * len(keys))])
        assert table.num_keys() == int(share * len(keys))
        assert table.table_bytes() <= 16 * table.num_keys()


def test_what_is_a_letter_and_what_is_space_is_as_in_python():
    """Of every code point that this Python's Unicode has assigned."""
    assigned = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Cs")]
    words = _text.is_code_or_formula([c + "()" for c in assigned])
    spaces = _text.is_code_or_formula([";" + c for c in assigned])
    wrong = [
        c for c, found in zip(assigned, words, strict=True) if found != bool(re.match(r"\w", c)) and c not in "\t\\"
    ]
    newer = [c for c in wrong if unicodedata.category(c)[0] not in "LN"]
    assert not newer, newer[:20]
    assert len(wrong) < 10, wrong[:20]
    blank = [c for c, found in zip(assigned, spaces, strict=True) if found]
    assert blank == [c for c in assigned if re.match(r"\s", c) or c in ";{}"]


FRAGMENTS = [
    "import ", "import os", " as x", ",", "from ", "from a.b", " import ", "def ", "f(", "class ", "C:", "@", "@f",
    "#include", "#!", "//", "/*", "*/", "<?", "<!--", ">>> ", "... ", "$ ", "return", "elif", "except", "raise",
    "assert", "yield", "print", "if", "for", "while", "with", "try", "else", ":", "(", ")", "[", "]", "{", "}", ";",
    "=", " = ", "==", "!", "-", ">", "+", "&", "|", "\\", "$", "^", "_", "<", " ", "  ", "    ", "\t", "\r", "\x1c",
    "\x85", "\xa0", "\u3000", "a", "Z", "9", "é", "中", "٣", "½", "\u0301", "…", "😀", ".", "x = y", "a()", "b[1]",
    "b[]", "\\alpha", "\\(", "word",
]  # fmt: skip


def code_torture(seed, num_lines):
    rng = random.Random(seed)
    lines = ["".join(rng.choice(FRAGMENTS) for _ in range(rng.randint(0, 7))) for _ in range(num_lines)]
    for line, found in zip(lines, _text.is_code_or_formula(lines).tolist(), strict=True):
        assert found == twin.is_code_or_formula(line), repr(line)
    return lines


def test_code_is_known_as_by_the_regular_expressions():
    lines = code_torture(1, 20_000)
    share = _text.is_code_or_formula(lines).mean()
    assert 0.2 < share < 0.9
    real = [line for text in library_texts(25) for line in text.split("\n")]
    assert _text.is_code_or_formula(real).tolist() == [twin.is_code_or_formula(line) for line in real]


@pytest.mark.full
def test_code_is_known_as_by_the_regular_expressions_at_length():
    for seed in range(10):
        code_torture(100 + seed, 200_000)


def bucket_and_hash(document, buckets=1):
    value = int.from_bytes(hashlib.blake2b(document.id.encode(), digest_size=8).digest(), "little")
    return value % buckets, value


LINES = [
    "Home",
    "home!",
    "  HOME  ",
    "Contact us",
    "Page 1",
    "page 2.",
    "foo();",
    "foo",
    "",
    " ",
    "\u3000",
    "—",
    "中文 菜单",
    "x = y",
    "X Y",
]


def random_documents(seed, number, own=True):
    rng = random.Random(seed)
    documents = []
    for i in range(number):
        lines = [rng.choice(LINES) for _ in range(rng.randint(0, 12))] + [f"own {word(i)}"] * own
        rng.shuffle(lines)
        documents.append(Document(id=f"d{i:04d}", text="\n".join(lines)))
    return documents


@pytest.mark.parametrize("count", ["occurrence", "document"])
@pytest.mark.parametrize("keep_first", [0, 1, 3])
@pytest.mark.parametrize("code_aware", [True, False])
def test_everything_equals_the_plain_definition(tmp_path, count, keep_first, code_aware):
    documents = random_documents(3, 60)
    config = LineDedupConfig(
        max_count=9, bucket_size=20, count=count, keep_first=keep_first, code_aware=code_aware, num_partitions=3
    )
    wanted, went = twin.dedup(documents, lambda d: bucket_and_hash(d, 3), config)
    for number in range(3):
        random.Random(number).shuffle(documents)
        shards = [documents[i :: number + 1] for i in range(number + 1)]
        result, kept, dropped = run_lines(tmp_path / str(number), shards, config)
        assert {d.id: d.text for d in kept} == {k: text for k, text in wanted.items() if text.strip()}
        assert result.counters["lines_removed"] == went.total() > 0
        assert sorted(d.id for d in dropped) == sorted(
            k for k, text in wanted.items() if not text.strip() and text is not None
        )
        assert result.counters["bytes_in"] == sum(len(d.text.encode()) for d in documents)


def test_exactly_the_first_stay(tmp_path):
    documents = [Document(id=f"{i}", text=f"the same\nown {word(i)}\nthe same") for i in range(8)]
    order = sorted(documents, key=lambda d: bucket_and_hash(d)[1])
    _, kept, _ = run_lines(tmp_path / "occurrence", [documents[:3], documents[3:]], LineDedupConfig(keep_first=3))
    left = {d.id: d.text.count("the same") for d in kept}
    assert [left[d.id] for d in order] == [2, 1, 0, 0, 0, 0, 0, 0]
    config = LineDedupConfig(keep_first=3, count="document")
    _, kept, _ = run_lines(tmp_path / "document", [documents[:3], documents[3:]], config)
    left = {d.id: d.text.count("the same") for d in kept}
    assert [left[d.id] for d in order] == [2, 2, 2, 0, 0, 0, 0, 0]


def test_little_memory_means_more_passes_and_the_same_result(tmp_path):
    rng = random.Random(1)
    lines = [f"{word(i)} {word(i * 7919)}" for i in range(60_000)]
    documents = [
        Document(id=f"{i}", text="\n".join(rng.choices(lines, k=200) + ["often"] * (i % 3))) for i in range(900)
    ]
    results = []
    for number, memory in enumerate((1 << 20, 1 << 30)):
        config = LineDedupConfig(max_memory=memory, num_partitions=2)
        assert (memory < 90_000 * 16) == (number == 0)  # 180,000 lines in two partitions
        result, kept, _ = run_lines(tmp_path / str(number), [documents[:500], documents[500:]], config)
        folders = [task / "removed_lines.jsonl" for task in result.tasks]
        results.append((result.counters, [(d.id, d.text) for d in kept], [path.read_bytes() for path in folders]))
    assert results[0] == results[1]
    assert results[0][0]["lines_removed"] > 900


def test_the_list_of_removed_lines_holds_the_most_frequent(tmp_path):
    documents = []
    for i in range(400):
        lines = [f"line {word(j)} End" for j in range(300) if i < 8 + j]
        documents.append(Document(id=f"{i}", text="\n".join([f"own {word(i)}", *lines])))
    documents.append(Document(id="x", text="LINE a end"))
    _, _, _ = run_lines(tmp_path, [documents], LineDedupConfig())
    removed = (tmp_path / "run/data/dedup_lines/task-00000/removed_lines.jsonl").read_text().splitlines()
    counts = [8 + j for j in range(300)]
    counts[0] += 1
    order = sorted(range(300), key=lambda j: (-counts[j], f"line {word(j)} End"))
    wanted = [f'{{"line": "line {word(j)} End", "count": {counts[j]}}}' for j in order[:200]]
    assert removed == wanted


def test_in_memory_removal_equals_the_plain_definition():
    documents = random_documents(11, 80)
    config = LineDedupConfig()
    wanted, _ = twin.dedup(documents, lambda d: (0, bucket_and_hash(d)[1]), config)
    texts = [d.text for d in documents]
    for num_threads in (1, 2):
        assert remove_frequent_lines(texts, num_threads=num_threads) == [wanted[d.id] for d in documents]
    assert remove_frequent_lines([]) == []
    assert remove_frequent_lines(["a\na"], max_count=1) == [""]
    assert remove_frequent_lines(["a\na"], max_count=1, count="document") == ["a\na"]


def test_removal_refuses_arrays_that_do_not_fit():
    one = np.ones(1, np.uint64)
    with pytest.raises(ValueError, match="counts must hold one entry per line of text 0"):
        _text.remove_lines(["a\nb"], np.array([0, 1]), one, one, True, _text.RemovedLines(1))
    with pytest.raises(ValueError, match="begins must hold one border more"):
        _text.remove_lines(["a"], np.array([0, 2]), one, one, True, _text.RemovedLines(1))
    with pytest.raises(ValueError, match="begins must rise from 0"):
        _text.partition_lines(one, np.array([0, 2]), one, False, 1)


@pytest.mark.full
def test_code_in_other_sources_stays_in_code_aware_mode(tmp_path):
    """Every frequent line of the standard library that looks like code stays although the source is not exempt."""
    documents = [Document(id=str(i), text=text) for i, text in enumerate(library_texts(400))]
    _, kept, _ = run_lines(tmp_path, [documents], LineDedupConfig())
    texts = {d.id: d.text for d in kept}
    for document in documents:
        code = [line for line in document.text.split("\n") if twin.is_code_or_formula(line)]
        assert [line for line in texts[document.id].split("\n") if twin.is_code_or_formula(line)] == code
