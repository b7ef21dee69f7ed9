"""The scanner against the pattern itself: the `regex` module and Hugging Face's splitter."""

import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from herdkern.tokenizer import LLAMA3_SPLIT_PATTERN, Tokenizer, split_words

regex = pytest.importorskip("regex")
PATTERN = regex.compile(LLAMA3_SPLIT_PATTERN)

# Code points that this Python's Unicode version assigns; their classes do not change later, so all libraries agree.
ASSIGNED = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and unicodedata.category(chr(c)) != "Cn"]
ASSIGNED_SET = set(ASSIGNED)
# Characters that take part in a rule of the pattern or look as if they did.
CRITICAL = list(
    " \t\r\n\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u200b\u3000\ufeff'’`ſsStTdDmMrReEvVlLKkaZ09½Ⅷ①x_-.\"\u0301\u0e31"
)
CRITICAL += ["éЖ中日ǅⒶ\U0001d400\U00020000🙂"[i] for i in range(9)] + ["'ll", "'RE", "'ſ", "\r\n", "  ", "123"]


def by_pattern(text: str | bytes) -> list[bytes]:
    if isinstance(text, bytes):
        return [
            word.encode("utf-8", "surrogateescape") for word in PATTERN.findall(text.decode("utf-8", "surrogateescape"))
        ]
    return [word.encode() for word in PATTERN.findall(text)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  ",
        "\n",
        " \n \n y",
        "a  b   c",
        "trailing   ",
        "trailing \n  ",
        "\r\n\r\n\tx",
        "it's IT'S it’s 'ſ 'Sx 'tis 're'VE'm'LL'd'Dog 'l 'v 'x",
        "''s '' 's",
        "1234567 12.345 ⅧⅨ①②③④ ١٢٣٤ x1y22z333",
        "\u200bword \u00a0word \u3000word \u0301word \tword \u180eword",
        "क्षि ก็ได้ éa é",
        "!!!\n\n\nnext ...\r\n\r\n? \n!",
        " !x  !x",
        "a\u2028b\u2029 c\x85d\x1ce\x1ff",
        "x" * 1000 + " " * 1000 + "\n" * 1000 + "9" * 1000 + "-" * 1000,
    ],
)
def test_torture(text):
    assert split_words(text) == by_pattern(text)


@settings(max_examples=800, deadline=None)
@given(st.lists(st.sampled_from(CRITICAL), max_size=14).map("".join))
def test_critical_characters(text):
    assert split_words(text) == by_pattern(text)


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from(ASSIGNED).map(chr) | st.sampled_from(" \n'sa1.")))
def test_all_of_unicode(text):
    assert split_words(text) == by_pattern(text)


@settings(max_examples=500, deadline=None)
@given(
    st.binary()
    | st.lists(st.sampled_from([*(c.encode() for c in CRITICAL), *(bytes([b]) for b in range(0x7F, 256))])).map(
        b"".join
    )
)
def test_any_bytes(data):
    assume(ASSIGNED_SET.issuperset(map(ord, data.decode("utf-8", "ignore"))))
    assert split_words(data) == by_pattern(data)
    assert b"".join(split_words(data)) == data


@pytest.mark.parametrize(
    "data",
    [b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xe0\x9f\xbf", b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xf0\x80\x80\x80",
     b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xff\xfe", b"\xe4\xb8", b"\xf0\x9f\x99", b"\x80\x80", b"\xc3"],
    ids=bytes.hex,
)  # fmt: skip
@pytest.mark.parametrize("frame", [b"%s", b"ab%scd", b" %s1", b"\n%s\n", b"'%ss"])
def test_malformed_utf8(data, frame):
    assert split_words(frame % data) == by_pattern(frame % data)


@pytest.mark.parametrize("frame", ["a{0}b", " {0}1{0}2", "'{0} {0}{0}\n{0} "])
def test_every_assigned_code_point(frame):
    text = "\n--\n".join(frame.format(chr(c)) for c in ASSIGNED)
    assert split_words(text) == by_pattern(text)


def test_every_code_point_like_hugging_face():
    tokenizers = pytest.importorskip("tokenizers")
    splitter = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT_PATTERN), "isolated")
    for begin in range(0, len(ASSIGNED), 20_000):
        text = "".join(f"a{chr(c)}b {chr(c)}1\n" for c in ASSIGNED[begin : begin + 20_000])
        assert split_words(text) == [word.encode() for word, _ in splitter.pre_tokenize_str(text)]


def test_lone_surrogate_is_refused():
    with pytest.raises(
        ValueError, match="split_words: text must be text that UTF-8 can hold, got a lone surrogate at character 3"
    ):
        split_words("abc\ud800")


def test_only_text_is_taken():
    with pytest.raises(TypeError, match="must be str or bytes, got int"):
        split_words(5)  # type: ignore[arg-type]


def test_other_patterns_are_refused():
    with pytest.raises(ValueError, match="split_pattern must be LLAMA3_SPLIT_PATTERN"):
        Tokenizer({bytes([b]): b for b in range(256)}, {}, r"\w+")
