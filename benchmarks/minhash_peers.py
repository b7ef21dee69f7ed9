"""Text to MinHash signatures by herdkern and its peers, one candidate in a process; needs no more than the candidate.

    PYTHON benchmarks/minhash_peers.py CANDIDATE TEXTS [PAIRS]

TEXTS and PAIRS: documents separated by NUL; texts 2 i and 2 i + 1 of PAIRS belong together. Prints JSON: CPU and wall
seconds and MiB of the signing, and the estimated similarity of each pair. All sign on one thread, 128 slots, 5 words.
The peers that take lists of shingles get them from Python's str.split, as their users do it.
"""

import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from apart import Meter

NUM_SLOTS, NGRAM_SIZE, SEED = 128, 5, 1
Sign = Callable[[list[str]], Any]  # rows of slots, or None where they cannot be had


def shingles(texts: Sequence[str]) -> list[list[str]]:
    """5-word shingles as a user of the peers cuts them; a shorter text is one shingle."""
    found = []
    for text in texts:
        words = text.lower().split()
        windows = zip(*(words[i:] for i in range(NGRAM_SIZE)), strict=False)
        found.append(list(map(" ".join, windows)) or [" ".join(words)])
    return found


def ours(**settings: Any) -> Sign:
    from herdkern.dedup.minhash import signatures

    return lambda texts: signatures(texts, num_bands=16, rows_per_band=8, num_threads=1, **settings)


def rensa() -> Sign:
    from rensa import RMinHash

    return lambda texts: RMinHash.digest_matrix_from_token_sets(shingles(texts), NUM_SLOTS, SEED).to_rows()


def rensa_c() -> Sign:
    from rensa import CMinHash

    def sign(texts: list[str]) -> Any:
        rows = []
        for some in shingles(texts):
            minhash = CMinHash(num_perm=NUM_SLOTS, seed=SEED)
            minhash.update(some)
            rows.append(minhash.digest())
        return rows

    return sign


def fast_sketch() -> Sign:
    from FastSketchLSH import FastSimilaritySketch

    sketch = FastSimilaritySketch(NUM_SLOTS, SEED)
    return lambda texts: sketch.batch(shingles(texts), num_threads=1)


def datasketch() -> Sign:
    from datasketch import MinHash

    def sign(texts: list[str]) -> Any:
        encoded = ([shingle.encode() for shingle in some] for some in shingles(texts))
        return [signed.digest() for signed in MinHash.generator(encoded, num_perm=NUM_SLOTS, seed=SEED)]

    return sign


def gaoya() -> Sign:
    from gaoya.minhash import MinHashStringIndex

    def sign(texts: list[str]) -> None:  # it puts the signatures into its index and does not hand them out
        index = MinHashStringIndex(32, 0.8, 16, 8, None, "word", True, (NGRAM_SIZE, NGRAM_SIZE), "vec")
        for i, text in enumerate(texts):
            index.insert_document(i, text)

    return sign


def datatrove() -> Sign:
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(
        n_grams=NGRAM_SIZE, num_buckets=16, hashes_per_bucket=8, hash_config=HashConfig(precision=32)
    )
    step = MinhashDedupSignature("/tmp/unused", config=config)

    def sign(texts: list[str]) -> Any:
        rows = []
        for text in texts:
            some = step.get_shingles(text)
            rows.append(np.concatenate(step.get_signature(some)) if some.size else np.zeros(NUM_SLOTS))
        return rows

    return sign


CANDIDATES: dict[str, Callable[[], Sign]] = {
    "herdkern": ours,
    "herdkern-avx2": ours,  # under HERDKERN_ISA=avx2
    "herdkern-oph": lambda: ours(family="oph"),
    "herdkern-m61": lambda: ours(family="m61"),
    "gaoya": gaoya,
    "rensa": rensa,
    "rensa-cminhash": rensa_c,
    "FastSketchLSH": fast_sketch,
    "datasketch": datasketch,
    "datatrove": datatrove,
}


def read_texts(path: str) -> list[str]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as f:
        return f.read().split("\0")


def main() -> None:
    candidate, path, *pairs = sys.argv[1:]
    sign = CANDIDATES[candidate]()
    sign(["a few words to load what is loaded at the first call"] * 3)
    estimates = None
    if pairs:
        signed = sign(read_texts(pairs[0]))
        if signed is not None:
            rows = np.array(signed)
            estimates = (rows[0::2] == rows[1::2]).mean(axis=1).tolist()
    texts = read_texts(path)
    with Meter() as meter:
        sign(texts)
    package = candidate.partition("-")[0]
    version = "" if package == "herdkern" else importlib.metadata.version(package)
    print(json.dumps({"estimates": estimates, "version": version, "num_docs": len(texts), **vars(meter)}))


if __name__ == "__main__":
    main()
