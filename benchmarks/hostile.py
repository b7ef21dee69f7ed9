"""Texts of any length that are slow for some tokenizer: runs that merge with themselves, words without an end."""

import random
from collections.abc import Callable

Family = Callable[[int], str]  # characters -> text of as many, nearly


def run(unit: str) -> Family:
    return lambda n: unit * (n // len(unit))


def drawn(letters: str, seed: int = 1) -> Family:
    return lambda n: "".join(random.Random(seed).choices(letters, k=n))


def fibonacci(n: int) -> str:
    """a, ab, aba, abaab, …: as few different parts as a word without a period can have."""
    before, last = "a", "ab"
    while len(last) < n:
        before, last = last, last + before
    return last[:n]


def doublings(n: int) -> str:
    """Runs of 1, 2, 4, … letters, so that every power of a merge is at hand."""
    text = ""
    size = 1
    while len(text) < n:
        text += "a" * size + "b"
        size = size * 2 if size < n // 4 else 1
    return text[:n]


FAMILIES: dict[str, Family] = {
    "one letter": run("a"),
    "one capital": run("A"),
    "two letters by turns": run("ab"),
    "two letters at random": drawn("ab"),
    "Fibonacci word": fibonacci,
    "runs that double": doublings,
    "letters at random": drawn("abcdefghijklmnopqrstuvwxyz"),
    "common letters at random": drawn("etaoinshr"),
    "DNA": drawn("ACGT"),
    "Base64": drawn("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"),
    "hexadecimal": drawn("0123456789abcdef"),
    "one digit": run("0"),
    "digits at random": drawn("0123456789"),
    "Arabic digits": run("٣"),
    "spaces": run(" "),
    "spaces before a letter": lambda n: " " * (n - 1) + "a",
    "tabs": run("\t"),
    "line ends": run("\n"),
    "Windows line ends": run("\r\n"),
    "spaces and line ends": run(" \n"),
    "no-break spaces": run("\u00a0"),
    "ideographic spaces": run("\u3000"),
    "hyphens": run("-"),
    "signs at random": drawn("!#$%&*+-./:;<=>?@^_|~"),
    "brackets": lambda n: "[" * (n // 2) + "]" * (n // 2),
    "apostrophes": run("'s"),
    "cut special tokens": run("<|endoftext|"),
    "emoji of a family": run("👩\u200d👩\u200d👧\u200d👦"),
    "joiners": run("\u200d"),
    "flags": run("🇩🇪"),
    "one ideograph": run("中"),
    "ideographs at random": lambda n: "".join(map(chr, random.Random(2).choices(range(0x4E00, 0x9FA5), k=n))),
    "Hangul at random": lambda n: "".join(map(chr, random.Random(3).choices(range(0xAC00, 0xD7A3), k=n))),
    "Thai without spaces": run("ฉันกินกระจกได้แต่มันไม่ทำให้ฉันเจ็บ"),
    "marks on one letter": lambda n: "e" + "\u0301" * (n - 1),
    "letters with marks": run("e\u0301"),
    "capitals and small by turns": run("aB"),
    "control characters": run("\x00\x01"),
}
