"""Strings that break tokenizers: every kind of white space, digits, marks, joiners, runs and bytes that are no UTF-8.

Each family makes many strings at once from a numpy generator: one Python gives equal strings for equal seeds.
`torture_strings` takes all families; `torture_bytes` has well-formed and damaged UTF-8.
"""

import itertools
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

SPACES = [chr(c) for c in range(0x110000) if chr(c).isspace()] + list("\u180e\u200b\u2060\ufeff\u200e")
NEWLINES = ["\n", "\r", "\r\n", "\n\n", "\n\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029", " \n", "\t\r\n"]
DIGITS = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c))[0] == "N"]
MARKS = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c))[0] == "M"]
CASED = [*list("abzABZßẞſKÅéÉíÍǅǈǋǲᾈᾘʰʼˮªºⅣⅷαΩяЯһҺაႠᲐꭰᏰ𝒜𝔘𝕫𐐀𐐨𞤀𞤢"), "ı", "İ", "ŉ", "ﬁ", "Ⓐ", "ⓩ"]
JOINERS = ["\u200d", "\u200c", "\ufe0f", "\ufe0e", "\u20e3", "\U000e0067", "\U000e007f", "\u034f", "\u00ad"]
EMOJI = [*list("😀👩👨🏽🏿🇩🇪🇺🇸❤☀⚽🏴🧑🚀🫠🪿#*0"), "👩\u200d🚀", "🏳️\u200d🌈", "👨\u200d👩\u200d👧", "1️⃣"]
CONTRACTIONS = ["'s", "'S", "'t", "'re", "'RE", "'ve", "'m", "'ll", "'LL", "'d", "'ſ", "’s", "''", "'", "'l", "'r"]
PUNCTUATION = list('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~¡¿§«»„“”‘’…–—‰€£¥©®±×÷∀∑√∞≤≥★♥、。「」！？，\x00\x1f')
LOOK_ALIKES = [
    *("<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|im_start|>"),
    *(
        "<|fim_prefix|>",
        "<|endofprompt|>",
        "<EOT>",
        "<META>",
        "<s>",
        "</s>",
        "[INST]",
        "<unk>",
        "<0x0A>",
        "▁",
        "Ġ",
        "Ċ",
    ),
]
BLOCKS = [  # first and last code point: scripts with and without case, with marks, without spaces, of other planes
    *((0x20, 0x7E), (0xA0, 0xFF), (0x100, 0x24F), (0x250, 0x2FF), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F)),
    *((0x530, 0x58F), (0x590, 0x5FF), (0x600, 0x6FF), (0x700, 0x7BF), (0x900, 0x97F), (0x980, 0x9FF), (0xA00, 0xA7F)),
    *((0xB80, 0xBFF), (0xC00, 0xC7F), (0xD00, 0xD7F), (0xE00, 0xE7F), (0xE80, 0xEFF), (0xF00, 0xFFF), (0x1000, 0x109F)),
    *((0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x137F), (0x13A0, 0x13FF), (0x1400, 0x167F), (0x1780, 0x17FF)),
    *((0x1800, 0x18AF), (0x1C80, 0x1CBF), (0x1D00, 0x1DFF), (0x1E00, 0x1EFF), (0x1F00, 0x1FFF), (0x2000, 0x206F)),
    *((0x2070, 0x20CF), (0x2100, 0x218F), (0x2190, 0x23FF), (0x2460, 0x24FF), (0x2500, 0x27BF), (0x2C00, 0x2DFF)),
    *((0x3000, 0x30FF), (0x3100, 0x33FF), (0x4E00, 0x9FFF), (0xA000, 0xA4CF), (0xA640, 0xA7FF), (0xA880, 0xABFF)),
    *((0xAC00, 0xD7FF), (0xE000, 0xF8FF), (0xF900, 0xFAFF), (0xFB00, 0xFDFF), (0xFE00, 0xFFFF), (0x10000, 0x1083F)),
    *((0x10900, 0x10FFF), (0x11000, 0x11FFF), (0x12000, 0x143FF), (0x16800, 0x16FFF), (0x1B000, 0x1B2FF)),
    *((0x1D000, 0x1D7FF), (0x1E000, 0x1E95F), (0x1EC70, 0x1EEFF), (0x1F000, 0x1FAFF), (0x20000, 0x323AF)),
    *((0xE0000, 0xE01EF), (0xF0000, 0x10FFFF)),
]
WORDS = (
    "the The THE it's they'LL don't camelCase HTTPServer XMLHttpRequest2 snake_case __init__ x1y2 3.14159 1e-9 0x1F "
    "https://example.org/a?b=c#d user@mail.org C:\\dir\\file.txt $HOME ${x} #include <stdio.h> /* */ a+=b; f(x)[0] "
    "naïve façade Straße ÜBER señor œuvre Łódź İstanbul iğde тест Жуков ёлка Київ Ελλάδα λόγος שלום עִבְרִית "
    "العربية مَرْحَبًا हिन्दी क्षत्रिय বাংলা தமிழ் ไทยแลนด์ ລາວ ខ្មែរ မြန်မာ བོད 日本語 カタカナ ひらがな 漢字漢字漢字 "
    "中文句子没有空格 한국어 조선말 ქართული ᲥᲐᲠᲗᲣᲚᲘ հայերեն አማርኛ ᏣᎳᎩ ꮳꮃꭹ 𝓯𝓪𝓷𝓬𝔂 𐐘𐐀 ﷺ ﬁﬂ ǅ ½ Ⅷ ①②③ ٠١٢٣٤٥٦٧ १२३४५ 一二三 "
    "𝟘𝟙𝟚 1234567 12,345.67 2024-02-29 12:34:56 a1b2 100% №5"
).split()
ATOMS = [
    *WORDS,
    *WORDS,
    *CONTRACTIONS,
    *PUNCTUATION,
    *NEWLINES,
    *SPACES[:12],
    *EMOJI,
    *JOINERS,
    *CASED,
    " ",
    "  ",
    "   ",
]

Family = Callable[[np.random.Generator, int], list[str]]


def join_picked(rng: np.random.Generator, count: int, atoms: Sequence[str], longest: int) -> list[str]:
    """Strings of 1 to `longest` atoms each."""
    ends = np.cumsum(rng.integers(1, longest + 1, count))
    picked = list(map(atoms.__getitem__, rng.integers(0, len(atoms), ends[-1]).tolist()))
    return ["".join(picked[begin:end]) for begin, end in itertools.pairwise([0, *ends.tolist()])]


def mixed(rng: np.random.Generator, count: int) -> list[str]:
    return join_picked(rng, count, ATOMS, 4)


def words(rng: np.random.Generator, count: int) -> list[str]:
    """Words of many scripts, three quarters of them behind a space."""
    return join_picked(rng, count, [*WORDS, *(" " + word for word in WORDS * 3)], 2)


def ascii_text(rng: np.random.Generator, count: int) -> list[str]:
    return from_points(rng.integers(0, 128, 8 * count), 8)


def one_block(rng: np.random.Generator, count: int) -> list[str]:
    """Four characters of one block, some of them ASCII: letters, signs, or code points without a meaning."""
    chosen = np.array(BLOCKS)[rng.integers(0, len(BLOCKS), count)].repeat(4, axis=0)
    points = rng.integers(chosen[:, 0], chosen[:, 1] + 1)
    return from_points(np.where(rng.random(4 * count) < 0.25, rng.integers(32, 127, 4 * count), points), 4)


def any_points(rng: np.random.Generator, count: int) -> list[str]:
    points = rng.integers(0, 0x110000 - 0x800, 3 * count)
    return from_points(points + 0x800 * (points >= 0xD800), 3)


def spaces(rng: np.random.Generator, count: int) -> list[str]:
    """All kinds of white space, and what looks like it, between letters, digits and signs."""
    return join_picked(rng, count, [*SPACES, *NEWLINES * 2, " ", " ", "\n", "\t", "a", "x1", "!", "é", "中", "'s"], 5)


def digits(rng: np.random.Generator, count: int) -> list[str]:
    """Numbers of every system: in threes by some patterns, one by one or all together by others."""
    return join_picked(rng, count, [*DIGITS, *"0123456789" * 30, *" .,٫a-" * 20], 6)


def marks(rng: np.random.Generator, count: int) -> list[str]:
    """Letters under heaps of marks, and marks without a letter."""
    return join_picked(rng, count, [*MARKS, *"aAéжक中 1'\n" * 90], 5)


def joiners(rng: np.random.Generator, count: int) -> list[str]:
    return join_picked(rng, count, [*EMOJI, *JOINERS * 4, "a", " "], 5)


def cases(rng: np.random.Generator, count: int) -> list[str]:
    """Upper, lower, title and modifier letters in any order, which o200k cuts by case."""
    return join_picked(rng, count, [*CASED, *CONTRACTIONS, *MARKS[:6], " ", "\n", "1"], 6)


def runs(rng: np.random.Generator, count: int) -> list[str]:
    """One atom or two by turns, a few times, and one time in 1000 some hundred times: what merges with itself."""
    first = rng.integers(0, len(ATOMS), count).tolist()
    second = rng.integers(0, len(ATOMS), count).tolist()
    times = (rng.geometric(0.3, count) + 300 * (rng.random(count) < 0.001)).tolist()
    return [
        (ATOMS[a] if n % 3 else ATOMS[a] + ATOMS[b]) * n + ATOMS[b] * (n % 2) for a, b, n in zip(first, second, times)
    ]


def look_alikes(rng: np.random.Generator, count: int) -> list[str]:
    """Names of special tokens, whole and cut, in text."""
    pieces = [name[:cut] for name in LOOK_ALIKES for cut in range(1, len(name))]
    return join_picked(rng, count, [*LOOK_ALIKES * 8, *pieces, " ", "\n", "a", "<|", "|>"], 2)


FAMILIES: dict[str, Family] = {
    family.__name__: family  # type: ignore[attr-defined]
    for family in (
        *(mixed, words, ascii_text, one_block, any_points, spaces, digits, marks, joiners, cases, runs, look_alikes),
    )
}


def from_points(points: np.ndarray, length: int) -> list[str]:
    """Strings of `length` code points; those of surrogates become their private neighbours."""
    points = np.where((points >= 0xD800) & (points < 0xE000), points + 0x800, points)
    text = points.astype("<u4").tobytes().decode("utf-32-le")
    return [text[i : i + length] for i in range(0, len(text), length)]


def torture_strings(count: int, seed: int) -> list[str]:
    """`count` strings, about as many of each family."""
    rng = np.random.default_rng(seed)
    share = -(-count // len(FAMILIES))
    return list(itertools.chain.from_iterable(family(rng, share) for family in FAMILIES.values()))[:count]


def torture_bytes(count: int, seed: int) -> list[bytes]:
    """`count` byte strings: random ones, and UTF-8 that was cut, mixed up or overwritten."""
    rng = np.random.default_rng(seed)
    third = -(-count // 3)
    lengths = rng.integers(0, 24, third)
    blob = rng.integers(0, 256, lengths.sum(), dtype=np.uint8).tobytes()
    ends = np.cumsum(lengths).tolist()
    random_bytes = [blob[begin:end] for begin, end in itertools.pairwise([0, *ends])]
    bad = [b"\x80", b"\xbf\xbf", b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xf0\x80\x80\x80"]
    bad += [b"\xf4\x90\x80\x80", b"\xf5", b"\xfe", b"\xff\xff", b"\xc3", b"\xe4\xb8", b"\xf0\x9f\x98", b"\x00"]
    atoms = [*(atom.encode() for atom in ATOMS), *bad * 12]
    ends = np.cumsum(rng.integers(1, 6, third)).tolist()
    picked = list(map(atoms.__getitem__, rng.integers(0, len(atoms), ends[-1]).tolist()))
    damaged = [b"".join(picked[begin:end]) for begin, end in itertools.pairwise([0, *ends])]
    whole = [text.encode() for text in torture_strings(third, seed + 1)]
    begins, cuts = rng.integers(0, 4, third).tolist(), rng.integers(0, 4, third).tolist()
    chopped = [text[begin : max(0, len(text) - cut)] for text, begin, cut in zip(whole, begins, cuts)]
    return [*random_bytes, *damaged, *chopped][:count]
