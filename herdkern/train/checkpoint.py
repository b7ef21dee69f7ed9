"""Checkpoints that are complete or absent: step-N/ with weights, optimizer, state and a manifest of checksums.

model.safetensors and config.json make the folder a Hugging Face model; optimizer.safetensors, average.safetensors
and state.json are what a resumed run needs besides. A folder is written as step-N.tmp, synced, then renamed; no
pickle anywhere. Folders that several ranks wrote (sharded_checkpoint.py) are found, checked and loaded here, too.
"""

import hashlib
import json
import re
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from herdkern.engine import config_sha256, read_json, write_json_atomic
from herdkern.engine.shards import TMP_SUFFIX, remove_folder, replace_folder, seal_folder
from herdkern.model.hf_weights import hf_name
from herdkern.train.sharded_files import index_of, read_whole

BLOCK_BYTES = 1 << 20  # one checksum for each, so that damage is located
MAX_BLOCK_BYTES = 1 << 30
MANIFEST = "manifest.json"
FORMAT = {"format": "herdkern-checkpoint", "version": 1}
SHARDED_FORMAT = {"format": "herdkern-checkpoint", "version": 2}


class CorruptCheckpointError(ValueError):
    """A checkpoint whose bytes are not those that were written."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One loaded checkpoint: tensors by file stem ("model", "optimizer", "average") and the JSON state."""

    folder: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    files: Mapping[str, Any] | None = None,
    keep_last: int = 2,
) -> Path:
    """Write root/step-N, then delete all but the newest `keep_last` up to it and what an interrupted save left there.

    tensors: file stem -> named tensors.  state: JSON values for state.json.  files: further JSON files by name.
    Raises: OSError if the disk is full or the folder cannot be written; earlier checkpoints stay as they are.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step}"
    tmp = root / (final.name + TMP_SUFFIX)
    remove_folder(tmp)
    tmp.mkdir()
    try:
        for stem, named in tensors.items():
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
            try:
                save_file(contiguous, tmp / f"{stem}.safetensors", metadata={"format": "pt"})
            except Exception as e:  # safetensors has an error class of its own for a full disk
                raise OSError(f"save_checkpoint: cannot write {tmp / stem}.safetensors: {e}") from e
        for name, value in {**(files or {}), "state.json": dict(state)}.items():
            write_json_atomic(tmp / name, value)
        entries = {record.name: _describe(tmp / record.name) for record in seal_folder(tmp)}
        manifest: dict[str, Any] = {**FORMAT, "block_bytes": BLOCK_BYTES, "files": entries}
        manifest["sha256"] = manifest_sha256(manifest)
        write_json_atomic(tmp / MANIFEST, manifest)
        replace_folder(tmp, final)
    except BaseException:
        remove_folder(tmp)
        raise
    prune_checkpoints(root, keep_last, step)
    return final


def prune_checkpoints(root: Path, keep_last: int, step: int) -> None:
    """Delete all but the newest `keep_last` checkpoints up to that of `step`, and what interrupted saves left there.

    Later ones stay: a run that passed over a damaged one writes its steps again, and must not lose what it writes.
    """
    for old in [folder for folder in checkpoint_folders(root) if step_of(folder) <= step][:-keep_last]:
        aside = old.with_name(old.name + TMP_SUFFIX)  # a half-deleted folder must not look like a checkpoint
        remove_folder(aside)
        old.rename(aside)
    for rest in root.glob(f"step-*{TMP_SUFFIX}"):  # those just set aside, and what a kill left behind
        remove_folder(rest)


def checkpoint_folders(root: Path) -> list[Path]:
    """The folders step-N below `root`, oldest first; unfinished ones are left out."""
    found = [p for p in root.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """N of a folder step-N."""
    return int(folder.name.removeprefix("step-"))


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint below `root` that passes its checksums, or None; warns of each newer one that does not."""
    for folder in reversed(checkpoint_folders(root)):
        try:
            verify_checkpoint(folder)
            return folder
        except CorruptCheckpointError as e:
            warnings.warn(f"latest_checkpoint: passing over a damaged checkpoint: {e}", stacklevel=2)
    return None


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises: CorruptCheckpointError naming the file, and the byte range of the first damaged block.
    """
    manifest = read_manifest(folder)
    for name in manifest["files"]:
        verify_file(folder, name, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, of either form.

    Raises: CorruptCheckpointError if it is not whole, does not list state.json, or if the folder of several ranks holds
    a shard that is not of it.
    """
    path = folder / MANIFEST
    try:
        manifest = dict(read_json(path))
        if not 0 < int(manifest["block_bytes"]) <= MAX_BLOCK_BYTES:
            raise ValueError(f"block_bytes = {manifest['block_bytes']}")
        files = dict(manifest["files"])
        for entry in files.values():
            int(entry["bytes"]), str(entry["sha256"]), list(entry["block_crc32"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CorruptCheckpointError(f"{path} must be a checkpoint manifest, got {type(e).__name__}: {e}") from e
    if "state.json" not in files:
        raise CorruptCheckpointError(f"{path} must list state.json, got {sorted(files)}")
    # one without a checksum is from before there was one
    if manifest.keys() != {*FORMAT, "block_bytes", "files"} and manifest.get("sha256") != manifest_sha256(manifest):
        raise CorruptCheckpointError(f"{path} is damaged (its own checksum differs)")
    if "ranks" in manifest:
        foreign = {file.name for file in folder.glob("*.safetensors")} - set(files)
        if foreign:
            raise CorruptCheckpointError(f"{folder / min(foreign)} must not be there, as {MANIFEST} does not list it")
    return manifest


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """The checksum that a manifest has of itself."""
    return config_sha256({key: value for key, value in manifest.items() if key != "sha256"})


def verify_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Compare one file with what the manifest says of it.

    Raises: CorruptCheckpointError naming the file, and the byte range of the first damaged block.
    """
    path, entry, block_bytes = folder / name, manifest["files"][name], int(manifest["block_bytes"])
    if Path(name).name != name or not path.is_file():
        raise CorruptCheckpointError(f"{path} must be there, as {MANIFEST} lists it")
    try:
        found = _describe(path, block_bytes)
    except OSError as e:
        raise CorruptCheckpointError(f"{path} must be readable, got {e}") from e
    if found["bytes"] != int(entry["bytes"]):
        raise CorruptCheckpointError(f"{path} must have {entry['bytes']} bytes, got {found['bytes']}")
    if found["sha256"] != entry["sha256"]:
        pairs = enumerate(zip(found["block_crc32"], entry["block_crc32"]))
        bad = next((i for i, (got, want) in pairs if got != want), 0)
        end = min((bad + 1) * block_bytes, found["bytes"])
        raise CorruptCheckpointError(
            f"{path} is damaged between bytes {bad * block_bytes} and {end} (checksum differs)"
        )


def load_checkpoint(folder: Path) -> Checkpoint:
    """Everything in `folder`, checked; what several ranks wrote in parts comes whole, under the names that one writes.

    Raises: CorruptCheckpointError if a checksum differs; ValueError if it was written in an unknown version of the
    format.
    """
    verify_checkpoint(folder)
    manifest = read_manifest(folder)
    form = {key: manifest.get(key) for key in FORMAT}
    if form not in (FORMAT, SHARDED_FORMAT):
        raise ValueError(f"load_checkpoint: {folder} must be {FORMAT}, got version {manifest.get('version')!r}")
    if form == SHARDED_FORMAT:
        tensors: dict[str, dict[str, Tensor]] = {}
        for (stem, name), stored in index_of(folder, manifest["files"]).items():
            known = hf_name(name) if stem == "model" and "config.json" in manifest["files"] else name
            tensors.setdefault(stem, {})[known] = read_whole(stored)
    else:
        names = [name for name in manifest["files"] if name.endswith(".safetensors")]
        tensors = {Path(name).stem: load_file(folder / name) for name in names}
    return Checkpoint(folder=folder, tensors=tensors, state=json.loads((folder / "state.json").read_text("utf-8")))


class Checksums:
    """What a manifest says of a file, from its bytes in order; all parts but the last must be of `block_bytes`."""

    def __init__(self) -> None:
        self.digest, self.blocks, self.num_bytes = hashlib.sha256(), list[int](), 0

    def add(self, block: bytes | memoryview) -> None:
        """The next block."""
        self.digest.update(block)
        self.blocks.append(zlib.crc32(block))
        self.num_bytes += len(block)

    def entry(self) -> dict[str, Any]:
        """Size, SHA-256 and the CRC-32 of every block."""
        return {"bytes": self.num_bytes, "sha256": self.digest.hexdigest(), "block_crc32": self.blocks}


def _describe(path: Path, block_bytes: int = BLOCK_BYTES) -> dict[str, Any]:
    sums = Checksums()
    with open(path, "rb") as f:  # buffered: a short read would shift the blocks
        buffer = bytearray(min(block_bytes, path.stat().st_size + 1))
        view = memoryview(buffer)
        while num_bytes := f.readinto(buffer):
            sums.add(view[:num_bytes])
    return sums.entry()
