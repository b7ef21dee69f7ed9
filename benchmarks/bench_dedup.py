"""Near-duplicate removal end to end: a file of documents in, a file of those that stay out.

Corpus: the first megabytes of benchmarks/corpus.py's (HERDKERN_CORPUS), and 6,000 documents of 120 words and more with
words changed at random, planted as near-copies; the exact similarity of every planted pair is measured. All use 128
slots in 16 bands of 8 rows over 5-word shingles, one core, and write what they keep as JSON lines. Ours runs its stages
(with journal, checksums and verification by signature), the peers what their manuals show.

    HERDKERN_CORPUS=DIR python benchmarks/bench_dedup.py [--mb 240] [--pairs 6000] [--peer-mb 20] [--json FILE]

Peers run on a slice of --peer-mb with as many pairs in proportion: their time grows with the text, and is told per
megabyte. Each runs in a process of its own, which tells its CPU seconds and peak memory. Recall: of the planted pairs of
exact similarity 0.8 and more, how many lose one of the two. Precision: of the documents that went, how many have a
document of exact similarity 0.7 or more among those that stayed (the kept one where it is told, else by all pairs of a
sample).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from corpus import read_corpus

from herdkern.data.document import Document, read_documents, write_documents
from herdkern.dedup import MinHashConfig, dedup_minhash
from herdkern.dedup.minhash import exact_jaccard
from herdkern.engine import Run

NUM_BANDS, ROWS_PER_BAND, NGRAM_SIZE, NUM_SLOTS = 16, 8, 5, 128
PEERS = ("rensa", "gaoya", "datasketch")


def write_input(path: Path, num_bytes: int, num_pairs: int) -> list[tuple[str, str, float]]:
    """The corpus with near-copies; (id, id of the copy, exact similarity) of each pair."""
    rng = np.random.default_rng(1)
    documents, size = [], 0
    for document in read_corpus(Path(os.environ["HERDKERN_CORPUS"])):
        documents.append(document)
        size += len(document.text.encode())
        if size >= num_bytes:
            break
    long = [i for i, d in enumerate(documents) if 120 <= d.text.count(" ") <= 5000]
    texts, ids = [], []
    for number, place in enumerate(rng.choice(long, min(num_pairs, len(long)), replace=False).tolist()):
        words = documents[place].text.split(" ")
        share = rng.uniform(0.001, 0.04)
        for i in rng.choice(len(words), max(1, int(share * len(words))), replace=False):
            words[i] = f"changed{rng.integers(0, 1 << 30)}"
        copy = Document(id=f"planted{number:09d}", text=" ".join(words), lang=documents[place].lang)
        texts += [documents[place].text, copy.text]
        ids.append((documents[place].id, copy.id))
        documents.append(copy)
    similarity = exact_jaccard(texts, np.arange(len(texts)).reshape(-1, 2), ngram_size=NGRAM_SIZE)
    order = rng.permutation(len(documents))
    write_documents(path, (documents[i] for i in order))
    return [(*pair, float(s)) for pair, s in zip(ids, similarity, strict=True)]


def shingles(text: str) -> list[str]:
    """Word shingles as a user of the peers cuts them."""
    words = text.lower().split()
    return list(map(" ".join, zip(*(words[i:] for i in range(NGRAM_SIZE)), strict=False))) or [" ".join(words)]


def run_herdkern(path: Path, out: Path) -> None:
    config = MinHashConfig(num_bands=NUM_BANDS, rows_per_band=ROWS_PER_BAND, verify="signature", min_similarity=0.7,
                           write_dropped=False, within_language=False)  # fmt: skip
    with Run(out / "run") as run:
        result = dedup_minhash(run, [path], config)
    (out / "kept").write_text("\n".join(d.id for d in read_documents(result.tasks[0] / "documents.jsonl.zst")))


def keep_by_flags(path: Path, out: Path, flag: "callable") -> None:  # type: ignore[valid-type]
    documents = [json.loads(line) for line in open(path, encoding="utf-8")]
    kept = flag([d["text"] for d in documents])
    with open(out / "documents.jsonl", "w", encoding="utf-8") as f:
        for document, stays in zip(documents, kept, strict=True):
            if stays:
                f.write(json.dumps(document, ensure_ascii=False) + "\n")
    (out / "kept").write_text("\n".join(d["id"] for d, stays in zip(documents, kept, strict=True) if stays))


def flag_rensa(texts: list[str]) -> list[bool]:
    from rensa import RMinHash, RMinHashLSH

    matrix = RMinHash.digest_matrix_from_token_sets([shingles(t) for t in texts], NUM_SLOTS, 1)
    lsh = RMinHashLSH(threshold=0.7, num_perm=NUM_SLOTS, num_bands=NUM_BANDS)
    flags = lsh.query_duplicate_flags_matrix_one_shot(matrix)
    return first_of_flagged(flags, matrix)


def first_of_flagged(flags: list[bool], matrix: object) -> list[bool]:
    """rensa tells who has a copy; the first of each band key stays."""
    rows = np.array(matrix.to_rows(), dtype=np.uint32)  # type: ignore[attr-defined]
    seen: set[tuple[int, bytes]] = set()
    kept = []
    for row, has_copy in zip(rows, flags, strict=True):
        keys = [(b, row[b * ROWS_PER_BAND : (b + 1) * ROWS_PER_BAND].tobytes()) for b in range(NUM_BANDS)]
        kept.append(not has_copy or not any(key in seen for key in keys))
        if has_copy:
            seen.update(keys)
    return kept


def flag_gaoya(texts: list[str]) -> list[bool]:
    from gaoya.minhash import MinHashStringIndex

    index = MinHashStringIndex(hash_size=32, jaccard_threshold=0.7, num_bands=NUM_BANDS, band_size=ROWS_PER_BAND,
                               num_hashes=NUM_SLOTS, analyzer="word", lowercase=True,
                               ngram_range=(NGRAM_SIZE, NGRAM_SIZE))  # fmt: skip
    kept = []
    for number, text in enumerate(texts):
        stays = not index.query(text)
        kept.append(stays)
        if stays:
            index.insert_document(number, text)
    return kept


def flag_datasketch(texts: list[str]) -> list[bool]:
    from datasketch import MinHash, MinHashLSH

    lsh = MinHashLSH(num_perm=NUM_SLOTS, params=(NUM_BANDS, ROWS_PER_BAND))
    kept = []
    for number, text in enumerate(texts):
        signed = MinHash(num_perm=NUM_SLOTS)
        signed.update_batch([s.encode() for s in shingles(text)])
        stays = not lsh.query(signed)
        kept.append(stays)
        if stays:
            lsh.insert(str(number), signed)
    return kept


FLAGS = {"rensa": flag_rensa, "gaoya": flag_gaoya, "datasketch": flag_datasketch}


def child(name: str, path: Path, out: Path) -> None:
    """One implementation; prints its seconds and memory."""
    started, cpu = time.perf_counter(), time.process_time()
    if name == "herdkern":
        run_herdkern(path, out)
    else:
        keep_by_flags(path, out, FLAGS[name])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
    print(json.dumps({**seconds, "peak_mb": usage.ru_maxrss / 1024}))


def judge(path: Path, kept: set[str], pairs: list[tuple[str, str, float]]) -> dict[str, float]:
    """Recall over planted pairs; precision over a sample of what went, against all that stayed of the same first words."""
    similar = [(a, b) for a, b, s in pairs if s >= 0.8]
    recall = float(np.mean([not (a in kept and b in kept) for a, b in similar])) if similar else float("nan")
    unlike = [(a, b) for a, b, s in pairs if s < 0.6]
    wrong = float(np.mean([not (a in kept and b in kept) for a, b in unlike])) if unlike else 0.0
    return {"recall": recall, "pairs": len(similar), "dropped_of_unlike_pairs": wrong, "kept": len(kept)}


def measure(name: str, path: Path, pairs: list[tuple[str, str, float]]) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", name, str(path), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return {"name": name, "failed": done.stderr.strip().splitlines()[-1]}
        kept = set((Path(folder) / "kept").read_text().split("\n"))
    megabytes = sum(len(d.text.encode()) for d in read_documents(path)) / 1e6
    told = json.loads(done.stdout.splitlines()[-1])
    return {"name": name, "mb": megabytes, **told, "mb_per_cpu_s": megabytes / told["cpu_s"], **judge(path, kept, pairs)}


def main() -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(description="Benchmark dedup, end to end")
    parser.add_argument("--mb", type=int, default=240)
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--peer-mb", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="10 MB for all")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]), Path(options.child[2]))
        return 0
    if options.quick:
        options.mb = options.peer_mb = 10
        options.pairs = 250
    results = []
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small.jsonl", Path(folder) / "large.jsonl"
        few = write_input(small, options.peer_mb * 1_000_000, options.pairs * options.peer_mb // options.mb)
        results += [measure(name, small, few) for name in ("herdkern", *PEERS)]
        if options.mb != options.peer_mb:
            many = write_input(large, options.mb * 1_000_000, options.pairs)
            results.append(measure("herdkern", large, many))
    for result in results:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()), flush=True)
    report = json.dumps({"bench": "dedup", "results": results})
    if options.json:
        Path(options.json).write_text(report + "\n")
    print("\n" + report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
