"""Checkpoints that are complete or absent: step-N/ with weights, optimizer, state and a manifest of checksums.

model.safetensors and config.json make the folder a Hugging Face model; optimizer.safetensors, average.safetensors
and state.json are what a resumed run needs besides. A folder is written as step-N.tmp, synced, then renamed; no
pickle anywhere.
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

from herdkern.engine import read_json, write_json_atomic
from herdkern.engine.shards import TMP_SUFFIX, remove_folder, replace_folder, seal_folder

BLOCK_BYTES = 1 << 20  # one checksum for each, so that damage is located
MANIFEST = "manifest.json"
FORMAT = {"format": "herdkern-checkpoint", "version": 1}


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
    """Write root/step-N, then delete all but the newest `keep_last` and whatever an interrupted save left there.

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
        write_json_atomic(tmp / MANIFEST, {**FORMAT, "block_bytes": BLOCK_BYTES, "files": entries})
        replace_folder(tmp, final)
    except BaseException:
        remove_folder(tmp)
        raise
    for old in checkpoint_folders(root)[:-keep_last]:
        aside = old.with_name(old.name + TMP_SUFFIX)  # a half-deleted folder must not look like a checkpoint
        remove_folder(aside)
        old.rename(aside)
    for rest in root.glob(f"step-*{TMP_SUFFIX}"):  # those just set aside, and what a kill left behind
        remove_folder(rest)
    return final


def checkpoint_folders(root: Path) -> list[Path]:
    """The folders step-N below `root`, oldest first; unfinished ones are left out."""
    found = [p for p in root.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


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
    manifest_path = folder / MANIFEST
    try:
        manifest = read_json(manifest_path)
        files, block_bytes = dict(manifest["files"]), int(manifest["block_bytes"])
        expected = {name: (int(e["bytes"]), str(e["sha256"]), list(e["block_crc32"])) for name, e in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CorruptCheckpointError(
            f"{manifest_path} must be a checkpoint manifest, got {type(e).__name__}: {e}"
        ) from e
    if "state.json" not in expected:
        raise CorruptCheckpointError(f"{manifest_path} must list state.json, got {sorted(expected)}")
    for name, (num_bytes, sha256, blocks) in expected.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CorruptCheckpointError(f"{path} must be there, as {MANIFEST} lists it")
        found = _describe(path, block_bytes)
        if found["bytes"] != num_bytes:
            raise CorruptCheckpointError(f"{path} must have {num_bytes} bytes, got {found['bytes']}")
        if found["sha256"] != sha256:
            pairs = enumerate(zip(found["block_crc32"], blocks))
            bad = next((i for i, (got, want) in pairs if got != want), 0)
            end = min((bad + 1) * block_bytes, num_bytes)
            raise CorruptCheckpointError(
                f"{path} is damaged between bytes {bad * block_bytes} and {end} (checksum differs)"
            )


def load_checkpoint(folder: Path) -> Checkpoint:
    """Everything in `folder`, checked.

    Raises: CorruptCheckpointError if a checksum differs; ValueError if it was written in an unknown version of the
    format.
    """
    verify_checkpoint(folder)
    manifest = read_json(folder / MANIFEST)
    if {key: manifest.get(key) for key in FORMAT} != FORMAT:
        raise ValueError(f"load_checkpoint: {folder} must be {FORMAT}, got version {manifest.get('version')!r}")
    tensors = {Path(name).stem: load_file(folder / name) for name in manifest["files"] if name.endswith(".safetensors")}
    return Checkpoint(folder=folder, tensors=tensors, state=json.loads((folder / "state.json").read_text("utf-8")))


def _describe(path: Path, block_bytes: int = BLOCK_BYTES) -> dict[str, Any]:
    digest = hashlib.sha256()
    blocks, num_bytes = [], 0
    with open(path, "rb") as f:
        while block := f.read(block_bytes):
            digest.update(block)
            blocks.append(zlib.crc32(block))
            num_bytes += len(block)
    return {"bytes": num_bytes, "sha256": digest.hexdigest(), "block_crc32": blocks}
