"""Near-duplicate removal by herdkern and its peers, one candidate in a process; needs no more than the candidate.

    PYTHON benchmarks/dedup_peers.py CANDIDATE DOCUMENTS.jsonl FOLDER

Reads JSON lines, signs (128 slots, 5-word shingles), finds what agrees in one of 16 bands of 8 rows, decides who stays
and writes that to FOLDER, each candidate as its manual shows and on one core. Prints JSON: seconds, memory, the ids
that stayed. Nothing is compressed. The lines that the packages without files of their own keep are copied as they are.
The peers that take lists of shingles get them from Python's str.split, as their users do it. Imports and a first small
run are not measured.
"""

import contextlib
import importlib.metadata
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from apart import Meter
from machine import status_bytes

NUM_BANDS, ROWS_PER_BAND, NUM_SLOTS, NGRAM_SIZE, MIN_SIMILARITY = 16, 8, 128, 5, 0.7
Ids = Callable[[], Iterator[str]]  # of the documents that stayed; read when nothing is measured any more
Dedup = Callable[[Path, Path], Ids]
Flag = Callable[[list[str]], Sequence[bool]]  # texts -> which of them stay


def shingles(text: str) -> list[str]:
    """5-word shingles as a user of the peers cuts them; a shorter text is one shingle."""
    words = text.lower().split()
    windows = zip(*(words[i:] for i in range(NGRAM_SIZE)), strict=False)
    return list(map(" ".join, windows)) or [" ".join(words)]


def ids_of_lines(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        with open(path, encoding="utf-8") as lines:
            yield from (json.loads(line)["id"] for line in lines)


def herdkern(**settings: Any) -> Dedup:
    from herdkern.data.document import read_documents
    from herdkern.dedup import MinHashConfig, dedup_minhash
    from herdkern.engine import Run

    config = MinHashConfig(
        num_bands=NUM_BANDS, rows_per_band=ROWS_PER_BAND, ngram_size=NGRAM_SIZE, write_dropped=False,
        within_language=False, min_similarity=MIN_SIMILARITY, compression_level=0, **settings,
    )  # fmt: skip

    def dedup(path: Path, folder: Path) -> Ids:
        with Run(folder / "run") as run:
            (kept,) = dedup_minhash(run, [path], config).files("documents.jsonl.zst")
        return lambda: (document.id for document in read_documents(kept))

    return dedup


def in_memory(flag: Flag) -> Dedup:
    """Reading and writing around a package that has none."""

    def dedup(path: Path, folder: Path) -> Ids:
        with open(path, "rb") as f:
            lines = f.readlines()
        kept = flag([json.loads(line)["text"] for line in lines])
        out = folder / "kept.jsonl"
        with open(out, "wb") as f:
            f.writelines(line for line, stays in zip(lines, kept, strict=True) if stays)
        return lambda: ids_of_lines([out])

    return dedup


def rensa() -> Flag:
    from rensa import RMinHash, RMinHashDeduplicator

    def flag(texts: list[str]) -> Sequence[bool]:
        signed = RMinHash.from_token_sets([shingles(text) for text in texts], NUM_SLOTS, 42)
        seen = RMinHashDeduplicator(MIN_SIMILARITY, NUM_SLOTS, True, NUM_BANDS, 42)
        return seen.add_pairs([(str(i), one) for i, one in enumerate(signed)])

    return flag


def rensa_c() -> Flag:
    from rensa import CMinHash, CMinHashDeduplicator

    def flag(texts: list[str]) -> Sequence[bool]:
        signed = CMinHash.from_token_sets([shingles(text) for text in texts], NUM_SLOTS, 42)
        seen = CMinHashDeduplicator(MIN_SIMILARITY, NUM_SLOTS, 42)
        return seen.add_pairs([(str(i), one) for i, one in enumerate(signed)])

    return flag


def gaoya() -> Flag:
    from gaoya.minhash import MinHashStringIndex

    def flag(texts: list[str]) -> Sequence[bool]:
        words = (NGRAM_SIZE, NGRAM_SIZE)
        index = MinHashStringIndex(32, MIN_SIMILARITY, NUM_BANDS, ROWS_PER_BAND, None, "word", True, words, "vec")
        kept = []
        for number, text in enumerate(texts):
            kept.append(not index.query(text))
            if kept[-1]:
                index.insert_document(number, text)
        return kept

    return flag


def fast_sketch() -> Flag:
    from FastSketchLSH import LSH, FastSimilaritySketch

    def flag(texts: list[str]) -> Sequence[bool]:
        signed = FastSimilaritySketch(size=NUM_SLOTS, seed=42).batch([shingles(text) for text in texts], num_threads=1)
        lsh = LSH(num_perm=NUM_SLOTS, num_bands=NUM_BANDS, num_threads=1)
        lsh.insert(signed)
        found, begins = lsh.query(signed, format="csr")
        kept = [True] * len(texts)
        for number in range(len(texts)):  # it tells who is like whom; the first of them stays
            for other in found[begins[number] : begins[number + 1]].tolist():
                if other > number and kept[number]:
                    kept[other] = False
        return kept

    return flag


def datasketch() -> Flag:
    from datasketch import MinHash, MinHashLSH

    def flag(texts: list[str]) -> Sequence[bool]:
        encoded = ([shingle.encode() for shingle in shingles(text)] for text in texts)
        lsh = MinHashLSH(num_perm=NUM_SLOTS, params=(NUM_BANDS, ROWS_PER_BAND))
        kept = []
        for number, signed in enumerate(MinHash.generator(encoded, num_perm=NUM_SLOTS)):
            kept.append(not lsh.query(signed))
            if kept[-1]:
                lsh.insert(number, signed, check_duplication=False)
        return kept

    return flag


def datatrove() -> Dedup:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    config = minhash.MinhashConfig(
        n_grams=NGRAM_SIZE, num_buckets=NUM_BANDS, hashes_per_bucket=ROWS_PER_BAND, hash_config=HashConfig(precision=32)
    )

    def dedup(path: Path, folder: Path) -> Ids:
        def run(steps: list[Any], tasks: int, name: str) -> None:
            LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=str(folder / "logs" / name)).run()

        reader = JsonlReader(str(path.parent), glob_pattern=path.name)
        signed, pairs, dropped = (str(folder / name) for name in ("signed", "pairs", "dropped"))
        run([reader, minhash.MinhashDedupSignature(signed, config=config)], 1, "sign")
        run([minhash.MinhashDedupBuckets(signed, pairs, config=config)], NUM_BANDS, "buckets")
        run([minhash.MinhashDedupCluster(pairs, dropped, config=config)], 1, "cluster")
        writer = JsonlWriter(str(folder / "kept"), compression=None)
        run([reader, minhash.MinhashDedupFilter(dropped), writer], 1, "filter")
        return lambda: ids_of_lines(sorted((folder / "kept").glob("*.jsonl")))

    return dedup


def text_dedup() -> Dedup:
    import datasets
    from text_dedup import minhash

    datasets.disable_progress_bars()

    def dedup(path: Path, folder: Path) -> Ids:
        options = {
            "path": "json", "data_files": path, "split": "train", "cache_dir": folder / "cache", "column": "text",
            "output": folder / "kept", "ngram": NGRAM_SIZE, "min_length": 1, "num_perm": NUM_SLOTS, "b": NUM_BANDS,
            "r": ROWS_PER_BAND, "num_proc": 1,
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        minhash.main(words, standalone_mode=False)
        return lambda: iter(datasets.load_from_disk(str(folder / "kept"))["id"])

    return dedup


CANDIDATES: dict[str, Callable[[], Dedup]] = {
    "herdkern": lambda: herdkern(verify="signature"),
    "herdkern-exact": lambda: herdkern(verify="exact"),
    "gaoya": lambda: in_memory(gaoya()),
    "rensa": lambda: in_memory(rensa()),
    "FastSketchLSH": lambda: in_memory(fast_sketch()),
    "rensa-cminhash": lambda: in_memory(rensa_c()),
    "datasketch": lambda: in_memory(datasketch()),
    "text-dedup": text_dedup,
    "datatrove": datatrove,
}
PACKAGES = {"herdkern-exact": "herdkern", "rensa-cminhash": "rensa"}


def main() -> None:
    candidate, path, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    dedup = CANDIDATES[candidate]()
    with tempfile.TemporaryDirectory() as name:
        few = Path(name) / "few.jsonl"
        line = {"id": "", "text": "a few words to load what is loaded at the first call"}
        few.write_text("".join(json.dumps(line | {"id": f"{i:016x}"}) + "\n" for i in range(4)))
        with contextlib.redirect_stdout(sys.stderr):
            list(dedup(few, Path(name))())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with contextlib.redirect_stdout(sys.stderr), Meter() as meter:
        ids = dedup(path, folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    meter.cpu_s += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    told = {name: getattr(meter, name) for name in ("cpu_s", "wall_s", "peak_mib")}
    told["process_mib"] = status_bytes("VmHWM") / 2**20
    try:
        told["version"] = importlib.metadata.version(PACKAGES.get(candidate, candidate))
    except importlib.metadata.PackageNotFoundError:
        told["version"] = ""
    told["kept"] = list(ids())
    print(json.dumps(told), flush=True)
    os._exit(0)  # some peers take long to tear down


if __name__ == "__main__":
    main()
