"""MinHash signatures from text, and near-duplicate flags from text: herdkern, rensa, datasketch.

All start from a list of str and end with 128 slots per document over the set of its 5-word shingles. The peers take
lists of shingles, which the caller has to cut in Python; "rensa, shingles ready" leaves that out and is only a part of
the job. Every implementation uses all cores it knows to use. Before any time is taken, the estimates of each must agree
with the exact similarity of 400 pairs within what theory allows.
"""

import sys
from collections.abc import Callable, Sequence

import numpy as np
from corpus import installed_texts
from harness import Bench, Case, pytest_cases

from herdkern.dedup.clusters import candidate_pairs, connected_components
from herdkern.dedup.minhash import exact_jaccard, signatures

NUM_BANDS, ROWS_PER_BAND, NGRAM_SIZE, SEED = 16, 8, 5, 1
NUM_SLOTS = NUM_BANDS * ROWS_PER_BAND
PIECE_CHARS = 5000  # documents of a crawl are this long on average

Signer = Callable[[list[str]], np.ndarray]


def documents(num_bytes: int) -> list[str]:
    """Installed texts in pieces of about PIECE_CHARS, cut at line ends."""
    pieces = []
    for text in installed_texts(num_bytes):
        lines, size = [], 0
        for line in text.splitlines(keepends=True):
            lines.append(line)
            size += len(line)
            if size >= PIECE_CHARS:
                pieces.append("".join(lines))
                lines, size = [], 0
        if lines:
            pieces.append("".join(lines))
    return pieces


def shingles(texts: Sequence[str]) -> list[list[str]]:
    """Word shingles as a user of the peers cuts them in Python; a short text is one shingle."""
    found = []
    for text in texts:
        words = text.lower().split()
        windows = zip(*(words[i:] for i in range(NGRAM_SIZE)), strict=False)
        found.append(list(map(" ".join, windows)) or [" ".join(words)])
    return found


def sign_herdkern(texts: list[str]) -> np.ndarray:
    return signatures(texts, num_bands=NUM_BANDS, rows_per_band=ROWS_PER_BAND, ngram_size=NGRAM_SIZE, seed=SEED)


def sign_rensa(texts: list[str]) -> np.ndarray:
    from rensa import RMinHash

    return RMinHash.digest_matrix_from_token_sets(shingles(texts), NUM_SLOTS, SEED)


def sign_datasketch(texts: list[str]) -> list[np.ndarray]:
    from datasketch import MinHash

    encoded = [[shingle.encode() for shingle in some] for some in shingles(texts)]
    return [signed.digest() for signed in MinHash.bulk(encoded, num_perm=NUM_SLOTS, seed=SEED)]


def flag_herdkern(texts: list[str]) -> np.ndarray:
    pairs = candidate_pairs(sign_herdkern(texts), num_bands=NUM_BANDS, rows_per_band=ROWS_PER_BAND)
    labels = connected_components(pairs, len(texts))
    return np.bincount(labels, minlength=len(texts))[labels] > 1


def flag_rensa(texts: list[str]) -> list[bool]:
    from rensa import RMinHashLSH

    index = RMinHashLSH(threshold=0.7, num_perm=NUM_SLOTS, num_bands=NUM_BANDS)
    return index.query_duplicate_flags_matrix_one_shot(sign_rensa(texts))


SIGNERS: dict[str, Callable] = {"herdkern": sign_herdkern, "rensa": sign_rensa, "datasketch": sign_datasketch}
FLAGGERS: dict[str, Callable] = {"herdkern": flag_herdkern, "rensa": flag_rensa}


def importable(peers: Sequence[str], case_name: str) -> list[str]:
    """Those of the peers that are installed."""
    found = []
    for peer in peers:
        try:
            __import__(peer)
            found.append(peer)
        except ImportError as e:
            print(f"{case_name}: without {peer}: {e}", file=sys.stderr)
    return found


def check_estimates(names: Sequence[str]) -> None:
    """Over pairs of known similarity the mean square error is at most 1.5 J (1 - J) / slots and there is no bias."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(400):
        words = [f"w{i}" for i in rng.integers(0, 1 << 40, 300)]
        other = list(words)
        for place in rng.choice(300, int(rng.integers(1, 30)), replace=False):
            other[place] = "changed"
        texts += [" ".join(words), " ".join(other)]
    exact = exact_jaccard(texts, np.arange(800).reshape(-1, 2), ngram_size=NGRAM_SIZE)
    for name in names:
        signed = SIGNERS[name](texts)
        rows = np.array(signed.to_rows() if hasattr(signed, "to_rows") else signed)
        error = (rows[0::2] == rows[1::2]).mean(axis=1) - exact
        theory = float(np.mean(exact * (1 - exact))) / NUM_SLOTS
        assert np.mean(error**2) < 1.5 * theory, f"{name}: mean square error {np.mean(error**2)}, theory {theory}"
        assert abs(error.mean()) < 5 * (theory / len(error)) ** 0.5, f"{name}: bias {error.mean()}"


def signature_case(name: str, num_bytes: int, peers: Sequence[str], *, shingles_ready: bool = False) -> Case:
    """Text to signatures; with `shingles_ready` also rensa's part alone."""
    names: list[str] = []

    def setup() -> dict[str, Callable[[], object]]:
        texts = documents(num_bytes)
        names[:] = ["herdkern", *importable(peers, name)]
        fns: dict[str, Callable[[], object]] = {n: lambda n=n: SIGNERS[n](texts) for n in names}  # type: ignore[misc]
        if shingles_ready and "rensa" in names:
            from rensa import RMinHash

            ready = shingles(texts)
            fns["rensa, shingles ready"] = lambda: RMinHash.digest_matrix_from_token_sets(ready, NUM_SLOTS, SEED)
        return fns

    return Case(name=name, setup=setup, check=lambda fns: check_estimates(names), bytes=num_bytes)


def flag_case(name: str, num_bytes: int) -> Case:
    """Text to one flag per document: has it a near-duplicate?"""
    texts: list[str] = []

    def setup() -> dict[str, Callable[[], object]]:
        rng = np.random.default_rng(1)
        texts[:] = documents(num_bytes // 10 * 9)
        for place in rng.choice(len(texts), len(texts) // 10, replace=False).tolist():  # copies with an edit
            words = texts[place].split(" ")
            words[len(words) // 2] = "edited"
            texts.append(" ".join(words))
        names = ["herdkern", *importable(["rensa"], name)]
        return {n: lambda n=n: FLAGGERS[n](texts) for n in names}  # type: ignore[misc]

    def check(fns: dict[str, Callable[[], object]]) -> None:
        num_copies = len(texts) // 11
        for label, fn in fns.items():
            flags = np.array(fn(), dtype=bool)
            found = flags[-num_copies:].mean()
            assert found > 0.9, f"{label}: only {found:.3f} of the edited copies were found"

    return Case(name=name, setup=setup, check=check, bytes=num_bytes)


BENCH = Bench(
    "minhash",
    [
        signature_case("text to signatures, 1 MB", 1_000_000, ("rensa", "datasketch")),
        signature_case("text to signatures, 20 MB", 20_000_000, ("rensa",), shingles_ready=True),
        flag_case("text to duplicate flags, 20 MB", 20_000_000),
    ],
)
test_minhash = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
