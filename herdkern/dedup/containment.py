"""Held-out documents that training documents contain: a held-out loss means little where the text was trained on.

Splitting by document leaves pieces of one text on both sides (a page inside a longer page, a copied section), which
MinHash does not see because the two are not similar as wholes. Here every held-out document is compared with all
training documents together, by the share of its word n-grams that occur in any of them.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from herdkern.data.document import Document, DocumentWriter, read_documents
from herdkern.dedup.arrays import load_array
from herdkern.dedup.minhash import shingle_hashes
from herdkern.engine import Run, StageResult

_SEEN = "seen.npy"


@dataclass(frozen=True, kw_only=True)
class ContainmentConfig:
    """max_contained: largest share of a held-out document's n-grams that may occur in training documents."""

    max_contained: float = 0.5
    ngram_size: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.max_contained <= 1:
            raise ValueError(f"ContainmentConfig: max_contained must be from 0 to 1, got {self.max_contained}")
        if self.ngram_size < 1:
            raise ValueError(f"ContainmentConfig: ngram_size must be at least 1, got {self.ngram_size}")


@dataclass(frozen=True, kw_only=True)
class _Heldout:
    """num_files: how many of a task's first inputs are held-out documents.  train_*: what the counters add to them."""

    containment: ContainmentConfig
    num_files: int
    train_docs: int = 0
    train_bytes: int = 0


def drop_contained(
    run: Run, heldout: Sequence[Path], train: Sequence[Path], config: ContainmentConfig, *, name: str = "heldout"
) -> StageResult:
    """Keep the held-out documents that training documents do not contain: task folder heldout/<file name>.

    heldout, train: files of documents. The rest is in dropped.jsonl.zst with reason "contained_in_training"; if all
    would go, the one that is contained least stays. Counters are of both splits. Memory: the n-grams of the held-out
    documents.  Raises: StageError if a task fails.
    """
    setting = _Heldout(containment=config, num_files=len(heldout))
    seen = run.map(f"{name}.seen", _find_seen, [[*heldout, path] for path in train], config=setting)
    total = seen.counters
    setting = replace(setting, train_docs=total.get("train_docs", 0), train_bytes=total.get("train_bytes", 0))
    return run.once(name, _keep_unseen, [*heldout, *seen.files(_SEEN)], config=setting)


def _hashes(document: Document, config: ContainmentConfig) -> NDArray[np.uint64]:
    [hashes] = shingle_hashes([document.text], ngram_size=config.ngram_size, num_threads=1)
    return np.unique(hashes)


def _find_seen(inputs: list[Path], out: Path, config: _Heldout) -> dict[str, Any]:
    """Stage: the held-out n-grams that occur in the last input, sorted, in out/seen.npy."""
    wanted = np.unique(
        np.concatenate(
            [np.zeros(0, np.uint64)]
            + [_hashes(doc, config.containment) for path in inputs[:-1] for doc in read_documents(path)]
        )
    )
    found = np.zeros(len(wanted), bool)
    counters = {"train_docs": 0, "train_bytes": 0}
    for document in read_documents(inputs[-1]):
        hashes = _hashes(document, config.containment)
        places = np.searchsorted(wanted, hashes)
        places[places == len(wanted)] = 0
        if len(wanted):
            found[places[wanted[places] == hashes]] = True
        counters["train_docs"] += 1
        counters["train_bytes"] += len(document.text.encode())
    np.save(out / _SEEN, wanted[found], allow_pickle=False)
    return counters


def _keep_unseen(inputs: list[Path], out: Path, config: _Heldout) -> dict[str, Any]:
    """Stage: sort held-out documents into out/heldout/<file name> and out/dropped.jsonl.zst."""
    files, seen_files = inputs[: config.num_files], inputs[config.num_files :]
    seen = np.unique(np.concatenate([np.zeros(0, np.uint64), *[load_array(path, np.uint64) for path in seen_files]]))
    shares = []
    for path in files:
        for document in read_documents(path):
            hashes = _hashes(document, config.containment)
            shares.append(float(np.isin(hashes, seen).mean()) if len(hashes) else 0.0)
    allowed = max(config.containment.max_contained, min(shares, default=0.0))
    docs, size_of_train = config.train_docs, config.train_bytes
    counters = {"docs_in": docs, "docs_out": docs, "bytes_in": size_of_train, "bytes_out": size_of_train}
    (out / "heldout").mkdir()
    with ExitStack() as stack:
        dropped = stack.enter_context(DocumentWriter(out / "dropped.jsonl.zst"))
        writers: dict[str, DocumentWriter] = {}
        number = 0
        for path in files:
            for document in read_documents(path):
                size, share = len(document.text.encode()), shares[number]
                number += 1
                counters["docs_in"] += 1
                counters["bytes_in"] += size
                if share > allowed:
                    meta = {**document.meta, "contained": round(share, 4)}
                    dropped.write(replace(document, meta=meta), reason="contained_in_training")
                    continue
                if path.name not in writers:
                    writers[path.name] = stack.enter_context(DocumentWriter(out / "heldout" / path.name))
                writers[path.name].write(document)
                counters["docs_out"] += 1
                counters["bytes_out"] += size
    gone = counters["docs_in"] - counters["docs_out"]
    return {**counters, "dropped": {"contained_in_training": gone} if gone else {}}
