"""The native text kernels (csrc/text); use herdkern.tokenizer and herdkern.dedup."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

unicode_version: str

def __getattr__(name: str) -> Any: ...

# csrc/text/bind_splitter.cpp
def split_patterns() -> dict[str, str | tuple[str, ...]]: ...

class Splitter:
    name: str  # empty for a pattern that has none
    patterns: tuple[str, ...]
    def __init__(self, pattern: str | Sequence[str]) -> None: ...  # a name, a pattern, or a sequence of patterns
    def word_ends(self, text: str | bytes) -> np.ndarray: ...  # (num_words,) int64
    def count_steps(self, text: str | bytes) -> tuple[int, int]: ...  # (number of words, steps of work)

# csrc/text/bind_bpe_train.cpp
class WordRun:
    def __init__(self, path: str, begin: int, end: int, num_blocks: int, check: int) -> None: ...

def train_merges(
    words: WordTable | WordRun,
    keep_words: bool,
    tokens: Sequence[bytes],
    merges: np.ndarray | None,  # (n, 3) uint32: left, right, token
    encoder: Encoder | None,
    vetoed: Sequence[bytes],
    max_new_tokens: int,
    min_frequency: int,
    max_token_length: int,
    max_memory: int,
    num_threads: int,
    progress: Callable[[float], None] | None,
) -> np.ndarray: ...  # (n, 3) uint32
def encode_words(
    table: WordTable, tokens: Sequence[bytes], encoder: Encoder
) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...  # ids uint32, offsets int64, counts int64; words in byte order

# csrc/text/bind_merge_recovery.cpp
def recover_merges(tokens: Sequence[bytes], characters: bool) -> tuple[np.ndarray, np.ndarray]: ...

# csrc/text/bind_word_counts.cpp
class WordTable:
    def __init__(self, splitter: Splitter) -> None: ...
    def add_texts(self, texts: Sequence[str | bytes], first_index: int, num_threads: int) -> None: ...
    def add_words(self, blob: bytes, lengths: np.ndarray, counts: np.ndarray) -> None: ...
    def add_run(self, path: str, begin: int, end: int) -> _RunTotals: ...
    def write_run(self, descriptor: int, name: str, begin: int) -> _RunTotals: ...
    def merge(self, other: WordTable) -> None: ...
    def prune(self, min_count: int) -> None: ...
    def num_words(self) -> int: ...
    def num_occurrences(self) -> int: ...
    def sorted(self) -> tuple[bytes, np.ndarray, np.ndarray]: ...

_RunTotals = tuple[int, int, int, int, int]  # num_words, num_occurrences, num_blocks, num_bytes, check

class BudgetCounter:
    num_pending_bytes: int
    num_lines: int
    num_spilled_bytes: int
    def __init__(self, splitter: Splitter, max_bytes: int, folder: str, num_threads: int) -> None: ...
    def add_texts(self, texts: Sequence[str | bytes], first_index: int) -> None: ...
    def expect_lines(self, num_bytes: int) -> None: ...
    def spill(self) -> None: ...
    def add_json_lines(self, pieces: Sequence[bytes], key: str, last: bool) -> list[tuple[int, bytes]]: ...
    def finish(
        self,
        descriptor: int,
        name: str,
        begin: int,
        merge_bytes: Callable[[], int],
        folder: str,
        progress: Callable[[int], None] | None,
    ) -> _RunTotals: ...

class CharsMap:
    def __init__(self, blob: bytes) -> None: ...
    def map(self, text: bytes) -> bytes: ...

class SentencePiece:
    def __init__(self, text: str, score: float, is_merged: bool, is_user_defined: bool, ids: Sequence[int]) -> None: ...

class SentencePieceCutter:
    def __init__(self, pieces: Sequence[SentencePiece], unk_id: int, byte_ids: Sequence[int]) -> None: ...
    def encode(self, text: str | bytes) -> list[int]: ...

class RunReader:
    def __init__(self, path: str, begin: int, end: int) -> None: ...
    def read(self, max_words: int) -> tuple[bytes, np.ndarray, np.ndarray]: ...
    def totals(self) -> _RunTotals: ...

def merge_runs(
    runs: Sequence[tuple[str, int, int, int]],  # path, begin, end, weight
    denominator: int,
    max_bytes: int,
    max_files: int,
    folder: str,
    descriptor: int,
    name: str,
    begin: int,
    progress: Callable[[int], None] | None,
) -> _RunTotals: ...

# csrc/text/bind_bpe_encode.cpp. tokens: a dict from bytes to id, or pairs. special: tokens that become their ids (True:
# every one, False: none, or their ids); forbidden: those that must not occur. Ids: uint32; offsets: (n + 1,) int64.
class Encoder:
    def __init__(
        self,
        tokens: Mapping[bytes, int] | Sequence[tuple[bytes, int]],
        special_tokens: Mapping[bytes, int] | Sequence[tuple[bytes, int]],
        splitter: Splitter,
        cache_bytes: int = ...,
    ) -> None: ...
    def encode(
        self, text: str | bytes, special: bool | Sequence[int], forbidden: bool | Sequence[int]
    ) -> list[int]: ...
    def encode_arrays(
        self,
        texts: Sequence[str | bytes],
        special: bool | Sequence[int],
        forbidden: bool | Sequence[int],
        num_threads: int,
        part_bytes: int = ...,
    ) -> tuple[np.ndarray, np.ndarray]: ...
    def encode_lists(
        self,
        texts: Sequence[str | bytes],
        special: bool | Sequence[int],
        forbidden: bool | Sequence[int],
        num_threads: int,
    ) -> list[list[int]]: ...
    def count(self, texts: Sequence[str | bytes], num_threads: int, part_bytes: int = ...) -> np.ndarray: ...

class Decoder:
    def __init__(
        self,
        tokens: Mapping[bytes, int] | Sequence[tuple[bytes, int]],
        special_tokens: Mapping[bytes, int] | Sequence[tuple[bytes, int]],
    ) -> None: ...
    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes: ...
    def decode_texts(self, ids: Sequence[int] | np.ndarray, offsets: np.ndarray, errors: str) -> list[str]: ...
    def spans(self, ids: np.ndarray, offsets: np.ndarray, texts: list[str | bytes]) -> np.ndarray: ...

# csrc/text/bind_signatures.cpp
def minhash_levels() -> list[str]: ...

class SignPlan:
    def __init__(
        self,
        family: str,
        unit: str,
        word_factors: np.ndarray,  # (ngram_size,) uint64
        num_slots: int,
        multipliers: np.ndarray,  # uint64 (num_slots,), or the salt of oph
        offsets: np.ndarray,
    ) -> None: ...

def minhash_sign(texts: Sequence[str | bytes], plan: SignPlan, num_threads: int, level: str) -> np.ndarray: ...
def minhash_sign_hashes(
    hashes: np.ndarray, begins: np.ndarray, plan: SignPlan, num_threads: int, level: str
) -> np.ndarray: ...  # (num_docs, num_slots) uint32
def minhash_lower(hashes: np.ndarray, row: np.ndarray, plan: SignPlan) -> np.ndarray: ...
def minhash_shingle(
    texts: Sequence[str | bytes], plan: SignPlan, num_threads: int, level: str
) -> tuple[np.ndarray, np.ndarray]: ...  # hashes uint64, begins int64
def jaccard_of_pairs(
    texts: Sequence[str | bytes], pairs: np.ndarray, plan: SignPlan, num_threads: int
) -> np.ndarray: ...

# csrc/text/bind_minhash.cpp
def band_keys(
    signatures: np.ndarray, num_bands: int, rows_per_band: int, groups: np.ndarray, /
) -> np.ndarray: ...  # (num_docs, num_bands) uint64
def candidate_pairs(
    signatures: np.ndarray,
    num_bands: int,
    rows_per_band: int,
    groups: np.ndarray,  # (num_docs,) uint64, or empty
    min_matches: int,
    num_threads: int,
    /,
) -> np.ndarray: ...  # (num_pairs, 2) int64
def connected_components(pairs: np.ndarray, num_docs: int, /) -> np.ndarray: ...  # (num_docs,) int64

# csrc/text/bind_clusters.cpp: files in, files out
class BandPartitioner:
    num_records: int
    def __init__(self, folder: str, num_partitions: int, max_bytes: int, expected_records: int = 0) -> None: ...
    def add_signatures(
        self,
        signatures: np.ndarray,
        num_bands: int,
        rows_per_band: int,
        docs: np.ndarray,  # (num_docs,) uint64, and so the others
        groups: np.ndarray,
        texts: np.ndarray,
    ) -> None: ...
    def add_sorted(self, path: str, doc_offset: int) -> None: ...
    def finish(self) -> None: ...

class MemberWriter:
    def __init__(self, folder: str, num_partitions: int, max_bytes: int) -> None: ...
    def add(
        self,
        signatures: np.ndarray,
        begin: int,
        rows: np.ndarray,
        documents: np.ndarray,
        labels: np.ndarray,
        docs: np.ndarray,
        shard: int,
        names: np.ndarray | bytes,
        name_begins: np.ndarray,
        shingles: np.ndarray,
        shingle_begins: np.ndarray,
    ) -> None: ...
    def finish(self) -> None: ...

def link_bands(run_files: list[str], out: str, min_bits: int, max_bytes: int) -> dict[str, int]: ...
def merge_band_runs(run_file: str, out: str, max_bytes: int) -> None: ...
def number_documents(keys: list[str], ties: list[int], first: int, folder: str, max_bytes: int) -> None: ...
def label_components(edge_files: list[str], num_docs: int, folder: str, out: str, max_bytes: int) -> None: ...
def deal_labels(
    labels: str, shards: str, first: int, num_shards: int, folder: str, max_bytes: int
) -> tuple[int, int]: ...  # documents with a label, labels
def resolve_members(
    pieces: list[str],
    folder: str,
    verify: str,
    num_bands: int,
    rows_per_band: int,
    slot_bytes: int,
    min_matches: int,
    min_similarity: float,
    max_bytes: int,
) -> dict[str, Any]: ...

# csrc/text/bind_lines.cpp
def line_keys(
    texts: Sequence[str | bytes], num_threads: int, level: str, /
) -> tuple[np.ndarray, np.ndarray]: ...  # keys uint64, begins int64
def partition_lines(
    keys: np.ndarray, begins: np.ndarray, salts: np.ndarray, by_document: bool, num_partitions: int, /
) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...  # salted keys uint64, their lines, begins of the partitions
def is_code_or_formula(lines: Sequence[str | bytes], /) -> np.ndarray: ...  # (num_lines,) bool
def remove_lines(
    texts: Sequence[str | bytes],
    begins: np.ndarray,
    counts: np.ndarray,  # (num_lines,) uint64, 0: stays
    keys: np.ndarray,
    code_aware: bool,
    removed: RemovedLines,
    /,
) -> tuple[list[Any], np.ndarray]: ...  # new texts, None where nothing went; how many lines went

class RemovedLines:
    def __init__(self, limit: int, /) -> None: ...
    def entries(self) -> list[tuple[int, str]]: ...  # (count, line)

class LineCounts:
    def __init__(self, first_part: int, last_part: int, num_parts: int, num_keys: int = 0) -> None: ...
    def add(self, keys: np.ndarray, /) -> None: ...
    def find_frequent(self, keys: np.ndarray, max_count: int, /) -> tuple[np.ndarray, np.ndarray]: ...  # places, counts
    def num_frequent(self, max_count: int, /) -> int: ...
    def num_keys(self) -> int: ...
    def table_bytes(self) -> int: ...

# csrc/text/bind_urls.cpp
class UrlRules:
    def __init__(
        self, merge_schemes: bool, merge_trailing_slash: bool, names: Sequence[str], prefixes: Sequence[str], /
    ) -> None: ...

def url_keys(
    urls: Sequence[str], rules: UrlRules, num_threads: int, /
) -> tuple[np.ndarray, np.ndarray]: ...  # uint64 (num_urls, 2); uint8: 0 asks for canonical_url, 1 has its key, 2 empty
def canonicalise_urls(urls: Sequence[str], rules: UrlRules, /) -> list[str | None]: ...
def hash_urls(urls: Sequence[str], /) -> np.ndarray: ...  # (num_urls, 2) uint64

class UrlTable:
    def __init__(
        self, pieces: Sequence[tuple[str, str, int, int]], num_records: int, first: int, last: int, num_parts: int, /
    ) -> None: ...
    def add(self, records: np.ndarray, first: int, /) -> None: ...  # uint8, whole records of 48 bytes
    def find(self, records: np.ndarray, first: int, /) -> np.ndarray: ...  # (num_records,) uint32
    def decide(self, lost: np.ndarray, /) -> bytes: ...  # lost: uint32 (num_docs, 2), row and the record that stays
    def num_urls(self) -> int: ...
    def table_bytes(self) -> int: ...

# csrc/text/bind_documents.cpp; reader: (line, number of the line) -> the line as Document.to_json writes it
class DocumentLines:
    num_lines: int
    num_pending_bytes: int

class DocumentColumns(DocumentLines):
    def __init__(
        self,
        plan: SignPlan | None,
        score_key: str,
        use_groups: bool,
        file_name: str,
        reader: Callable[[bytes, int], bytes],
    ) -> None: ...
    def scan(self, piece: bytes, last: bool) -> None: ...
    def take(self) -> tuple[np.ndarray, bytes, Any]: ...  # rows uint8 (n, 104), names, signatures uint32 or texts

class DocumentTexts(DocumentLines):
    num_documents: int
    def __init__(self, wanted: np.ndarray, file_name: str, reader: Callable[[bytes, int], bytes]) -> None: ...
    def texts(self, piece: bytes, last: bool) -> list[tuple[int, bytes]]: ...
    def shingles(
        self, piece: bytes, last: bool, plan: SignPlan
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...  # rows int64, hashes uint64, begins int64

class DocumentDealer(DocumentLines):
    num_documents: int
    def __init__(
        self, is_plain: np.ndarray, wants_dropped: bool, file_name: str, reader: Callable[[bytes, int], bytes]
    ) -> None: ...
    def drop(self, rows: np.ndarray, decisions: np.ndarray, reasons: Sequence[str], names: str) -> None: ...
    def deal(self, piece: bytes, last: bool) -> tuple[list[bytes | memoryview], bytes]: ...

# csrc/text/bind_line_documents.cpp
class LineKeys(DocumentLines):
    languages: list[str]
    def __init__(
        self,
        exempt_sources: Sequence[str],
        within_language: bool,
        file_name: str,
        reader: Callable[[bytes, int], bytes],
    ) -> None: ...
    def scan(self, piece: bytes, last: bool) -> None: ...
    def take(self) -> tuple[np.ndarray, np.ndarray]: ...  # rows uint8 (n, 16), keys uint64

class LineDealer(DocumentLines):
    num_held_bytes: int
    counters: dict[str, int]
    def __init__(
        self,
        exempt_sources: Sequence[str],
        code_aware: bool,
        min_kept_share: float,
        file_name: str,
        reader: Callable[[bytes, int], bytes],
    ) -> None: ...
    def hold(self, piece: bytes, last: bool) -> int: ...
    def deal(
        self, begins: np.ndarray, counts: np.ndarray, keys: np.ndarray, removed: RemovedLines
    ) -> tuple[bytes, bytes]: ...

# csrc/text/bind_url_documents.cpp
class UrlScanner(DocumentLines):
    num_documents: int
    num_urls: int
    def __init__(
        self,
        rules: UrlRules | None,
        canonical: Callable[[bytes], bytes],
        num_parts: int,
        file_name: str,
        reader: Callable[[bytes, int], bytes],
    ) -> None: ...
    def scan(self, piece: bytes, last: bool) -> None: ...
    def take(self) -> list[tuple[bytes, bytes]]: ...  # (records of 48 bytes, names) of every partition

class UrlDealer(DocumentLines):
    counters: dict[str, int]
    def __init__(self, decisions: Sequence[str], file_name: str, reader: Callable[[bytes, int], bytes]) -> None: ...
    def deal(self, piece: bytes, last: bool) -> tuple[bytes, bytes]: ...
