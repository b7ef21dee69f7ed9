"""The recipe's own data stages: crawling with a bar, holding out, learning the vocabulary."""

import hashlib
import itertools
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from herdkern.data.crawl import CrawlConfig, crawl
from herdkern.data.document import Document, DocumentWriter, read_documents
from herdkern.data.pydoc_site import HOST, PydocSite
from herdkern.tokenizer import llama3_special_tokens, train_bpe

SMALL_VOCABULARY = 65_536  # below it 16 special tokens are enough, else Llama 3's 256


def crawl_documentation(inputs: list[Path], out: Path, config: CrawlConfig) -> dict[str, Any]:
    """Stage: crawl the documentation site of this Python, served on loopback, into out/crawl-*.warc.gz; no inputs."""
    del inputs
    with ExitStack() as stack:
        settings = {"num_processes": config.num_processes, "page_seconds": config.page_seconds}
        site = stack.enter_context(PydocSite(config.packages, **settings))  # type: ignore[arg-type]
        bar = stack.enter_context(_bar(config.max_pages, "crawl", "page"))

        def progress(done: int, _: int) -> None:
            bar.update(done - bar.n)

        return crawl(f"http://{HOST}/", out, config, connect_to=("127.0.0.1", site.port), progress=progress)


def _bar(total: int, name: str, unit: str) -> "tqdm[Any]":
    """A bar on a terminal, gone when it ends; nothing elsewhere."""
    return tqdm(total=total, desc=name, unit=unit, smoothing=0.1, leave=False, disable=not sys.stderr.isatty())


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Which documents are held out: those whose hash of (seed, id) falls below the share, and the smallest of all."""

    heldout_share: float
    seed: int
    smallest_hash: int = -1


def hash_shard(inputs: list[Path], out: Path, config: SplitConfig) -> dict[str, Any]:
    """Stage: the smallest document hash of each shard, so that a small corpus too has something held out."""
    del out
    hashes = [heldout_hash(document, config) for path in inputs for document in read_documents(path)]
    return {"smallest": [min(hashes)] if hashes else [], "num_documents": len(hashes)}


def split_shard(inputs: list[Path], out: Path, config: SplitConfig) -> dict[str, Any]:
    """Stage: sort documents into out/<train|heldout>/<source>.jsonl.zst."""
    counters: dict[str, Any] = {"docs_in": 0, "docs_out": 0, "bytes_in": 0, "bytes_out": 0}
    languages: dict[str, int] = {}
    sources: dict[str, int] = {}
    with ExitStack() as stack:
        writers: dict[str, DocumentWriter] = {}
        for document in itertools.chain.from_iterable(map(read_documents, inputs)):
            split = "heldout" if is_heldout(document, config) else "train"
            source = source_name(document.source)
            name = f"{split}/{source}"
            if name not in writers:
                writers[name] = stack.enter_context(DocumentWriter(out / f"{name}.jsonl.zst"))
            writers[name].write(document)
            size = len(document.text.encode())
            languages[document.lang or "und"] = languages.get(document.lang or "und", 0) + 1
            sources[source] = sources.get(source, 0) + size
            for key, amount in (("docs_in", 1), ("docs_out", 1), ("bytes_in", size), ("bytes_out", size)):
                counters[key] += amount
    return counters | {"languages": languages, "sources": sources}


def heldout_hash(document: Document, config: SplitConfig) -> int:
    """A number in [0, 2**63) that depends on the document's id and the seed alone."""
    digest = hashlib.blake2b(f"{config.seed}/{document.id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def is_heldout(document: Document, config: SplitConfig) -> bool:
    """Whether a document is kept out of training."""
    number = heldout_hash(document, config)
    return number < config.heldout_share * 2**63 or number == config.smallest_hash


def source_name(source: str) -> str:
    """A source as a file name: lower-case letters, digits and hyphens; "web" if it has none."""
    return re.sub(r"[^a-z0-9]+", "-", source.lower()).strip("-")[:40] or "web"


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """What the vocabulary depends on besides the text."""

    vocab_size: int
    max_text_bytes: int


def learn_vocabulary(inputs: list[Path], out: Path, config: VocabularyConfig) -> dict[str, Any]:
    """Stage: BPE over the training documents (their first max_text_bytes) into out/tokenizer."""
    specials = llama3_special_tokens(16 if config.vocab_size < SMALL_VOCABULARY else 256)
    with _bar(config.vocab_size, "tokenizer", "merge") as bar:

        def progress(done: int, _: int) -> None:
            bar.update(done - bar.n)

        texts = _texts(inputs, config.max_text_bytes)
        tokenizer = train_bpe(texts, config.vocab_size, special_tokens=specials, progress=progress)
    tokenizer.save(out / "tokenizer")
    return {"n_vocab": tokenizer.n_vocab}


def _texts(inputs: list[Path], max_bytes: int) -> Iterator[str]:
    taken = 0
    for document in itertools.chain.from_iterable(map(read_documents, inputs)):
        if taken >= max_bytes:
            return
        taken += len(document.text.encode())
        yield document.text
