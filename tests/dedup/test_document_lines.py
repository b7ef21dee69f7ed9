"""Lines of documents read and written natively, against what Python reads and writes."""

import json
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdkern import _text
from herdkern.data.document import BadRecord, BadRecordError, document_of_line, read_documents, with_meta
from herdkern.dedup.cluster_stages import DECISION, REASONS
from herdkern.dedup.minhash import shingle_hashes, signatures
from herdkern.dedup.minhash_config import MinHashConfig
from herdkern.dedup.pieces import line_reader
from herdkern.dedup.sign_stage import DOCUMENT

PATH = Path("folder/in é.jsonl")
FIELDS = ("id", "text", "url", "source", "lang", "record", "timestamp", "meta")
CONFIG = MinHashConfig(num_bands=2, rows_per_band=2)


def twin(data):
    """(number, document) of the lines of a file, or the message of the first that is none; the Python path."""
    documents = []
    for number, line in enumerate(data.split(b"\n"), 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        document = document_of_line(line, PATH, number)
        if isinstance(document, BadRecord):
            return str(BadRecordError(document))
        documents.append(document)
    return documents


class Reader:
    """What the native readers ask; counts how often."""

    def __init__(self):
        self.name, self.read = line_reader(PATH)
        self.lines = []

    def __call__(self, line, number):
        self.lines.append(line)
        return self.read(line, number)


def pieces_of(data, cuts):
    borders = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(borders)]
    return [*((piece, False) for piece in pieces), (b"", True)]


def sign(data, cuts=(), reader=None):
    reader = reader or Reader()
    signer = _text.DocumentColumns(CONFIG.sign_plan, "score", True, reader.name, reader)
    for piece, last in pieces_of(data, cuts):
        signer.scan(piece, last)
    rows, names, signed = signer.take()
    return rows.view(DOCUMENT).reshape(-1), names, signed


def deal(data, rows, drops=(), cuts=(), names=None):
    """(lines that stay, lines that go); drops: (row, decision)."""
    reader = Reader()
    dealer = _text.DocumentDealer(rows["is_plain"].astype(np.uint8), True, reader.name, reader)
    if drops:
        decisions = np.array([decision for _, decision in drops], DECISION)
        reasons = [REASONS.get(number, "") for number in range(4)]
        places = np.array([row for row, _ in drops], np.int64)
        dealer.drop(places, decisions.view(np.uint8).reshape(-1, DECISION.itemsize), reasons, str(names))
    parts = [dealer.deal(piece, last) for piece, last in pieces_of(data, cuts)]
    assert dealer.num_documents == len(rows)
    return b"".join(part for kept, _ in parts for part in kept), b"".join(gone for _, gone in parts)


def check(data, cuts=()):
    """The native path gives what the twin gives, or fails as it does; returns what was left to Python."""
    wanted = twin(data)
    reader = Reader()
    if isinstance(wanted, str):
        with pytest.raises(BadRecordError) as error:
            sign(data, cuts, reader)
        assert str(error.value) == wanted
        return reader.lines
    rows, names, signed = sign(data, cuts, reader)
    lines = [d.to_json().encode() for d in wanted]
    assert deal(data, rows, cuts=cuts) == (b"".join(line + b"\n" for line in lines), b"")
    assert names == b"".join((d.id + d.url).encode() for d in wanted)
    texts = [d.text for d in wanted]
    assert (signed == signatures(texts, **CONFIG.signature_settings)).all()
    for column, values in (
        ("timestamp", [d.timestamp for d in wanted]),
        ("length", [len(d.text) for d in wanted]),
        ("text_bytes", [len(d.text.encode()) for d in wanted]),
        ("id_bytes", [len(d.id.encode()) for d in wanted]),
        ("url_bytes", [len(d.url.encode()) for d in wanted]),
        ("id_high", [struct.unpack(">Q", d.id.encode().ljust(8, b"\0")[:8])[0] for d in wanted]),
        ("score", [score_of(d.meta) for d in wanted]),
    ):
        assert rows[column].tolist() == values, column
    given = [line.removesuffix(b"\r") for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    whole = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    for row, plain, line, raw in zip(rows, lines, given, whole, strict=True):
        assert bool(row["is_plain"]) == (plain == raw) or line in reader.lines
    for name, of in (("line_hash", lines), ("text_low", texts), ("id_hash", [d.id for d in wanted])):
        same = {value: number for number, value in enumerate(of)}
        groups = [same[value] for value in of]
        hashes = rows[name].tolist()
        assert len(set(zip(groups, hashes, strict=True))) == len(set(groups)) == len(set(hashes)), name
    columns = _text.DocumentColumns(None, "score", True, reader.name, reader.read)
    columns.scan(data, True)
    assert columns.take()[2] == [text.encode() for text in texts]
    wants = np.arange(len(wanted)) % 2 == 0
    check_texts(data, wants, cuts, [t.encode() for t in texts])
    return reader.lines


def check_texts(data, wants, cuts, texts):
    reader = Reader()
    lines = _text.DocumentTexts(wants.astype(np.uint8), reader.name, reader)
    found = [entry for piece, last in pieces_of(data, cuts) for entry in lines.texts(piece, last)]
    assert found == [(row, text) for row, text in enumerate(texts) if wants[row]]
    lines = _text.DocumentTexts(wants.astype(np.uint8), reader.name, reader)
    parts = [lines.shingles(piece, last, CONFIG.shingle_plan) for piece, last in pieces_of(data, cuts)]
    hashes = [part[1][a:b] for part in parts for a, b in zip(part[2][:-1], part[2][1:], strict=True)]
    assert np.concatenate([part[0] for part in parts]).tolist() == [row for row, _ in found]
    wanted = shingle_hashes([text for _, text in found])
    assert [h.tolist() for h in hashes] == [h.tolist() for h in wanted]


def score_of(meta):
    score = meta.get("score")
    return float(score) if isinstance(score, int | float) and not isinstance(score, bool) else -np.inf


# Odd JSON: any spelling of any value, fields of any type in any order, more than once, and others.

LETTERS = st.sampled_from(
    [*'aB "\\/é€😀日\u2028\x7f\x85', "\n", "\t", "\r", "\b", "\f", "\x00", "\x1b", "\ufeff", "\ud800", "\udc00"]
)
SHORT_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\b": "\\b", "\f": "\\f", '"': '\\"', "\\": "\\\\"}


@st.composite
def spelled_string(draw, text=None):
    if text is None:
        text = "".join(draw(st.lists(LETTERS, max_size=40)))
    out = []
    for letter in text:
        spelling = draw(st.integers(0, 9)) if not "\ud800" <= letter <= "\udfff" else 8
        if spelling >= 8:
            units = letter.encode("utf-16-be", "surrogatepass")
            digits = [f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2)]
            out += digits if spelling == 8 else [d[:2] + d[2:].upper() for d in digits]
        elif letter == "/" and spelling > 3:
            out.append("\\/")
        elif letter in SHORT_ESCAPES:
            out.append(SHORT_ESCAPES[letter])
        else:
            out.append(f"\\u{ord(letter):04x}" if ord(letter) < 32 else letter)
    return '"' + "".join(out) + '"'


WHITE = st.sampled_from(["", "", "", "", " ", "  ", "\t", "\r"])
NUMBERS = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(
        "0 -0 -0.0 0.0 1e3 1E+2 1.50 1e-7 0.0001 0.00001 1e16 1e15 123456789012345678 9007199254740993 "
        "9007199254740992 -9007199254740993 5e-324 1.7976931348623157e308 12345678901234567890.5 1e22 0.1e1 "
        "100000000000000000000.0".split()
    ),
)
KEYS = st.sampled_from(["a", "b", "score", "é", "", "\n", "z" * 20])


@st.composite
def spelled_value(draw, depth=3):
    kind = draw(st.integers(0, 7 if depth else 4))
    if kind <= 1:
        return draw(spelled_string())
    if kind == 2:
        return draw(NUMBERS)
    if kind <= 4:
        return draw(st.sampled_from(["true", "false", "null"]))
    inner = spelled_value(depth - 1)
    if kind == 5:
        return "[" + ",".join(draw(WHITE) + draw(inner) + draw(WHITE) for _ in range(draw(st.integers(0, 3)))) + "]"
    keys = draw(st.lists(KEYS, max_size=3))
    return draw(spelled_object([(key, draw(inner)) for key in keys]))


@st.composite
def spelled_object(draw, members):
    parts = []
    for key, value in members:
        spelled = draw(spelled_string(key))
        parts.append(draw(WHITE) + spelled + draw(WHITE) + ":" + draw(WHITE) + value + draw(WHITE))
    return "{" + ",".join(parts) + "}"


@st.composite
def document_line(draw):
    members = []
    for name in draw(st.permutations(FIELDS)):
        if name == "text" or draw(st.booleans()):
            meta = [(key, draw(spelled_value())) for key in draw(st.lists(KEYS, max_size=3))]
            likely = {"timestamp": NUMBERS, "meta": spelled_object(meta)}.get(name, spelled_string())
            members.append((name, draw(spelled_value() if draw(st.integers(0, 9)) == 0 else likely)))
    for _ in range(draw(st.integers(0, 3))):
        other = draw(st.one_of(KEYS, st.sampled_from(FIELDS))), draw(spelled_value())
        members.insert(draw(st.integers(0, len(members))), other)
    return (draw(WHITE) + draw(spelled_object(members)) + draw(WHITE)).encode("utf-8", "surrogatepass")


def plain_line(document):
    return document.to_json().encode()


FILES = st.lists(st.one_of(document_line(), st.sampled_from([b"", b" \t", b"\r"])), min_size=1, max_size=5)
CUTS = st.lists(st.integers(0, 1 << 20), max_size=4)


@settings(max_examples=150, deadline=None)
@given(FILES, CUTS, st.booleans(), st.booleans())
def test_odd_json_is_read_as_python_reads_it(lines, cuts, has_mark, ends):
    data = b"\xef\xbb\xbf" * has_mark + b"\n".join(lines) + b"\n" * ends
    left = check(data, cuts)
    for line in left:
        assert is_rare(line), line


def is_rare(line):
    """What is left to Python: lines it refuses, half surrogate pairs in meta, a key twice in it, numbers too large."""
    try:
        text = line.decode()
        values = json.loads(text, object_pairs_hook=lambda pairs: pairs)
    except ValueError:
        return True
    fields = [key for key, _ in values if isinstance(values, list)]
    has_no_text = not isinstance(dict(values).get("text"), str)
    inner = [values]
    while inner:
        value = inner.pop()
        if isinstance(value, list):
            keys = [entry[0] for entry in value if isinstance(entry, tuple)]
            if len(keys) != len(set(keys)) and value is not values:
                return True
            inner += [entry[1] if isinstance(entry, tuple) else entry for entry in value]
    return has_no_text or fields.count("meta") > 1 or "\\ud" in text.lower() or "e308" in text or "e-3" in text


@settings(max_examples=150, deadline=None)
@given(document_line(), st.data())
def test_damaged_json_is_refused_as_python_refuses_it(line, data):
    line = bytearray(line)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.integers(0, len(line) - 1))
        how = data.draw(st.integers(0, 2))
        byte = data.draw(st.sampled_from(list(b'"\\{}[],:0-.eE1u/ \x00\x1f\x7f\x80\xc3\xed\xa0\xf4\xff')))
        if how == 0:
            line[place] = byte
        elif how == 1:
            line.insert(place, byte)
        elif len(line) > 1:
            del line[place]
    check(bytes(line).replace(b"\n", b" "))


@settings(max_examples=60, deadline=None)
@given(FILES, st.randoms(use_true_random=False))
def test_what_goes_is_written_with_what_was_measured(tmp_path_factory, lines, rng):
    data = b"\n".join(lines)
    wanted = twin(data)
    if isinstance(wanted, str):
        return
    rows, _, _ = sign(data)
    names = tmp_path_factory.mktemp("names") / "names"
    drops, held, kept, gone = [], b"??", b"", b""
    for row, document in enumerate(wanted):
        if rng.random() < 0.4:
            kept += plain_line(document) + b"\n"
            continue
        id_, url = rng.choice(["a", 'q"\\', "é"]), rng.choice(["", "http://h/\n"])
        similarity = rng.choice([1.0, 0.0, 0.0078125, 1 / 3, 0.8, rng.random(), 0.9999996, 1e-7, 5e-5])
        reason = rng.choice([1, 2])
        sizes = len(id_.encode()), len(url.encode())
        drops.append((row, (row, 0, 7, 0, similarity, len(held), *sizes, reason, 0)))
        held += id_.encode() + url.encode()
        made = with_meta(document, kept_id=id_, kept_url=url, similarity=round(similarity, 6)).to_json()
        gone += f'{made[:-1]},"reason":"{REASONS[reason]}"}}\n'.encode()
    names.write_bytes(held)
    assert deal(data, rows, drops, names=names) == (kept, gone)


def test_plain_lines_are_copied_and_never_left_to_python(tmp_path):
    path = tmp_path / "in.jsonl"
    meta = {"b": [1.5, {"x": 1}], "a": None}
    path.write_text("\n".join(json.dumps({"text": f"text {i} é\n", "id": str(i), "meta": meta}) for i in range(9)))
    data = b"".join(plain_line(d) + b"\n" for d in read_documents(path))
    reader = Reader()
    rows, _, _ = sign(data, reader=reader)
    assert rows["is_plain"].all()
    assert reader.lines == []
    assert deal(data, rows)[0] == data
    rows, _, _ = sign(path.read_bytes(), reader=reader)
    assert not rows["is_plain"].any()
    assert reader.lines == []


@pytest.mark.parametrize(
    "meta",
    [
        '{"a": ' + "[" * 300 + "]" * 300 + "}",
        '{"a": ' + "1" * 4200 + "}",
        '{"a": NaN, "b": [1], "c": 2}',
        '{"a": 1e999}',
        '{"a": "\\ud800", "b": {}}',
        '{"a": {"k": 1, "k": 2}}',
    ],
)
def test_what_is_left_to_python_comes_out_as_python_writes_it(meta):
    line = f'{{"text": "t", "id": "i", "meta": {meta}}}'.encode()
    assert check(line) == [line]


@pytest.mark.parametrize("size", [0, 1, 17, 126, 127, 128, 129, 300, 5000])
def test_a_document_without_an_id_gets_the_one_python_gives_it(size):
    line = json.dumps({"text": "é" * (size // 2) + "x" * (size % 2)}).encode()
    assert check(b"\n" + line) == []


def test_a_name_that_is_not_utf8_is_left_to_python():
    path = Path("folder/\udcff.jsonl")
    name, read = line_reader(path)
    assert name == ""
    signer = _text.DocumentColumns(CONFIG.sign_plan, "score", True, name, read)
    signer.scan(b'{"text":"t"}\n', True)
    _, names, _ = signer.take()
    assert names == document_of_line(b'{"text":"t"}', path, 1).id.encode()
