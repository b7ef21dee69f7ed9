"""Token shards: documents end to end in memory-mapped files, with borders, provenance and checksums.

A shard is a folder: tokens.npy (uint16 or uint32), cu_seqlens.npy (int64 borders), documents.jsonl.zst (where each is
from) and manifest.json (sizes, CRC-32 of every MiB, SHA-256). A document is its BOS, its text, its EOS.
"""

import bisect
import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard
from numpy.typing import NDArray

from herdkern.data.decompress import read_lines
from herdkern.data.document import Document, read_documents
from herdkern.engine import config_sha256, read_json, write_json_atomic
from herdkern.tokenizer import Tokenizer

FORMAT, VERSION = "herdkern-tokens", 1
BLOCK_BYTES = 1 << 20
TOKENS, BORDERS, DOCUMENTS, MANIFEST = "tokens.npy", "cu_seqlens.npy", "documents.jsonl.zst", "manifest.json"
_BATCH_BYTES = 4 << 20  # of text, encoded at a time
_INFO_FIELDS = ("id", "url", "source", "lang", "record")
_MAX_INFO_BYTES = 1 << 20


class CorruptShardError(ValueError):
    """A shard is damaged; `path` is the file and `offset` the byte from which on it cannot be trusted."""

    def __init__(self, path: Path, offset: int, detail: str):
        super().__init__(f"{path}: corrupt at byte {offset}: {detail}; pack the shard again")
        self.path, self.offset = path, offset


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """shard_tokens: a shard ends with the document that reaches it.  num_threads: of the encoder."""

    shard_tokens: int = 1 << 27
    num_threads: int = 1

    def __post_init__(self) -> None:
        for name in ("shard_tokens", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"PackConfig: {name} must be at least 1, got {getattr(self, name)}")


def pack_shard(inputs: list[Path], out: Path, config: PackConfig) -> dict[str, Any]:
    """Stage: `pack_documents` with the tokenizer's folder as first input and document files behind it."""
    return pack_documents(inputs[0], inputs[1:], out, config)


def pack_documents(tokenizer_dir: Path, inputs: Sequence[Path], out: Path, config: PackConfig) -> dict[str, Any]:
    """Tokenise the documents of `inputs` in order into out/shard-00000, out/shard-00001, …; returns counters.

    Empty documents are left out. Without any other document there is no shard.
    """
    tokenizer = Tokenizer.load(tokenizer_dir)
    counters = {"docs_in": 0, "docs_out": 0, "tokens": 0, "text_bytes": 0, "shards": 0}
    writer: _ShardWriter | None = None
    try:
        for batch in _batches(itertools.chain.from_iterable(map(read_documents, inputs))):
            counters["docs_in"] += len(batch)
            batch = [document for document in batch if document.text]
            texts = [document.text for document in batch]
            ids, offsets = tokenizer.encode_to_numpy(texts, num_threads=config.num_threads)
            for index, document in enumerate(batch):
                if writer is None:
                    writer = _ShardWriter(out / f"shard-{counters['shards']:05d}", tokenizer)
                writer.add(document, ids[offsets[index] : offsets[index + 1]])
                counters["docs_out"] += 1
                if writer.num_tokens >= config.shard_tokens:
                    _finish(writer, counters)
                    writer = None
        if writer is not None:
            _finish(writer, counters)
    except BaseException:
        if writer is not None:
            writer.discard()
        raise
    empty = counters["docs_in"] - counters["docs_out"]
    return {**counters, "dropped": {"empty": empty} if empty else {}}


def _finish(writer: "_ShardWriter", counters: dict[str, int]) -> None:
    writer.finish()
    counters["tokens"] += writer.num_tokens
    counters["text_bytes"] += writer.text_bytes
    counters["shards"] += 1


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _ShardWriter:
    """One shard under a temporary name until `finish`."""

    def __init__(self, path: Path, tokenizer: Tokenizer):
        self.path, self.tokenizer = path, tokenizer
        self.dtype = np.dtype("<u2" if tokenizer.n_vocab < 65536 else "<u4")
        self.num_tokens = self.text_bytes = 0
        self._borders = [0]
        self._bos = np.array([tokenizer.bos_id], self.dtype).tobytes()
        self._eos = np.array([tokenizer.eos_id], self.dtype).tobytes()
        self._folder = path.with_name(path.name + ".tmp")
        if self._folder.exists():
            shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True)
        self._tokens = open(self._folder / TOKENS, "wb")  # noqa: SIM115 - closed by finish and discard
        self._write_header()
        self._infos = open(self._folder / DOCUMENTS, "wb")  # noqa: SIM115 - closed by finish and discard
        self._compressor = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()

    def _write_header(self) -> None:
        """An .npy header that has the same length for every number of tokens (numpy leaves room to grow)."""
        self._tokens.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.num_tokens,)}
        np.lib.format.write_array_header_1_0(self._tokens, header)

    def add(self, document: Document, ids: NDArray[np.uint32]) -> None:
        """Append one document."""
        self._tokens.write(self._bos + ids.astype(self.dtype).tobytes() + self._eos)
        self.num_tokens += len(ids) + 2
        self.text_bytes += len(document.text.encode())
        self._borders.append(self.num_tokens)
        info = {name: getattr(document, name) for name in _INFO_FIELDS}
        line = json.dumps(info, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        self._infos.write(self._compressor.compress(line))

    def finish(self) -> None:
        """Write header, borders and manifest, sync all, give the folder its name."""
        self._write_header()
        self._infos.write(self._compressor.flush())
        for file in (self._tokens, self._infos):
            _sync_and_close(file)
        with open(self._folder / BORDERS, "wb") as borders:
            np.save(borders, np.array(self._borders, np.dtype("<i8")))
            _sync_and_close(borders)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype.name,
            "num_tokens": self.num_tokens,
            "num_docs": len(self._borders) - 1,
            "n_vocab": self.tokenizer.n_vocab,
            "bos_id": self.tokenizer.bos_id,
            "eos_id": self.tokenizer.eos_id,
            "tokenizer_sha256": self.tokenizer.sha256,
            "text_bytes": self.text_bytes,
            "block_bytes": BLOCK_BYTES,
            "files": {name: _checksums(self._folder / name) for name in (TOKENS, BORDERS, DOCUMENTS)},
        }
        write_json_atomic(self._folder / MANIFEST, {**manifest, "check": config_sha256(manifest)})
        if self.path.exists():
            shutil.rmtree(self.path)
        os.replace(self._folder, self.path)

    def discard(self) -> None:
        """Remove what was written."""
        self._tokens.close()
        self._infos.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _checksums(path: Path) -> dict[str, Any]:
    blocks: list[int] = []
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            blocks.append(zlib.crc32(block))
            digest.update(block)
    return {"bytes": path.stat().st_size, "crc32": blocks, "sha256": digest.hexdigest()}


class TokenShard:
    """One shard, memory-mapped.

    tokens: (num_tokens,) uint16 | uint32.  cu_seqlens: (num_docs + 1,) int64.
    Raises: CorruptShardError if a file is missing, cut or does not fit the manifest (contents: see `verify`).
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.manifest = self._read_manifest()
        self.num_tokens: int = self.manifest["num_tokens"]
        self.num_docs: int = self.manifest["num_docs"]
        self.tokens = self._map(TOKENS, np.dtype(self.manifest["dtype"]), self.num_tokens)
        self.cu_seqlens = self._map(BORDERS, np.dtype("<i8"), self.num_docs + 1)
        if self.cu_seqlens[0] != 0 or self.cu_seqlens[-1] != self.num_tokens:
            raise CorruptShardError(self.path / BORDERS, 0, "borders do not span the tokens")

    def _read_manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        try:
            manifest = read_json(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"TokenShard: {self.path} must be a token shard, it has no {MANIFEST}") from None
        except ValueError as error:
            raise CorruptShardError(path, 0, str(error)) from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise CorruptShardError(path, 0, f"format is not {FORMAT!r}")
        if manifest.get("version") != VERSION:
            raise ValueError(f"TokenShard: {path} must have version {VERSION}, got {manifest.get('version')!r}")
        if manifest.pop("check", None) != config_sha256(manifest):
            raise CorruptShardError(path, 0, "its own checksum differs")
        try:
            for name in (TOKENS, BORDERS, DOCUMENTS):
                size = (self.path / name).stat().st_size if (self.path / name).exists() else 0
                expected = manifest["files"][name]["bytes"]
                if size != expected:
                    raise CorruptShardError(self.path / name, min(size, expected), f"{size} bytes, not {expected}")
        except (KeyError, TypeError) as error:
            raise CorruptShardError(path, 0, f"lacks {error}") from error
        return manifest

    def _map(self, name: str, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
        try:
            array = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise CorruptShardError(self.path / name, 0, f"no array ({error})") from error
        if array.dtype != dtype or array.shape != (length,):
            detail = f"holds {array.dtype}{list(array.shape)}, not {dtype}[{length}]"
            raise CorruptShardError(self.path / name, 0, detail)
        return np.asarray(array)

    def verify(self) -> None:
        """Read every file once. Raises: CorruptShardError naming the file and its first block that has changed."""
        for name, expected in self.manifest["files"].items():
            with open(self.path / name, "rb") as file:
                for index, crc32 in enumerate(expected["crc32"]):
                    if zlib.crc32(file.read(self.manifest["block_bytes"])) != crc32:
                        offset = index * self.manifest["block_bytes"]
                        raise CorruptShardError(
                            self.path / name, offset, "checksum differs in the block that begins here"
                        )

    @cached_property
    def _infos(self) -> list[bytes]:
        path = self.path / DOCUMENTS
        lines = [line or b"{}" for _, _, line in read_lines(path, max_line_bytes=_MAX_INFO_BYTES)]
        if len(lines) != self.num_docs:
            raise CorruptShardError(path, 0, f"{len(lines)} lines for {self.num_docs} documents")
        return lines

    def info(self, index: int) -> dict[str, str]:
        """Where document `index` is from: id, url, source, lang, record."""
        info: dict[str, str] = json.loads(self._infos[index])
        return info

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenShard, (self.path,)


class TokenDataset:
    """Shards end to end as one sequence of tokens and one of documents.

    Raises: ValueError if there is no shard or they were made with different tokenizers; CorruptShardError.
    """

    def __init__(self, paths: Sequence[Path | str]):
        if not paths:
            raise ValueError("TokenDataset: paths must name at least one shard, got none")
        self.shards = [TokenShard(path) for path in paths]
        first = self.shards[0].manifest
        for shard in self.shards:
            if shard.manifest["tokenizer_sha256"] != first["tokenizer_sha256"]:
                raise ValueError(
                    f"TokenDataset: all shards must come from one tokenizer, {shard.path} differs from {paths[0]}"
                )
        self._token_starts = [0, *itertools.accumulate(shard.num_tokens for shard in self.shards)]
        self._doc_starts = [0, *itertools.accumulate(shard.num_docs for shard in self.shards)]
        self.num_tokens: int = self._token_starts[-1]
        self.num_docs: int = self._doc_starts[-1]
        self.text_bytes: int = sum(shard.manifest["text_bytes"] for shard in self.shards)
        self.n_vocab: int = first["n_vocab"]
        self.bos_id: int = first["bos_id"]
        self.eos_id: int = first["eos_id"]
        self.tokenizer_sha256: str = first["tokenizer_sha256"]

    def window(self, start: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Tokens [start, start + length) and the document borders among them.

        Returns: tokens (length,) int64, cu_seqlens int32 from 0 to length. The first and last document may be pieces.
        Raises: ValueError if the window is not inside the dataset.
        """
        if length < 0 or start < 0 or start + length > self.num_tokens:
            raise ValueError(
                f"window: start and length must lie inside {self.num_tokens} tokens, got start={start} length={length}"
            )
        tokens = np.empty(length, np.int64)
        borders: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        index = min(bisect.bisect_right(self._token_starts, start), len(self.shards)) - 1
        done = 0
        while done < length:
            shard, base = self.shards[index], self._token_starts[index]
            begin = start + done - base
            end = min(shard.num_tokens, begin + length - done)
            tokens[done : done + end - begin] = shard.tokens[begin:end]
            low, high = np.searchsorted(shard.cu_seqlens, (begin, end), side="right")
            borders.append(shard.cu_seqlens[low:high] - begin + done)
            done += end - begin
            index += 1
        cu_seqlens = np.concatenate(borders)
        if cu_seqlens[-1] != length:
            cu_seqlens = np.append(cu_seqlens, length)
        return tokens, cu_seqlens.astype(np.int32)

    def document(self, index: int) -> tuple[NDArray[np.int64], dict[str, str]]:
        """All tokens of document `index`, BOS and EOS included, and where it is from."""
        position, inside = self._place(self._doc_starts, index, "document: index")
        shard = self.shards[position]
        begin, end = shard.cu_seqlens[inside], shard.cu_seqlens[inside + 1]
        return shard.tokens[begin:end].astype(np.int64), shard.info(inside)

    def locate(self, token_index: int) -> tuple[int, dict[str, str]]:
        """The index of the document that holds a token, and where that document is from."""
        position, inside = self._place(self._token_starts, token_index, "locate: token_index")
        shard = self.shards[position]
        document = int(np.searchsorted(shard.cu_seqlens, inside, side="right")) - 1
        return self._doc_starts[position] + document, shard.info(document)

    @staticmethod
    def _place(starts: list[int], index: int, what: str) -> tuple[int, int]:
        """(shard, index inside it)."""
        if not 0 <= index < starts[-1]:
            raise ValueError(f"{what} must be in [0, {starts[-1]}), got {index}")
        position = bisect.bisect_right(starts, index) - 1
        return position, index - starts[position]

    def verify(self) -> None:
        """Check every byte of every shard. Raises: CorruptShardError naming file and byte offset."""
        for shard in self.shards:
            shard.verify()

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenDataset, ([shard.path for shard in self.shards],)
