"""The newest intact checkpoint of all ranks, and its tensors in any layout.

torch.distributed.checkpoint plans which boxes of which parts a rank reads; nothing is sent between ranks but answers.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from herdkern.train.checkpoint import CorruptCheckpointError, checkpoint_folders, read_manifest, verify_file
from herdkern.train.sharded_files import Part, StoredTensor, Tensors, flat_tensors, index_of, rank_file
from herdkern.train.sharded_ranks import Ranks


def latest_sharded(root: Path | str, group: dist.ProcessGroup | None = None) -> Path | None:
    """The newest checkpoint below `root` that passes its checksums, the same on all ranks; None if there is none.

    Each rank checks a part of the files. Warns on the first rank of each newer one that is damaged.
    """
    ranks = Ranks(group)
    _, folders = ranks.agree(lambda: checkpoint_folders(Path(root)), OSError, "latest_sharded", lambda seen: seen[0])
    for folder in reversed(folders):
        damage = _damage(folder, ranks)
        if not damage:
            return folder
        if ranks.rank == 0:
            warnings.warn(f"latest_sharded: passing over a damaged checkpoint: {damage[0]}", stacklevel=2)
    return None


def load_sharded(
    folder: Path | str, tensors: Tensors, group: dist.ProcessGroup | None = None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Fill `tensors` in place from a checkpoint of any layout, one rank's included; returns its state and this rank's.

    tensors: as in `Saver.save`; stems that the checkpoint has and the call does not name are left unread. The second
    value is None when another number of ranks wrote the checkpoint.
    Raises: on all ranks CorruptCheckpointError if a checksum differs; ValueError naming a tensor that the checkpoint
    does not have, that no rank asks for, or that has another shape.
    """
    folder, ranks = Path(folder), Ranks(group)
    damage = _damage(folder, ranks)
    if damage:
        raise CorruptCheckpointError(damage[0])
    flat = flat_tensors(tensors)
    wanted = ranks.join(list(flat), lambda keys: {key for some in keys for key in some})

    def load() -> tuple[dict[str, Any], dict[str, Any] | None]:
        manifest = read_manifest(folder)
        index = {f"{stem}.{name}": one for (stem, name), one in index_of(folder, manifest["files"]).items()}
        known = {key for key in index if key.partition(".")[0] in tensors}
        if wanted != known:
            odd = min(wanted ^ known)
            raise ValueError(f"{folder} must hold the tensors that are asked for, they differ in {odd!r}")
        _read_into(flat, index)
        mine = rank_file(ranks.rank, ranks.size)
        own = json.loads((folder / mine).read_bytes()) if mine in manifest["files"] else None
        return json.loads((folder / "state.json").read_bytes()), own

    loaded: tuple[dict[str, Any], dict[str, Any] | None] = ranks.agree(load, ValueError, "load_sharded")[0]
    return loaded


@torch.no_grad()
def _read_into(flat: Mapping[str, Tensor], index: Mapping[str, StoredTensor]) -> None:
    """Copy what this rank holds of each tensor out of the parts that hold it."""
    metadata: dict[str, Any] = {}
    parts: dict[tuple[str, tuple[int, ...]], Part] = {}
    for key in flat:
        stored = index[key]
        if tuple(flat[key].shape) != stored.shape:
            raise ValueError(f"{key} must be {stored.shape} as in the checkpoint, got {tuple(flat[key].shape)}")
        chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in stored.parts]
        properties = TensorProperties(dtype=stored.dtype)
        metadata[key] = TensorStorageMetadata(properties=properties, size=torch.Size(stored.shape), chunks=chunks)
        parts |= {(key, part.offsets): part for part in stored.parts}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({key: t.detach() for key, t in flat.items()}, Metadata(metadata), is_coordinator=True)
    by_file: dict[Path, list[tuple[Any, Part]]] = {}
    for item in planner.create_local_plan().items:
        part = parts[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
        by_file.setdefault(part.file, []).append((item, part))
    for file, items in by_file.items():
        with safe_open(file, framework="pt") as f:
            for item, part in items:
                inside = tuple(slice(at, at + n) for at, n in zip(item.storage_offsets, item.lengths, strict=True))
                value = f.get_slice(part.key)[inside] if inside else f.get_tensor(part.key)
                planner.resolve_tensor(item).copy_(value)


def _damage(folder: Path, ranks: Ranks) -> list[str]:
    """What is wrong with a checkpoint; each rank looks at some of its files, all get the answer."""
    try:
        manifest = read_manifest(folder)
        files = sorted(manifest["files"], key=lambda name: (-int(manifest["files"][name]["bytes"]), name))
        for name in files[ranks.rank :: ranks.size]:
            verify_file(folder, name, manifest)
        found = ""
    except CorruptCheckpointError as e:
        found = str(e)
    damage: list[str] = ranks.join(found, lambda every: sorted(one for one in every if one))
    return damage
