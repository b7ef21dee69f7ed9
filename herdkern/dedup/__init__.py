"""Duplicate removal as stages on `herdkern.engine`: URLs, documents (exact copies and MinHash), lines.

The three `dedup_` stages return one task folder per input with documents.jsonl.zst and dropped.jsonl.zst.
"""

from herdkern.dedup.containment import ContainmentConfig, drop_contained
from herdkern.dedup.documents import MinHashConfig, dedup_minhash
from herdkern.dedup.lines import LineDedupConfig, dedup_lines
from herdkern.dedup.urls import UrlDedupConfig, canonical_url, dedup_urls

__all__ = [
    "ContainmentConfig",
    "LineDedupConfig",
    "MinHashConfig",
    "UrlDedupConfig",
    "canonical_url",
    "dedup_lines",
    "dedup_minhash",
    "dedup_urls",
    "drop_contained",
]
