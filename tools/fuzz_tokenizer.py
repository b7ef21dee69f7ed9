"""Fuzzes the readers of tokenizer files: any bytes are read, or refused by a ValueError, OSError or TypeError.

    python tools/fuzz_tokenizer.py READER [--runs N] [--seconds S] [--corpus DIR] [--sanitizer] [--grow]

tiktoken, huggingface, sentencepiece, tekken, counts, manifest: the readers in Python, by atheris (pip install atheris).
json_lines, patterns, merges, runs, texts: the readers in C++, by libFuzzer (needs clang++; CXX may name it).

An execution is one input through one reader. The run stops at the first exception that is no refusal, at an input that
takes more than a second of CPU time for each MB (at least one second), and at 256 MB of memory, interpreter included.
JSON is changed as bytes and, three times in four, as a value, so that most of it stays JSON. The vocabulary that was
read is completed by the single bytes it lacks and used for one input in 64; so is a pattern. --sanitizer builds
the native readers with AddressSanitizer and UndefinedBehaviorSanitizer, whose own memory comes on top of the limit.
Inputs that were kept and those it stopped at are in --corpus (a temporary folder otherwise). --grow reads each kept
input once more, repeated to a megabyte, so that time and memory that grow faster than the input are seen.
"""

import argparse
import gc
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_readers import HELD, MAX_LEN, NATIVE, OF_JSON, READERS, REFUSALS, WORDS, Chosen, hold_files, seeds

ROOT = Path(__file__).resolve().parent.parent
MEMORY_MB = 256
MOST_ACCEPTED = 256  # accepted inputs that further ones are made of
HANG_SECONDS = 600  # of the clock on the wall, for libFuzzer's own limit: CPU time is looked at after each input
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
LEVELS = {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
LEVELS["vbmi2"] = [*LEVELS["avx512"], "-mavx512vbmi2"]


def one_input(reader: str, path: Path, data: bytes) -> bool:
    """Reads one input; True if it was accepted. Raises: whatever is no refusal; AssertionError if it took too long."""
    HELD[str(path)] = data
    begin = time.process_time()
    draw = zlib.crc32(data)
    Chosen.used, Chosen.other = draw % 64 == 0, draw >> 8 & 3 == 0
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


STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 255, 256, 1 << 21, 1 << 31, 1 << 63, 1 << 70, 0.5, 1e300, "", "a", "ab", "b"),
    *("é", "Ġ", "\ud800", "<s>", "a b", "\\p{L}+|.", "(", "[]", [], {}, [[]], ["a", "b"], {"type": "Sequence"}, "BPE"),
    *(
        "Split",
        "ByteLevel",
        "Digits",
        "NFKC",
        "Metaspace",
        "Prepend",
        "Removed",
        {"String": "a"},
        {"type": "ByteLevel"},
    ),
)


def change_value(value: Any, draw: random.Random) -> Any:
    """The value with one place changed: replaced, removed, doubled, moved, or a number or text close to what it was."""
    if not value:
        return draw.choice(STRANGE)
    inner, key = _place(value, draw)
    old = inner[key]
    kind = draw.randrange(6)
    if kind == 0:
        inner[key] = draw.choice(STRANGE)
    elif kind == 1:
        del inner[key]
    elif kind == 2:
        source, other = _place(value, draw)
        taken = source[other]
        inner[key] = taken if not isinstance(taken, dict | list) else json.loads(json.dumps(taken))
    elif isinstance(inner, list) and kind == 3:
        inner.insert(draw.randrange(len(inner) + 1), old)
    elif isinstance(inner, dict) and kind == 3:
        inner[draw.choice(("a", "b", "abab", "type", "ba", str(key) + "b", str(draw.randrange(300))))] = old
    elif isinstance(old, str):
        place = draw.randrange(len(old) + 1)
        inner[key] = (
            old[:place] + draw.choice(("", "a", "b", " ", "\\", "|", "é", "+", "(", "=")) + old[place + kind % 2 :]
        )
    elif isinstance(old, int):
        inner[key] = old + draw.choice((-1, 1, 2, 255, 256))
    else:
        inner[key] = draw.choice(STRANGE)
    return value


def _place(value: Any, draw: random.Random) -> tuple[Any, Any]:
    """A list or object in `value` and a key of it, drawn on the way down."""
    while True:
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.15:
            return value, key
        value = inner


def mutator(
    mutate: Callable[[bytes, int], bytes], of_json: bool, accepted: list[bytes]
) -> Callable[[bytes, int, int], bytes]:
    """A mutator for atheris. Most of what libFuzzer keeps is refused in a new way; so that reading gets far, one input
    in three is made of one that was accepted. JSON is changed as a value three times in four, else its bytes are."""
    draw = random.Random(17)

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        if accepted and not draw.randrange(3):
            data = draw.choice(accepted)
        if of_json and draw.randrange(4):
            try:
                value = json.loads(data)
                for _ in range(1 + draw.randrange(3)):
                    value = change_value(value, draw) if isinstance(value, dict | list) else draw.choice(STRANGE)
                changed = json.dumps(value).encode()
                if len(changed) <= max_size:
                    return changed
            except (ValueError, RecursionError):
                pass
        return mutate(data, max_size)

    return change


def native_sources(program: Path) -> list[Path]:
    """The source files that `program` needs, itself first: a header's file has its name, with a level or without."""
    needed, left = {program}, [program]
    while left:
        for name in re.findall(r'^#include "([^"]+)"', left.pop().read_text("utf-8"), re.M):
            header = ROOT / "csrc" / name
            files = [header.with_name(f"{header.stem}{level}.cpp") for level in ("", *(f"_{one}" for one in LEVELS))]
            fresh = {path for path in (header, *files) if path.exists()} - needed
            needed |= fresh
            left += fresh
    return [program, *sorted(path for path in needed - {program} if path.suffix == ".cpp")]


def build_native(sanitizer: bool) -> Path:
    """Compiles the native readers with libFuzzer, what changed alone, and returns the program."""
    compiler = os.environ.get("CXX") or shutil.which("clang++")
    if not compiler:
        sys.exit("fuzz_tokenizer: a native reader needs clang++ with libFuzzer on PATH, or named by CXX; got none")
    folder = ROOT / "build" / ("fuzz-sanitizer" if sanitizer else "fuzz")
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O2", "-g1", "-DHK_X86=1", f"-I{ROOT / 'csrc'}", "-pthread", *SANITIZERS * sanitizer]
    newest = max(header.stat().st_mtime for header in (ROOT / "csrc").rglob("*.h"))
    objects = []
    for source in native_sources(ROOT / "tools/fuzz_native.cpp"):
        made = folder / f"{source.stem}.o"
        objects.append(str(made))
        if not made.exists() or made.stat().st_mtime < max(newest, source.stat().st_mtime):
            level = LEVELS.get(source.stem.rpartition("_")[2], [])
            command = [compiler, *flags, "-fsanitize=fuzzer-no-link", *level, "-c", str(source), "-o", str(made)]
            subprocess.run(command, check=True)
    program = folder / "fuzz_native"
    if not program.exists() or max(os.path.getmtime(made) for made in objects) > program.stat().st_mtime:
        fresh = folder / f"fuzz_native.{os.getpid()}"  # the program itself may be running
        link = [compiler, "-fsanitize=fuzzer", *SANITIZERS * sanitizer, "-pthread", *objects, "-o", str(fresh)]
        subprocess.run(link, check=True)
        fresh.replace(program)
    return program


def options_of(args: argparse.Namespace, corpus: Path) -> list[str]:
    """libFuzzer's options."""
    memory = 1024 if args.sanitizer else MEMORY_MB
    options = [f"-runs={args.runs}", f"-max_len={MAX_LEN[args.reader]}", f"-timeout={HANG_SECONDS}"]
    options += [f"-rss_limit_mb={memory}", f"-artifact_prefix={corpus}/", "-print_final_stats=1"]
    options += [f"-max_total_time={args.seconds}"] if args.seconds else []
    if words := WORDS.get(args.reader):
        dictionary = corpus.parent / f"{corpus.name}.words"
        dictionary.write_text("".join(f'"{word}"\n' for word in words))
        options.append(f"-dict={dictionary}")
    return options


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reader", choices=[*READERS, *NATIVE])
    parser.add_argument("--runs", type=int, default=5_000_000)
    parser.add_argument("--seconds", type=int, default=0, help="stop after this time; 0: after --runs")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument(
        "--grow", action="store_true", help="only read what is in --corpus, each repeated to a megabyte"
    )
    parser.add_argument("--sanitizer", action="store_true", help="native readers: AddressSanitizer and UBSan")
    args = parser.parse_args()
    corpus = args.corpus or Path(tempfile.mkdtemp(prefix=f"fuzz_{args.reader}_"))
    corpus.mkdir(parents=True, exist_ok=True)
    print(f"{args.reader}: corpus in {corpus}", flush=True)
    in_memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    scratch = Path(tempfile.mkdtemp(prefix="fuzz_", dir=in_memory))
    try:
        return (_run_native if args.reader in NATIVE else _run_python)(args, corpus, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def grown(reader: str, data: bytes) -> bytes:
    """The input repeated to a megabyte: JSON as a value whose lists and objects hold more, else the bytes."""
    if reader in OF_JSON:
        try:
            value = json.loads(data)
            longer = [_repeated(value, times) for times in (10_000, 1000, 100, 10)]
            return next((text for text in (json.dumps(one).encode() for one in longer) if len(text) <= 1 << 20), data)
        except (ValueError, RecursionError):
            pass
    head, rest = (data[:1], data[1:]) if reader in ("merges", "texts") else (b"", data)
    return head + rest * ((1 << 20) // max(1, len(rest)))


def _repeated(value: Any, times: int) -> Any:
    """The value whose innermost lists and objects hold so many times as much."""
    if isinstance(value, list):
        inner = [_repeated(one, times) for one in value]
        return inner if any(isinstance(one, list | dict) for one in value) else inner * times
    if isinstance(value, dict):
        inner = {key: _repeated(one, times) for key, one in value.items()}
        if inner and all(isinstance(one, int) for one in value.values()):
            inner |= {f"{key}{i}": one + i for i in range(times) for key, one in value.items()}
        return inner
    return value


def _run_native(args: argparse.Namespace, corpus: Path, scratch: Path) -> int:
    for number, seed in enumerate(seeds(args.reader, scratch)):
        (corpus / f"seed_{number}").write_bytes(seed)
    program = build_native(args.sanitizer)
    os.environ.setdefault("ASAN_OPTIONS", "quarantine_size_mb=8:detect_leaks=0")
    if args.grow:
        all_kept = sorted(corpus.iterdir())
        for begin in range(0, len(all_kept), 64):
            batch = [scratch / kept.name for kept in all_kept[begin : begin + 64]]
            for path in batch:
                path.write_bytes(grown(args.reader, (corpus / path.name).read_bytes()))
            command = [str(program), args.reader, f"-rss_limit_mb={MEMORY_MB}", *map(str, batch)]
            done = subprocess.run(command, capture_output=True, text=True)
            for path in batch:
                path.unlink()
            if done.returncode != 0:
                print(done.stderr[-3000:])
                return 1
        print(f"{args.reader}: {len(list(corpus.iterdir())):,} inputs of a megabyte")
        return 0
    shutil.rmtree(scratch)
    os.execv(program, [str(program), args.reader, *options_of(args, corpus), str(corpus)])


def _run_python(args: argparse.Namespace, corpus: Path, scratch: Path) -> int:
    hold_files()
    if args.grow:
        seeds(args.reader, scratch)  # the files of a manifest
        for kept in sorted(corpus.iterdir()):
            one_input(args.reader, scratch / "input", grown(args.reader, kept.read_bytes()))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"{args.reader}: {len(list(corpus.iterdir())):,} inputs of a megabyte, peak {peak} MiB")
        return peak > MEMORY_MB
    try:
        import atheris
    except ImportError:
        print("fuzz_tokenizer: needs atheris; pip install atheris", file=sys.stderr)
        return 1
    with atheris.instrument_imports(include=["herdkern.tokenizer.formats", "herdkern.tokenizer.counts_file"]):
        for number, seed in enumerate(seeds(args.reader, scratch)):
            (corpus / f"seed_{number}").write_bytes(seed)
            one_input(args.reader, scratch / "input", seed)
    gc.freeze()  # what an input leaves is counted; what was imported need not be looked at
    gc.set_threshold(20_000)
    accepted: list[bytes] = []
    counters = [0, 0]
    path = scratch / "input"

    def target(data: bytes) -> None:
        counters[0] += 1
        if one_input(args.reader, path, data):
            if len(accepted) < MOST_ACCEPTED:
                accepted.append(data)
            else:
                accepted[zlib.crc32(data) % MOST_ACCEPTED] = data
            counters[1] += 1
        if counters[0] % 100_000 == 0:
            print(f"{args.reader}: {counters[0]:,} inputs, {counters[1]:,} accepted", flush=True)

    change = mutator(lambda data, size: atheris.Mutate(data, size), args.reader in OF_JSON, accepted)
    atheris.Setup([sys.argv[0], *options_of(args, corpus), str(corpus)], target, custom_mutator=change)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
