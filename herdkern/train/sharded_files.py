"""Shard files: safetensors whose header says where in the whole tensors their parts lie; their index; whole tensors.

A file holds at most one part of a tensor, under the key "<stem>.<name>". Offsets and sizes of the whole stand in the
metadata of the header, in the form of torch.distributed.checkpoint's Hugging Face storage (torch 2.13), whose reader
opens such a folder too.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_SHARDING = "DCP_SHARDING_INFO"
Tensors = Mapping[str, Mapping[str, Tensor]]  # stem -> name -> tensor


@dataclass(frozen=True, kw_only=True)
class Part:
    """A box of a tensor: where it begins in the whole and how far it reaches.

    file: where it lies, under `key`.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    key: str


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a checkpoint, and the parts that it lies in."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class NewPart:
    """A part that is to be written: `sizes` at `offsets` of a tensor of `shape`."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of the part."""
        return math.prod(self.sizes) * self.dtype.itemsize


def header_of(parts: Iterable[NewPart], *, whole: bool = False) -> bytes:
    """What a safetensors file of these parts, in this order, begins with; `whole`: they are whole tensors.

    Larger dtypes must come first, so that every part is aligned.  Raises: ValueError for a dtype without a name
    there.
    """
    parts = list(parts)
    metadata = {"format": "pt"}
    if not whole:
        sharding = {part.key: {"saved_offsets": part.offsets, "shape": part.shape} for part in parts}
        metadata |= {"DCP_VERSION": "1.0", _SHARDING: json.dumps(sharding, separators=(",", ":"))}
    entries: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for part in parts:
        if part.dtype not in _NAMES:
            raise ValueError(f"header_of: {part.key} must have a dtype of {', '.join(_DTYPES)}, got {part.dtype}")
        end = begin + part.nbytes
        entries[part.key] = {"dtype": _NAMES[part.dtype], "shape": part.sizes, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardImage:
    """The bytes of a shard file in host memory: header, then the parts, which `views` shows as tensors to copy into."""

    def __init__(self, parts: Iterable[NewPart], *, pinned: bool = False) -> None:
        ordered = sorted(parts, key=lambda part: (-part.dtype.itemsize, part.key))
        header = header_of(ordered)
        self.buffer = torch.empty(len(header) + sum(p.nbytes for p in ordered), dtype=torch.uint8, pin_memory=pinned)
        self.buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self.views: dict[str, Tensor] = {}
        begin = len(header)
        for part in ordered:
            flat = self.buffer[begin : begin + part.nbytes]
            self.views[part.key] = flat.view(part.dtype).view(part.sizes)
            begin += part.nbytes

    @property
    def data(self) -> memoryview:
        """All bytes."""
        return self.buffer.numpy().data


def index_of(folder: Path, files: Mapping[str, Any]) -> dict[tuple[str, str], StoredTensor]:
    """The tensors by (stem, name) in the .safetensors files among `files`, which a checkpoint's manifest lists.

    Of a checkpoint of one rank the file's name is the stem; a model's names are ours, not Hugging Face's.
    Raises: ValueError if the parts of a tensor are not all there, or a header cannot be read.
    """
    found: dict[tuple[str, str], StoredTensor] = {}
    for file in (folder / name for name in sorted(files) if name.endswith(".safetensors")):
        try:
            with safe_open(file, framework="pt") as f:
                sharding = json.loads((f.metadata() or {}).get(_SHARDING, "null"))
                for key in f.keys():  # noqa: SIM118 - not a dict
                    part = f.get_slice(key)
                    sizes, dtype = tuple(part.get_shape()), _DTYPES[part.get_dtype()]
                    if sharding is None:
                        stem, name = file.stem, key
                        if stem == "model" and "config.json" in files:
                            name = key.removeprefix("model.")
                        offsets, shape = (0,) * len(sizes), sizes
                    else:
                        stem, _, name = key.partition(".")
                        offsets, shape = tuple(sharding[key]["saved_offsets"]), tuple(sharding[key]["shape"])
                    one = Part(offsets=offsets, sizes=sizes, file=file, key=key)
                    others = found[stem, name].parts if (stem, name) in found else ()
                    found[stem, name] = StoredTensor(dtype=dtype, shape=shape, parts=(*others, one))
        except (SafetensorError, KeyError, TypeError) as e:
            raise ValueError(f"index_of: {file} must be a shard of a checkpoint, got {e}") from e
    for (stem, name), stored in found.items():
        if sum(math.prod(part.sizes) for part in stored.parts) != math.prod(stored.shape):
            raise ValueError(f"index_of: {folder} must hold all parts of {stem}.{name}, got {len(stored.parts)}")
    return found


def read_whole(stored: StoredTensor) -> Tensor:
    """A tensor put together from its parts."""
    whole = torch.empty(stored.shape, dtype=stored.dtype)
    for part in stored.parts:
        with safe_open(part.file, framework="pt") as f:
            inside = tuple(slice(at, at + size) for at, size in zip(part.offsets, part.sizes, strict=True))
            whole[inside] = f.get_tensor(part.key)
    return whole


def flat_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors by the key that they have in a shard file."""
    return {f"{stem}.{name}": tensor for stem, named in tensors.items() for name, tensor in named.items()}


def rank_file(rank: int, size: int) -> str:
    """The name of the file that holds the state of one rank."""
    return f"rank-{rank:05d}-of-{size:05d}.json"
