"""The split patterns that have a name: the scanners against `regex`, Hugging Face and their own automaton."""

import random
import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from herdkern import _text
from herdkern.tokenizer import LLAMA3_SPLIT_PATTERN, split_words
from herdkern.tokenizer.pretokenize import SPLIT_PATTERNS, resolve_pattern

regex = pytest.importorskip("regex")

# tiktoken 0.14's own spelling of two of them; the first differs at the end of a text that ends in white space.
TIKTOKEN_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
TIKTOKEN_R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {**SPLIT_PATTERNS, "tiktoken_cl100k": TIKTOKEN_CL100K, "tiktoken_r50k": TIKTOKEN_R50K, "tekken": TEKKEN}
PATTERNS = {name: pattern if isinstance(pattern, tuple) else (pattern,) for name, pattern in PATTERNS.items()}
del PATTERNS["cl100k"]  # is llama3
for_each_pattern = pytest.mark.parametrize("name", list(PATTERNS))

# Code points that this Python's Unicode version assigns; their classes do not change later, so all libraries agree.
# U+0295 changes from Ll to Lo in Unicode 17.0, which newer versions of `regex` carry.
ASSIGNED = [c for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs") and c != 0x295]
ASSIGNED_SET = set(ASSIGNED)
# Characters that take part in a rule of a pattern or look as if they did.
CRITICAL = list(
    " \t\r\n\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u200b\u3000\ufeff'’`ſsStTdDmMrReEvVlLKkaZ09½Ⅷ①x_-/.\"\u0301\u0e31"
)
CRITICAL += ["éЖ中日ǅⒶ\U0001d400\U00020000🙂"[i] for i in range(9)] + ["'ll", "'RE", "'ſ", "'s's", "\r\n", "  ", "123"]
CRITICAL += [
    "\n\n",
    "   ",
    "//",
    "/\n",
    "word",
    "World",
    "GPU",
    "क्षि",
    "中文",
    "ʰ",
    "ª",
    "ß",
    "かな",
    "❤\ufe0f",
    "👩\u200d🚀",
]


def by_patterns(text: str | bytes, patterns: tuple[str, ...]) -> list[bytes]:
    """The matches of the `regex` module and what lies between them, for a sequence of patterns."""
    words = [text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text]
    for pattern in map(regex.compile, patterns):
        pieces = []
        for word in words:
            at = 0
            for match in pattern.finditer(word):
                pieces += [word[at : match.start()], match.group()]
                at = match.end()
            pieces.append(word[at:])
        words = pieces
    return [word.encode("utf-8", "surrogateescape") for word in words if word]


def check(name: str, text: str | bytes) -> None:
    """The scanner of `name` finds what the `regex` module finds."""
    patterns = PATTERNS[name]
    got = split_words(text, patterns)
    assert got == by_patterns(text, patterns)
    assert b"".join(got) == (text if isinstance(text, bytes) else text.encode())


def random_text(rng: random.Random) -> str:
    """Short or a few blocks long, of few or many different critical characters, some repeated beyond a block."""
    characters = rng.sample(CRITICAL, rng.choice([2, 4, 8, 30, len(CRITICAL)]))
    if rng.random() < 0.05:
        characters = [c * rng.choice([1, 31, 64, 70]) for c in characters[:6]]
    return "".join(rng.choices(characters, k=rng.randrange(rng.choice([4, 10, 40, 150]))))


TORTURE = [
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
    "a's's's's'll're's x's'sY 'S'S'S don'tX don'Tx",
    "camelCase HTTPServer XMLHttpRequest iPhone ABCd aB中C文D ǅabc ʰAb 使用GPU加速",
    "{\n// comment\n/// x\n/*\n*/\n/a\n/\n/!\n\n/ /\n\n//",
    "1234567 12.345 ⅧⅨ①②③④ ١٢٣٤ x1y22z333",
    "\u200bword \u00a0word \u3000word \u0301word \tword \u180eword",
    "क्षि ก็ได้ éa é !\u0301a !!\u0301a  \u0301 1\u0301",
    "!!!\n\n\nnext ...\r\n\r\n? \n!",
    " !x  !x",
    "a\u2028b\u2029 c\x85d\x1ce\x1ff",
    "x" * 1000 + " " * 1000 + "\n" * 1000 + "9" * 1000 + "-" * 1000,
    *(" " * n + "\n" + " " * n + "x" for n in range(60, 68)),
    *("a" * n + "'ll" + "é" * n + "'s's" for n in range(58, 68)),
    *("." * n + "\n" * n + "/" * n for n in range(62, 66)),
    "👩\u200d🚀" * 50 + "❤\ufe0f ❤\ufe0f" * 20,
]


@for_each_pattern
def test_torture(name):
    for text in TORTURE:
        check(name, text)


@for_each_pattern
@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from(CRITICAL), max_size=14).map("".join))
def test_critical_characters(name, text):
    check(name, text)


@for_each_pattern
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from(ASSIGNED).map(chr) | st.sampled_from(" \n'sa1.")))
def test_all_of_unicode(name, text):
    check(name, text)


@for_each_pattern
@settings(max_examples=100, deadline=None)
@given(
    data=st.binary()
    | st.lists(st.sampled_from([*(c.encode() for c in CRITICAL), *(bytes([b]) for b in range(0x7F, 256))])).map(
        b"".join
    )
)
def test_any_bytes(name, data):
    assume(ASSIGNED_SET.issuperset(map(ord, data.decode("utf-8", "ignore"))))
    check(name, data)


@for_each_pattern
def test_random_texts(name):
    rng = random.Random(name)
    for _ in range(2000):
        check(name, random_text(rng))


@pytest.mark.full
@for_each_pattern
def test_half_a_million_random_texts(name):
    rng = random.Random(name + " full")
    for _ in range(500_000):
        check(name, random_text(rng))


@for_each_pattern
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "amx"])
def test_blocks_like_the_automaton(name, level, monkeypatch):
    """Every level of the block scanners against the general engine, which an extra group sends the pattern to."""
    monkeypatch.setenv("HERDKERN_ISA", level)
    fast = _text.Splitter(PATTERNS[name])
    general = _text.Splitter([f"(?:{pattern})" for pattern in PATTERNS[name]])
    assert fast.patterns == PATTERNS[name]
    rng = random.Random(f"{name} {level}")
    for _ in range(5000):
        text = random_text(rng)
        if rng.random() < 0.2:  # break the UTF-8 somewhere
            data = bytearray(text.encode())
            for _ in range(min(3, len(data))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            text = bytes(data)
        assert fast.word_ends(text).tolist() == general.word_ends(text).tolist(), text


@for_each_pattern
@pytest.mark.parametrize(
    "data",
    [b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xe0\x9f\xbf", b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xf0\x80\x80\x80",
     b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xff\xfe", b"\xe4\xb8", b"\xf0\x9f\x99", b"\x80\x80", b"\xc3"],
    ids=bytes.hex,
)  # fmt: skip
def test_malformed_utf8(name, data):
    for frame in [b"%s", b"ab%scd", b" %s1", b"\n%s\n", b"'%ss"]:
        check(name, frame % data)


@for_each_pattern
def test_every_assigned_code_point(name):
    """All against the general engine; against `regex` few ideographs, Hangul syllables and private ones."""
    fast = _text.Splitter(PATTERNS[name])
    general = _text.Splitter([f"(?:{pattern})" for pattern in PATTERNS[name]])
    for frame in ["a{0}b", " {0}1{0}2", "'{0} {0}{0}\n{0} ", "A{0}B{0}", "!{0}", "中{0}'s"]:
        text = "\n--\n".join(frame.format(chr(c)) for c in ASSIGNED)
        assert fast.word_ends(text).tolist() == general.word_ends(text).tolist()
    few = [c for c in ASSIGNED if c % 64 == 0 or unicodedata.category(chr(c)) not in ("Lo", "Co")]
    check(name, "\n--\n".join("a{0}b 1{0}{0}A '{0}\n{0} ".format(chr(c)) for c in few))


@pytest.mark.parametrize("name", list(SPLIT_PATTERNS))
def test_code_points_like_hugging_face(name):
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    patterns = SPLIT_PATTERNS[name] if isinstance(SPLIT_PATTERNS[name], tuple) else (SPLIT_PATTERNS[name],)
    splitter = pre.Sequence([pre.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns])
    for begin in range(0, len(ASSIGNED), 40_000):
        text = "".join(f"a{chr(c)}b {chr(c)}1\n" for c in ASSIGNED[begin : begin + 40_000 : 7])
        assert split_words(text, name) == [word.encode() for word, _ in splitter.pre_tokenize_str(text)]


def test_names_and_patterns_mean_the_same():
    for name, pattern in SPLIT_PATTERNS.items():
        own_name = "llama3" if name == "cl100k" else name
        patterns = (pattern,) if isinstance(pattern, str) else pattern
        assert resolve_pattern(name) == resolve_pattern(pattern) == (own_name, patterns)
    assert resolve_pattern("[a-z]+") == (None, ("[a-z]+",))
    assert resolve_pattern(["[a-z]+", "b"]) == (None, ("[a-z]+", "b"))
    assert SPLIT_PATTERNS["llama3"] == LLAMA3_SPLIT_PATTERN
    as_in_its_file = tuple(p.replace(r"\r", "\r").replace(r"\n", "\n") for p in SPLIT_PATTERNS["deepseek3"])
    assert resolve_pattern(as_in_its_file) == ("deepseek3", as_in_its_file)


def test_text_between_matches_is_a_word():
    assert split_words("--ab--c--", "[a-z]+") == [b"--", b"ab", b"--", b"c", b"--"]
    assert split_words("no match", "Q") == [b"no match"]
    assert split_words("12ab34", (r"\d+", "[a-z]", "2")) == [b"1", b"2", b"a", b"b", b"34"]
    assert split_words("", "[a-z]+") == []


def test_lone_surrogate_is_refused():
    with pytest.raises(
        ValueError, match="split_words: text must be text that UTF-8 can hold, got a lone surrogate at character 3"
    ):
        split_words("abc\ud800")


def test_only_text_is_taken():
    with pytest.raises(TypeError, match="must be str or bytes, got int"):
        split_words(5)  # type: ignore[arg-type]
