"""Duplicate removal as stages on `herdkern.engine`: URLs, documents (exact copies and MinHash), lines.

`signatures` gives the MinHash signatures of a list of texts; MinHash and MinHashLSH have datasketch's names.

The three `dedup_` stages return one task folder per input with documents.jsonl.zst and dropped.jsonl.zst.
"""

from herdkern.dedup.containment import ContainmentConfig, drop_contained
from herdkern.dedup.documents import MinHashConfig, dedup_minhash
from herdkern.dedup.exact import ExactDedupConfig, dedup_exact
from herdkern.dedup.lines import LineDedupConfig, dedup_lines
from herdkern.dedup.lsh_port import MinHash, MinHashLSH
from herdkern.dedup.minhash import signature_spec, signatures
from herdkern.dedup.semantic import SemanticDedupConfig, dedup_semantic
from herdkern.dedup.urls import UrlDedupConfig, canonical_url, dedup_urls

__all__ = [
    "ContainmentConfig",
    "ExactDedupConfig",
    "LineDedupConfig",
    "MinHash",
    "MinHashConfig",
    "MinHashLSH",
    "SemanticDedupConfig",
    "UrlDedupConfig",
    "canonical_url",
    "dedup_exact",
    "dedup_lines",
    "dedup_minhash",
    "dedup_semantic",
    "dedup_urls",
    "drop_contained",
    "signature_spec",
    "signatures",
]
