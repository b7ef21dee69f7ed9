"""Fuzzes the readers of tokenizer files: any bytes are read, or refused by a ValueError, OSError or TypeError.

`python tools/fuzz_tokenizer.py READER [--runs N] [--seconds S]` (READER: tiktoken, huggingface, sentencepiece, tekken,
counts, manifest) needs `pip install atheris` and stops at the first other exception, at an input that takes longer than
a second for each MB (at least one second), and at 256 MB of memory beyond the interpreter's own. Inputs that it kept
and those it stopped at are in --corpus DIR (a temporary folder otherwise).
"""

import argparse
import base64
import contextlib
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

REFUSALS = (ValueError, OSError, TypeError)
MAX_LEN = 1 << 14
MEMORY_MB = 256


def byte_tokens() -> dict[bytes, int]:
    """A vocabulary that is small and whole."""
    ranks = {bytes([b]): b for b in range(256)}
    return ranks | {token: 256 + i for i, token in enumerate((b"ab", b" t", b" th", b"\xc3\xa9", b"aaab", b"aaa"))}


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

    with contextlib.suppress(*REFUSALS):
        huggingface_characters.read_merges(path)
    use(huggingface.read(path, ignore_normalizer=True))


def read_sentencepiece(path: Path) -> None:
    """Reads a model, cuts a text with it, and writes it."""
    from herdkern.tokenizer.formats import sentencepiece_export, sentencepiece_file
    from herdkern.tokenizer.formats.sentencepiece import SentencePieceTokenizer

    with contextlib.suppress(*REFUSALS):
        use(sentencepiece_export.read(path))
    tokenizer = SentencePieceTokenizer.load(path)
    sentencepiece_file.to_bytes(tokenizer.model)
    len(tokenizer.merges)
    tokenizer.decode(tokenizer.encode("the  the é 日本"))


def read_tekken(path: Path) -> None:
    """Reads a tekken.json."""
    from herdkern.tokenizer.formats import tekken

    use(tekken.read(path))


def read_manifest(path: Path) -> None:
    """Reads a folder of ours with these bytes as its manifest."""
    from herdkern.tokenizer.formats import files

    manifest = path.parent / files.MANIFEST
    manifest.write_bytes(path.read_bytes())
    use(files.read(path.parent))


def read_counts(path: Path) -> None:
    """Reads a file of word counts as it is, and once more with its checksums put right: they hide all else."""
    from herdkern.tokenizer import WordCounts
    from herdkern.tokenizer.counts_file import iter_counts

    data = path.read_bytes()
    for content in (data, with_checksums(data)):
        path.write_bytes(content)
        for read in (lambda: list(WordCounts.load(path).items()), lambda: list(iter_counts(path))):
            with contextlib.suppress(*REFUSALS):
                read()
    WordCounts.load(path)


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
    """Makes the tokenizer and encodes a few words."""
    from herdkern.tokenizer import Tokenizer
    from herdkern.tokenizer.formats.contents import Contents

    assert isinstance(contents, Contents)
    pattern = contents.split_pattern or "llama3"
    tokenizer = Tokenizer(contents.mergeable_ranks, contents.special_tokens, pattern)
    ids = tokenizer.encode_ordinary("the  thé 123 aaaab")
    assert tokenizer.decode(ids) == "the  thé 123 aaaab"


def seeds(reader: str, folder: Path) -> list[bytes]:
    """A few files of the reader's format, and parts of them."""
    from herdkern.tokenizer import Tokenizer, WordCounts
    from herdkern.tokenizer.formats import files, sentencepiece_export, sentencepiece_file, tekken

    whole = Tokenizer(byte_tokens(), {"<s>": 300, "</s>": 301})
    if reader == "tiktoken":
        files.save(whole, folder / "seed", format="tiktoken", verify=False)
        return [(folder / "seed").read_bytes(), b"YQ== 0\nYg== 1\nYWI= 2\n", b"= 0\n", b"YQ== 0"]
    if reader == "huggingface":
        files.save(whole, folder / "seed", format="huggingface", verify=False)
        small = json.loads((folder / "seed").read_text())
        small["model"] |= {"vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3}, "merges": ["a b"]}
        characters = json.loads(json.dumps(small))
        characters |= {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}}
        return [(folder / "seed").read_bytes(), *(json.dumps(s).encode() for s in (small, characters))]
    if reader == "sentencepiece":
        of_type = sentencepiece_file.PieceType
        pieces = [
            sentencepiece_file.Piece("<unk>", 0.0, of_type.UNKNOWN),
            sentencepiece_file.Piece("<s>", 0.0, of_type.CONTROL),
        ]
        pieces += [
            sentencepiece_file.Piece(t, -float(i)) for i, t in enumerate(("▁t", "he", "▁the", "t", "h", "e", "▁"))
        ]
        pieces += [
            sentencepiece_file.Piece("é", 0.0, of_type.USER_DEFINED),
            sentencepiece_file.Piece("th", -9.0, of_type.UNUSED),
        ]
        plain = sentencepiece_file.ModelFile(pieces=tuple(pieces), settings=sentencepiece_file.Settings())
        mapped = sentencepiece_file.with_settings(plain, sentencepiece_export.settings())
        return [sentencepiece_file.to_bytes(plain), sentencepiece_file.to_bytes(mapped)]
    if reader == "tekken":
        vocabulary = [
            {"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate((b"a", b"b", b"ab"))
        ]
        config = {"pattern": "\\w+|\\W+", "default_vocab_size": 5, "default_num_special_tokens": 2, "version": "v3"}
        special = [{"rank": 0, "token_str": "<s>"}, {"rank": 1, "token_str": "</s>"}]
        small = {"config": config, "vocab": vocabulary}
        files.save(
            Tokenizer(*tekken.renumbered(byte_tokens(), {"<s>": 0})), folder / "seed", format="tekken", verify=False
        )
        whole_one = json.loads((folder / "seed").read_text())
        for entry in whole_one["vocab"]:
            del entry["token_str"]
        contents = [small, small | {"special_tokens": special}, whole_one]
        return [json.dumps(content, separators=(",", ":")).encode() for content in contents]
    if reader == "manifest":
        files.save(whole, folder, verify=False)
        return [(folder / files.MANIFEST).read_bytes()]
    counts = WordCounts()
    counts.add(["the thé the 123 then there", "a b c " + "d" * 300])
    counts.save(folder / "seed")
    return [(folder / "seed").read_bytes()]


READERS: dict[str, Callable[[Path], None]] = {
    "tiktoken": read_tiktoken,
    "huggingface": read_huggingface,
    "sentencepiece": read_sentencepiece,
    "tekken": read_tekken,
    "counts": read_counts,
    "manifest": read_manifest,
}


def one_input(reader: str, path: Path, data: bytes) -> bool:
    """Reads one input; True if it was accepted. Raises: whatever is no refusal; AssertionError if it took too long."""
    path.write_bytes(data)
    begin = time.process_time()
    try:
        READERS[reader](path)
        accepted = True
    except REFUSALS as error:
        accepted = False
        if not str(error):
            raise AssertionError("a refusal must say what is wrong") from error
    seconds = time.process_time() - begin
    assert seconds <= max(1.0, len(data) / 1e6), f"{len(data)} bytes took {seconds:.1f} s"
    return accepted


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--runs", type=int, default=5_000_000)
    parser.add_argument("--seconds", type=int, default=0, help="stop after this time; 0: after --runs")
    parser.add_argument("--corpus", type=Path)
    args = parser.parse_args()
    try:
        import atheris
    except ImportError:
        print("fuzz_tokenizer: needs atheris; pip install atheris", file=sys.stderr)
        return 1
    in_memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    scratch = Path(tempfile.mkdtemp(prefix="fuzz_", dir=in_memory))
    corpus = args.corpus or Path(tempfile.mkdtemp(prefix=f"fuzz_{args.reader}_"))
    corpus.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=["herdkern.tokenizer"]):
        for number, seed in enumerate(seeds(args.reader, scratch)):
            (corpus / f"seed_{number}").write_bytes(seed)
            assert one_input(args.reader, scratch / "input", seed) or number or args.reader != "tiktoken"
    counters = [0, 0]

    def target(data: bytes) -> None:
        counters[0] += 1
        counters[1] += one_input(args.reader, scratch / "input", data)
        if counters[0] % 100_000 == 0:
            print(f"{args.reader}: {counters[0]:,} inputs, {counters[1]:,} accepted", flush=True)

    options = [f"-runs={args.runs}", f"-max_len={MAX_LEN}", "-timeout=5", f"-rss_limit_mb={MEMORY_MB}"]
    options += [f"-max_total_time={args.seconds}"] if args.seconds else []
    options += [f"-artifact_prefix={corpus}/", "-print_final_stats=1", "-use_value_profile=1"]
    print(f"{args.reader}: corpus in {corpus}", flush=True)
    atheris.Setup([sys.argv[0], *options, str(corpus)], target)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
