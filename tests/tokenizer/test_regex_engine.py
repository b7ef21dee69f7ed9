"""Patterns without a name: the engine against the `regex` module, what it refuses, and that its work is linear."""

import random
import re

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from herdkern import _text
from herdkern.tokenizer import split_words
from herdkern.tokenizer.pretokenize import SPLIT_PATTERNS, resolve_pattern

from .test_pretokenize import ASSIGNED, by_patterns

regex = pytest.importorskip("regex")

SETS = [
    "a",
    "b",
    "C",
    "1",
    " ",
    r"\n",
    "é",
    "中",
    "'",
    ".",
    "[ab]",
    "[^a]",
    "[a-c1]",
    r"[^\s\p{L}]",
    r"\p{L}",
    r"\P{L}",
]
SETS += [
    r"\p{Lu}",
    r"\p{N}",
    r"\s",
    r"\S",
    r"\d",
    r"\w",
    r"\W",
    r"[\s\p{Lu}.]",
    r"\p{Han}",
    r"\x61",
    r"\u4e2d",
    r"[^\n]",
]
TEXT = "aabbcABC1 2\n'.é中\t_ſK"
COUNTS = ["?", "*", "+", "{2}", "{1,2}", "{0,2}", "{2,}", "{,2}"]


@st.composite
def repeats(draw, child: str) -> str:
    """`child` repeated or not; only single code points are possessive."""
    count = draw(st.sampled_from(["", "", "", *COUNTS]))
    greed = draw(st.sampled_from(["", "", "?", "+"] if child in SETS else ["", "", "?"])) if count else ""
    return f"{child}{count}{greed}"


def combine(patterns: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Larger patterns from smaller ones."""
    return (
        st.lists(patterns, min_size=1, max_size=3).map("".join)
        | st.lists(patterns, min_size=2, max_size=4).map(lambda parts: f"(?:{'|'.join(parts)})")
        | patterns.map(lambda part: f"(?i:{part})")
        | patterns.flatmap(lambda part: repeats(f"(?:{part})"))
    )


LOOKS = st.tuples(st.sampled_from(["(?=", "(?!"]), st.sampled_from([*SETS, r"\s|\Z", "a|b"])).map(
    lambda p: f"{p[0]}{p[1]})"
)
PIECES = st.sampled_from(SETS).flatmap(repeats)
RANDOM_PATTERNS = st.recursive(
    PIECES | st.tuples(PIECES, LOOKS).map("".join) | st.tuples(PIECES, st.just(r"\Z")).map("".join),
    combine,
    max_leaves=8,
)


def for_regex(pattern: str) -> str:
    """The same pattern without negated classes: `regex` takes (?:[^a]|[^b]) for the class [^ab], `re` does not."""
    for negated in SETS:
        if negated.startswith("[^"):
            pattern = pattern.replace(negated, rf"(?:(?![{negated[2:]})[\s\S])")
    return pattern


def compare(pattern: str, texts: list[str]) -> None:
    """The engine finds what the `regex` module finds, unless it refuses the pattern."""
    try:
        resolve_pattern(pattern)
    except ValueError as error:
        assume("match nothing" not in str(error))
        # What repeats repeats of repeats may have too many states; anything simpler may not.
        assume("states" not in str(error) or len(re.findall(r"\{\d|[*+]", pattern)) < 3)
        raise
    for text in texts:
        assert split_words(text, pattern) == by_patterns(text, (for_regex(pattern),)), (pattern, text)


@settings(max_examples=800, deadline=None)
@given(RANDOM_PATTERNS, st.lists(st.text(st.sampled_from(TEXT), max_size=12), min_size=1, max_size=8))
@example("(?:a|ab)(?:c|bcd)*", ["abcd"])
@example(r"a+?(?=b)|\s+(?!\S)|.", ["aab  a"])
@example("(?i:[^s])", ["sSſkK\u212a"])
def test_random_patterns(pattern, texts):
    compare(pattern, texts)


@pytest.mark.full
@pytest.mark.parametrize("part", range(5))
@settings(max_examples=20_000, deadline=None)
@given(RANDOM_PATTERNS, st.lists(st.text(st.sampled_from(TEXT), max_size=20), min_size=1, max_size=8))
def test_random_patterns_at_length(part, pattern, texts):
    compare(pattern, texts)


CATEGORIES = "C Cc Cf Co L Ll Lm Lo Lt Lu M Mc Me Mn N Nd Nl No P Pc Pd Pe Pf Pi Po Ps S Sc Sk Sm So Z Zl Zp Zs LC"


@pytest.mark.parametrize(
    "pattern",
    [rf"\p{{{name}}}" for name in CATEGORIES.split()]
    + [rf"\p{{{script}}}" for script in ["Han", "Hiragana", "Script=Katakana", "sc=Greek", "Hangul", "Thai", "Latin"]]
    + [r"\s", r"\S", r"\d", r"\w", r"\W", r"\p{^L}", r"\P{Lowercase_Letter}", r"\pL", r"[^\p{L}\p{M}]"]
    + [r"\p{White_Space}", r"(?i:\p{Lu})", r"(?i:\P{Ll})", r"(?i:[a-zé-ÿα-ω])", r"(?i:[^k\u0130-\u0200])"]
    + [r"(?i)[\u1e00-\u1fff]", "(?i:ǆ)"],
)
def test_sets_of_code_points(pattern):
    text = "".join(map(chr, ASSIGNED))
    compare(f"(?:{pattern})+", [text])


def test_every_case_variant():
    cased = [chr(c) for c in ASSIGNED if regex.match(r"(?i)\p{LC}|\p{M}", chr(c)) or chr(c).swapcase() != chr(c)]
    text = "".join(cased)
    for begin in range(0, len(cased), 97):
        literals = "|".join(map(regex.escape, cased[begin : begin + 97]))
        compare(f"(?i:{literals})", [text])


def test_operators_within_classes():
    text = "abcdefGHI中文アか123 _"
    for ours, theirs in [
        (r"[a-z&&[^aeiou]]+", "[b-df-hj-np-tv-z]+"),
        (r"[\p{L}&&[^\p{Han}]]+", r"[[\p{L}]--[\p{Han}]]+"),
        (r"[\w--[a-c]--\d]+", r"[\w--[a-c]--\d]+"),
        (r"[[a-c][f-h]]+", "[a-cf-h]+"),
        (r"[]a]+|[^]b]", r"[\]a]+|[^\]b]"),
    ]:
        expected = [m.group().encode() for m in regex.compile(theirs, regex.V1).finditer(text)]
        assert [word for word in split_words(text, ours) if word in expected] == expected


def test_anchors():
    assert split_words("ab ab", "^ab") == [b"ab", b" ab"]
    assert split_words("ab ab", r"ab$|.") == [b"a", b"b", b" ", b"ab"]
    assert split_words("ab\n", r"ab$|.") == [b"a", b"b", b"\n"]  # as in tiktoken: the very end
    assert split_words("x  ", r"\s+\z|\s") == [b"x", b"  "]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a)\1", "a backreference at character 3"),
        (r"(?P<x>a)(?P=x)", "a backreference at character 8"),
        ("a(?<=b)", "lookbehind at character 1"),
        ("(?<!b)a", "lookbehind at character 0"),
        ("a(?=bc)", "lookahead of more than one code point at character 1"),
        ("a(?!b*c)", "lookahead of more than one code point at character 1"),
        ("(?>a|ab)c", "an atomic group at character 0"),
        ("(?:ab)++", "a possessive repeat of more than one code point at character 6"),
        (r"a\b", "a word border at character 1"),
        ("a**", "a repeat of a repeat at character 2"),
        ("(?:a*)*b", "an endless repeat of what may match nothing at character 0"),
        ("a*", "may match nothing"),
        ("x|$", "may match nothing"),
        ("(ab", "a group without its end at character 0"),
        ("ab)", "an unbalanced '\\)' at character 2"),
        ("a[bc", "a class without its end at character 1"),
        ("*a", "a repeat of nothing at character 0"),
        (r"\p{Nope}", "the unknown property 'Nope' at character 0"),
        (r"[z-a]", "a range whose end is no code point above its start at character 1"),
        (r"a{3,2}", "a repeat whose least is above its most at character 1"),
        (r"a{1001}", "a repeat of more than 1000 at character 1"),
        (r"\q", r"the unknown escape \\q at character 0"),
        (r"\x{110000}", "a code point above U\\+10FFFF at character 0"),
        (r"(?x: a)", "an unknown kind of group at character 0"),
        ("[ab]*a[ab]{20}", "needs more than 10000 states"),
        ("(?:(?:(?:a{1000}){1000}){1000})", "has more than 50000 parts"),
        ("(" * 300 + "a" + ")" * 300, "groups nested too deeply"),
        ("\\", "a lone backslash at character 0"),
        ("(?:(?:(?:(?:){1000}){1000}){1000}){1000}a", "has more than 50000 parts"),
        ("a" * 20_001, "more than 20000 characters"),
        ("(?:[^a]{0,1000}){20}b", "takes too long to make an automaton of"),
    ],
    ids=lambda value: value if len(value) < 20 else value[:20],
)  # fmt: skip
def test_refused_patterns(pattern, message):
    with pytest.raises(
        ValueError,
        match=f"^split_words: split_pattern must be a pattern that can be matched in one pass, got .*{message}",
    ):
        split_words("text", pattern)


def test_unknown_names_are_patterns():
    assert split_words("my llama2 model", "llama2") == [b"my ", b"llama2", b" model"]
    with pytest.raises(ValueError, match="must be at least one pattern, got none"):
        split_words("text", [])


HOSTILE_TEXTS = [
    "a",
    " ",
    "\n",
    " \n",
    "'",
    "'s",
    "a's",
    "A",
    "Aa",
    "中A",
    "!\u0301",
    "1",
    "/\n",
    "\t",
    "é",
    "中",
    "🙂\u200d",
    "\xff",
]
HOSTILE_TEXTS += ["a" * 63 + " ", "a" * 65, " " * 63 + "x", "-" * 64 + "\n", "'ll" * 21 + "x"]
HOSTILE_PATTERNS = [
    "a*b|a",
    "(?:a|aa)*c|[a ]",
    "[ab]*c|[ab]",
    "a+b",
    r"\s*x|\s",
    r"(?:a+|\s+)*!|a",
    r".*\n|.",
    r"(?:.{0,9}a){3}b|.",
]


@pytest.mark.parametrize("pattern", [*SPLIT_PATTERNS, *HOSTILE_PATTERNS, ("a*b|a", r"\s*x|\s", "[ab]*c")])
def test_work_is_linear(pattern):
    splitter = _text.Splitter(SPLIT_PATTERNS.get(pattern, pattern))
    for unit in HOSTILE_TEXTS:
        unit_bytes = unit.encode("latin-1") if unit == "\xff" else unit.encode()
        small, large = (splitter.count_steps(unit_bytes * (n // len(unit_bytes)))[1] for n in (30_000, 60_000))
        assert large <= 2.1 * small + 1000, (pattern, unit)
        assert large <= 400 * 60_000, (pattern, unit)


def test_steps_are_counted():
    """The control of the test above: attempts that read to the end in vain would take 60,000 ** 2 / 2 steps."""
    text = b"a" * 60_000
    assert _text.Splitter("a").count_steps(text) == (60_000, 120_000)
    words, steps = _text.Splitter("a*b|a").count_steps(text)
    assert words == 60_000
    assert 64 * 60_000 < steps < 100 * 60_000


def test_long_texts_agree():
    rng = random.Random(5)
    text = "".join(rng.choices(["aa", "b", " ", "\n", "中", "c" * 40, "1"], k=3000))
    for pattern in ["a+b|a", "(?:aa|b|c+)+1|.", r"[^1]*1|\s|.", r"(?s:.{70})1|(?s:.)"]:
        assert split_words(text, pattern) == by_patterns(text, (pattern,))
