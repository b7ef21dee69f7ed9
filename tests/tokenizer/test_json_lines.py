"""The kernel that reads JSON lines must read what Python's json does, or leave the line to it."""

import json
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdkern import _text
from herdkern.data.document import BadRecord, document_of_line
from herdkern.tokenizer import WordCounts, iter_counts
from herdkern.tokenizer.counts_file import write_counts_file
from herdkern.tokenizer.pretokenize import make_splitter


def count_lines(content, folder, num_threads=1, cuts=()):
    """(word counts, lines left) of a file given in pieces."""
    counter = _text.BudgetCounter(make_splitter("llama3"), 1 << 62, str(folder), num_threads)
    borders = [0, *sorted(cuts), len(content)]
    left = []
    for begin, end in pairwise(borders):
        left += counter.add_json_lines([content[begin:end]], "text", False)
    left += counter.add_json_lines([], "text", True)

    def finish(descriptor, begin):
        return counter.finish(descriptor, "", begin, lambda: 1 << 20, str(folder), None)

    write_counts_file(folder / "counts", (), "", finish)
    return dict(iter_counts(folder / "counts")), left


def check(content, folder, **options):
    """Every line is either counted as Python reads it, or left. Returns the lines left."""
    counted, left = count_lines(content, folder, **options)
    numbers = {number for number, _ in left}
    expected = WordCounts()
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if number in numbers or not line.strip():
            continue
        document = document_of_line(line, folder, number)
        assert not isinstance(document, BadRecord), f"the kernel accepts what Python refuses: {line!r}"
        expected.add(document.text)
    assert counted == dict(expected.items())
    assert [line for _, line in left] == [lines[number - 1] for number, _ in left]
    return left


GOOD = [
    b'{"text": "a b"}',
    b' \t{ "text" : "a\\nb\\t\\u00e9\\ud83d\\ude00\\/\\\\\\"" } \r',
    '{"id": "x", "text": "größer 中文 😀", "meta": {"a": [1, -2.5e+10, true, false, null, {"b": []}]}}'.encode(),
    b'{"text": "first", "text": "last"}',
    b'{"text": ""}',
    b'{"a": {"text": "inner"}, "text": "outer"}',
    b"",
    b" \x0c\x0b",
]
LEFT = [
    b'{"text": "a\\ud800b"}',
    b'{"text": "\\ud83d\\u0041"}',
    b'{"te\\u0078t": "a"}',
    b'{"text": "a", "n": NaN}',
    b'{"text": "a", "n": -Infinity}',
    b'{"text": "a", "n": ' + b"[" * 100 + b"]" * 100 + b"}",
    b'{"text": "a", "n": ' + b"1" * 5000 + b"}",
    b'{"text": null}',
    b"{}",
    b'["text"]',
    b'{"text": "a"} x',
    b'{"text": "a",}',
    b'{"text": "a", "n": 01}',
    b'{"text": "a", "n": 1.}',
    b'{"text": "a", "n": +1}',
    b'{"text": "a", "n": tru}',
    b'{"text": "a\tb"}',
    b'{"text": "\\x"}',
    b'{"text": "\\u12"}',
    b'{"text": "a"',
    b'{"text": "a\\',
    b'{"text": "\xc0\x80"}',
    b'{"text": "\xed\xa0\x80"}',
    b'{"text": "\xf4\x90\x80\x80"}',
    b'{"text": "a", "text": 1}',
    b'{"text" "a"}',
    b'{"n": "a" "b"}',
    b"\x00",
]


def test_lines_that_are_read(tmp_path):
    content = b"\n".join(GOOD) + b"\n"
    assert check(content, tmp_path) == []
    assert check(b"\xef\xbb\xbf" + content[:-1], tmp_path, cuts=(1, 2, 40, 41)) == []


@pytest.mark.parametrize("line", LEFT, ids=repr)
def test_lines_that_are_left_to_python(tmp_path, line):
    assert check(b'{"text": "a"}\n' + line + b'\n{"text": "b"}', tmp_path) == [(2, line)]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a", "é"]), inner, max_size=3),
    max_leaves=6,
)
objects = st.fixed_dictionaries({}, optional={"a": values, "text": st.text(max_size=40) | values, "b\n": values})


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(objects, st.booleans(), st.integers(0, 3), st.integers(0, 1 << 20)), max_size=5),
    st.randoms(use_true_random=False),
)
def test_random_lines(tmp_path_factory, rows, rng):
    lines = []
    for value, ascii_only, damage, place in rows:
        try:
            line = bytearray(json.dumps(value, ensure_ascii=ascii_only).encode())
        except UnicodeEncodeError:
            continue
        if damage == 0 and line:  # one byte altered, often into something that matters to JSON
            line[place % len(line)] = rng.choice(b'{}[]",:\\u0\x00\x80\xff' + bytes([rng.randrange(256)]))
        lines.append(bytes(line).replace(b"\n", b" "))
    content = b"\n".join(lines)
    cuts = [rng.randrange(len(content) + 1) for _ in range(2)]
    check(content, tmp_path_factory.getbasetemp(), cuts=cuts)


def test_threads_and_long_lines(tmp_path):
    rng = random.Random(1)
    texts = ["".join(rng.choices('ab é\n"', k=rng.choice([5, 500, 400_000]))) for _ in range(40)]
    content = "".join(json.dumps({"text": text}, ensure_ascii=i % 2) + "\n" for i, text in enumerate(texts)).encode()
    content += b"oops\n"
    assert check(content, tmp_path, num_threads=3) == [(41, b"oops")]
    assert check(content, tmp_path, num_threads=2, cuts=(1000, 2_000_000)) == [(41, b"oops")]
