"""The readers that fuzz_tokenizer.py feeds: what each does with a file, small files of its format, words of its syntax.

A reader in Python takes the path of the input, which lies in HELD and in no file system (that of `counts`, which native
code opens, in a file). Those in C++ are in fuzz_native.cpp; here are their seeds alone.
"""

import base64
import contextlib
import functools
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

REFUSALS = (ValueError, OSError, TypeError)
NATIVE = ("json_lines", "patterns", "merges", "runs", "texts")
OF_JSON = ("huggingface", "tekken", "manifest")
# Longest inputs in bytes: every field of a format twice, and still thousands of executions a second.
MAX_LEN = {
    **{"tiktoken": 256, "huggingface": 1024, "sentencepiece": 256, "tekken": 512, "counts": 384, "manifest": 1024},
    **{"json_lines": 512, "patterns": 96, "merges": 256, "runs": 512, "texts": 512},
}
# What a change of bytes hardly finds, as libFuzzer's dictionaries write it.
WORDS: dict[str, tuple[str, ...]] = {
    "tiktoken": ("YQ== ", "= 0", "YWI= 2147483648", "-1", "IQ=="),
    "sentencepiece": (
        r"\xe2\x96\x81",
        "<0x0A>",
        "<unk>",
        r"\x12\x00",
        r"\x0a\x00",
        r"\x1a\x00",
        r"\xff\xff\xff\xff\x0f",
    ),
    "counts": ("herdkern word counts 1", r"\"split_pattern\"", r"\"unicode\"", r"\"num_words\"", "1e999", "NaN"),
    "json_lines": (r"\"text\"", r"{\"text\": \"", r"\\u00e9", r"\\ud83d\\ude00", "null", "true", "-1.5e+5", "[{}]"),
    "patterns": (
        *(
            r"\\p{L}",
            r"\\P{Lu}",
            r"\\p{Han}",
            r"\\s",
            r"\\S",
            r"\\d",
            r"\\w",
            r"\\W",
            "(?i:",
            "(?:",
            "(?!",
            "(?=",
            "(?i)",
        ),
        *("{1,3}", "{2,}", "{,4}", "++", "*?", "?+", "[^", "&&", "--", r"\\x{41}", r"\\u4e2d", r"\\A", r"\\z", "$"),
    ),
    "merges": (r"\xe4\xb8\xad", "abab"),
    "runs": (r"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", r"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
    "texts": ("<|end|>", "<|e", "'ll", "'S", r"\x0d\x0a", r"\xe3\x80\x80", r"\xe2\x80\x8d", "123", " the"),
}


# Files in memory by their paths: opening one takes a tenth of the time of reading it.
HELD: dict[str, bytes] = {}


def hold_files() -> None:
    """From now on Path.read_bytes and Path.read_text look into HELD before they open a file."""
    from_file, text_from_file = Path.read_bytes, Path.read_text

    def read_bytes(self: Path) -> bytes:
        data = HELD.get(str(self))
        return from_file(self) if data is None else data

    def read_text(self: Path, encoding: str | None = None, errors: str | None = None) -> str:
        data = HELD.get(str(self))
        return text_from_file(self, encoding, errors) if data is None else data.decode(encoding or "utf-8")

    Path.read_bytes, Path.read_text = read_bytes, read_text  # type: ignore[method-assign, assignment]


@functools.cache
def _named(path: Path, name: str) -> Path:
    return path.with_name(name)


def put(path: Path, data: bytes) -> None:
    """The bytes as the content of a file that native code may open; it is kept open."""
    if path not in _OPEN:
        _OPEN[path] = os.open(path, os.O_RDWR | os.O_CREAT)
    os.truncate(_OPEN[path], len(data))
    os.pwrite(_OPEN[path], data, 0)


_OPEN: dict[Path, int] = {}


class Chosen:
    """What the hash of the input at hand chose. used: its vocabulary is used as well, which costs more than reading it
    (one in 64). other: it is read by the other of two ways to read its format (one in four)."""

    used = other = True


def read_tiktoken(path: Path) -> None:
    """Reads ranks, recovers their merges and encodes with them."""
    from herdkern.tokenizer.formats import tiktoken
    from herdkern.tokenizer.formats.merge_recovery import merges_of_ranks

    contents = tiktoken.read(path)
    merges_of_ranks(contents.mergeable_ranks)
    use(contents)


def read_huggingface(path: Path) -> None:
    """Reads a tokenizer.json over bytes and one over characters."""
    from herdkern.tokenizer.formats import huggingface, huggingface_characters

    if Chosen.other:
        huggingface_characters.read_merges(path)
    else:
        use(huggingface.read(path, ignore_normalizer=True))


def read_sentencepiece(path: Path) -> None:
    """Reads a model, cuts a text with it, and writes it; half of the bytes are also taken for the trie of a map of
    characters, which would not fit into so short a model."""
    from herdkern import _text
    from herdkern.tokenizer.formats import sentencepiece_export, sentencepiece_file
    from herdkern.tokenizer.formats.sentencepiece import SentencePieceTokenizer

    data = HELD[str(path)]
    with contextlib.suppress(*REFUSALS):
        _text.CharsMap((len(data) // 8 * 4).to_bytes(4, "little") + data).map(b"the  \xc3\xa9\xff\0")
    if Chosen.other:
        use(sentencepiece_export.read(path))
        return
    tokenizer = SentencePieceTokenizer.load(path)
    sentencepiece_file.to_bytes(tokenizer.model)
    len(tokenizer.merges)
    if Chosen.used:
        tokenizer.decode(tokenizer.encode("the  the é 日本"))


def read_tekken(path: Path) -> None:
    """Reads a tekken.json."""
    from herdkern.tokenizer.formats import tekken

    use(tekken.read(path))


def read_manifest(path: Path) -> None:
    """Reads a folder with these bytes as its manifest, three times in four with the hash that it should name."""
    from herdkern.tokenizer.formats import files

    manifest = _named(path, files.MANIFEST)
    data = HELD[str(path)]
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(data)
        if isinstance(content, dict) and "sha256" in content and not Chosen.other:
            content["sha256"] = files._own_hash(content)
            data = json.dumps(content).encode()
    HELD[str(manifest)] = data
    use(files.read(manifest))


def read_counts(path: Path) -> None:
    """Reads word counts in both ways; three times in four with the checksums put right that hide all else."""
    from herdkern.tokenizer import WordCounts
    from herdkern.tokenizer.counts_file import iter_counts

    data = HELD[str(path)]
    put(path, data if Chosen.other else with_checksums(data))
    with contextlib.suppress(*REFUSALS):
        list(iter_counts(path))
    list(WordCounts.load(path).items())


def with_checksums(data: bytes) -> bytes:
    """A counts file with the checksums, lengths and totals that its blocks and header should have."""
    magic, _, rest = data.partition(b"\n")
    line, _, run = rest.partition(b"\n")
    blocks, check, at = bytearray(), 0, 0
    num_blocks = 0
    while at + 8 <= len(run):
        size = min(int.from_bytes(run[at : at + 4], "little"), len(run) - at - 8)
        payload = run[at + 8 : at + 8 + size]
        crc = zlib.crc32(payload).to_bytes(4, "little")
        blocks += size.to_bytes(4, "little") + crc + payload
        check, at, num_blocks = zlib.crc32(crc, check), at + 8 + size, num_blocks + 1
    text = line[9:]
    with contextlib.suppress(ValueError, RecursionError):
        header = json.loads(text)
        if isinstance(header, dict):
            text = json.dumps(header | {"num_bytes": len(blocks), "num_blocks": num_blocks, "check": check}).encode()
    text += b"\n"
    return magic + b"\n" + f"{zlib.crc32(text):08x} ".encode() + text + blocks


def use(contents: object) -> None:
    """Makes the tokenizer, of a vocabulary that lacks single bytes with them, and encodes a few words."""
    from herdkern.tokenizer import Tokenizer
    from herdkern.tokenizer.formats.contents import Contents

    assert isinstance(contents, Contents)
    if not Chosen.used:
        return
    ranks, special = dict(contents.mergeable_ranks), contents.special_tokens
    free = max([0, *ranks.values(), *special.values()]) + 1
    for byte in range(256):
        if bytes([byte]) not in ranks:
            ranks[bytes([byte])] = free + byte
    tokenizer = Tokenizer(ranks, special, contents.split_pattern or "llama3")
    ids = tokenizer.encode_ordinary("the  thé 123 aaaab")
    assert tokenizer.decode(ids) == "the  thé 123 aaaab"


READERS: dict[str, Callable[[Path], None]] = {
    "tiktoken": read_tiktoken,
    "huggingface": read_huggingface,
    "sentencepiece": read_sentencepiece,
    "tekken": read_tekken,
    "counts": read_counts,
    "manifest": read_manifest,
}


def seeds(reader: str, folder: Path) -> list[bytes]:
    """A few small files of the reader's format. folder: where they may be made; of `manifest`, whose files stay."""
    if reader in NATIVE:
        return _native_seeds(reader, folder)
    if reader == "tiktoken":
        return [b"YQ== 0\nYg== 1\nYWI= 2\n", b"= 0\n", b"YQ== 0", b"IA== 7\ndA== 3\nIHQ= 9\naGU= 8\naA== 1\nZQ== 2\n"]
    if reader == "huggingface":
        return [json.dumps(one).encode() for one in _huggingface_seeds()]
    if reader == "sentencepiece":
        return _sentencepiece_seeds()
    if reader == "tekken":
        words = [{"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate((b"a", b"b", b"ab"))]
        config = {"pattern": "\\w+|\\W+", "default_vocab_size": 5, "default_num_special_tokens": 2, "version": "v3"}
        special = [{"rank": 0, "token_str": "<s>"}, {"rank": 1, "token_str": "</s>"}]
        small = {"config": config, "vocab": words}
        return [json.dumps(one).encode() for one in (small, small | {"special_tokens": special})]
    if reader == "manifest":
        from herdkern.tokenizer import Tokenizer
        from herdkern.tokenizer.formats import files

        whole = Tokenizer({bytes([b]): b for b in range(256)} | {b"ab": 256}, {"<s>": 300, "</s>": 301}, "gpt2")
        files.save(whole, folder, verify=False)
        few = b"YQ== 0\nYg== 1\nYWI= 2\n"  # so that many manifests are read
        (folder / files.MODEL).write_bytes(few)
        HELD[str(folder / files.MODEL)] = few
        content = json.loads((folder / files.MANIFEST).read_bytes())
        content["files"] = {files.MODEL: files._describe(folder / files.MODEL)}
        content["sha256"] = files._own_hash(content)
        return [json.dumps(content).encode()]
    return [_counts_seed(folder)]


def _counts_seed(folder: Path) -> bytes:
    from herdkern.tokenizer import WordCounts

    counts = WordCounts("\\w+|\\W+")
    counts.add(["the thé the 123 then there", "a b c " + "d" * 30])
    counts.save(folder / "seed")
    header, end, run = (folder / "seed").read_bytes().partition(b"}")
    return header + end + b"\n" + run.partition(b"\n")[2]  # without the padding; checksums are put right


def _huggingface_seeds() -> list[dict[str, Any]]:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3}, "merges": ["a b"], "ignore_merges": False}
    split = {"type": "Split", "pattern": {"Regex": "\\w+|\\W+"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    added = [{"id": 3, "content": "<s>", "special": True, "lstrip": False}]
    small: dict[str, Any] = {"normalizer": None, "pre_tokenizer": steps, "added_tokens": added, "model": model}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}
    pairs = {**model, "merges": [["a", "b"]]}
    return [small, small | {"normalizer": prepend}, small | {"model": pairs, "normalizer": {"type": "NFC"}}]


def _sentencepiece_seeds() -> list[bytes]:
    from herdkern.tokenizer.formats import sentencepiece_export, sentencepiece_file

    of_type = sentencepiece_file.PieceType
    pieces = [
        sentencepiece_file.Piece("<unk>", 0.0, of_type.UNKNOWN),
        sentencepiece_file.Piece("<s>", 0.0, of_type.CONTROL),
    ]
    pieces += [sentencepiece_file.Piece(t, -float(i)) for i, t in enumerate(("▁t", "he", "▁the", "t", "h", "e", "▁"))]
    plain = sentencepiece_file.ModelFile(pieces=tuple(pieces), settings=sentencepiece_file.Settings())
    more = sentencepiece_file.Piece("é", 0.0, of_type.USER_DEFINED), sentencepiece_file.Piece("th", -9, of_type.UNUSED)
    plain_text = sentencepiece_file.Settings(add_dummy_prefix=False, remove_extra_whitespaces=False)
    ours = sentencepiece_file.Settings(normalizer=sentencepiece_export.NORMALIZER, escape_whitespaces=False)
    models = [plain, sentencepiece_file.ModelFile(pieces=(*pieces, *more), settings=plain_text)]
    models.append(sentencepiece_file.with_settings(plain, ours))
    return [sentencepiece_file.to_bytes(model) for model in models]


def _native_seeds(reader: str, folder: Path) -> list[bytes]:
    if reader == "json_lines":
        lines = [
            '{"text": "a\\u00e9\\n\\ud83d\\ude00 é", "id": "1"}',
            '{"meta": {"a": [1, -2.5e3, true, null]}, "text": ""}',
        ]
        return [line.encode() for line in lines]
    if reader == "patterns":
        from herdkern.tokenizer.pretokenize import SPLIT_PATTERNS

        whole = [p for value in SPLIT_PATTERNS.values() for p in ([value] if isinstance(value, str) else value)]
        parts = {part for pattern in whole for part in pattern.split("|") if len(part) <= 90}
        some = [
            r"a{2,}+b|[a-z&&[^x]]+?\0ab",
            r"\s+(?!\S)|\S+\0 a ",
            r"(?i)[k-s]+|.\0Kſ",
            "[^\\r\\n\\p{L}]?\\p{L}+|\\p{N}{1,3}",
        ]
        return [one.replace(r"\0", "\0").encode() for one in (*some, *sorted(parts))]
    if reader == "merges":
        return [b"0a\nb\nab\nabab\n", "1中\n文\n中文\n▁the\n".encode(), b"0aa\naaaa\na\naaa\n"]
    if reader == "runs":
        data = _counts_seed(folder)
        return [data.split(b"\n", 2)[2]]
    texts = ["the  thé's 123 aaaab\r\n\n x", "<|end|> I'LL 你好、世界 ١٢٣ \u3000\u200d", "ÀÉ ǅa ̈e \t\t\n  \n a"]
    return [f"{i}{text}".encode() for i, text in enumerate(texts * 2)]
