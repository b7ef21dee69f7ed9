"""Checkpoints that all ranks of a run write and any number of ranks reads: sharded, in the background, all or nothing.

What a rank has to write is planned by torch.distributed.checkpoint (copies are written once, the load is even), which
also plans what a rank of another layout reads. `Saver.save` copies this rank's parts into a buffer that is the image of
its file and returns; a thread writes it. Phase 1: every rank's shard is written and synced, with its checksums.
Phase 2: the first rank writes state, files and the manifest into step-N.tmp and renames it to step-N.

Source: The Llama 3 Herd of Models, section 3.3.1 (arXiv:2407.21783); no pickle on disk.
"""

import contextlib
import dataclasses
import json
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan

from herdkern.engine.shards import TMP_SUFFIX, remove_folder, replace_folder, sync, sync_folder
from herdkern.parallel.data import local
from herdkern.train.checkpoint import MANIFEST, SHARDED_FORMAT, Checksums, manifest_sha256, prune_checkpoints
from herdkern.train.sharded_files import NewPart, ShardImage, Tensors, flat_tensors, rank_file
from herdkern.train.sharded_ranks import Ranks

BLOCK_BYTES = 16 << 20  # one checksum for each: 256 in the manifest for a shard of 4 GB
LAYOUT = ("placements", "device_mesh")  # of a DTensor


class Saver:
    """Writes checkpoints below `root`, which lies on a file system that all ranks of `group` share.

    All ranks must make it, and call its methods, at the same time. Without a process group there is one rank.

    keep_last: checkpoints that stay.  background: False writes before `save` returns.  At most one write is open: the
    next save waits for it. Call `wait` before the process ends, else the last checkpoint may not come to be.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        group: dist.ProcessGroup | None = None,
        keep_last: int = 2,
        background: bool = True,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"Saver: keep_last must be at least 1, got {keep_last}")
        self.root = Path(root)
        self.keep_last = keep_last
        self.background = background
        self._ranks = Ranks(group, own=True)
        self._image = ShardImage(())
        self._planned: Any = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        step: int,
        tensors: Tensors,
        state: Mapping[str, Any],
        rank_state: Mapping[str, Any],
        files: Mapping[str, Any] | None = None,
    ) -> Path:
        """Take a snapshot and write it as root/step-N; returns that path, which is there only after `wait`.

        tensors: stem -> name -> tensor or DTensor; names are those of the whole model, and what several ranks hold
        under one name is the same (a tied tensor has one name).  state, files: JSON, the same on all ranks.
        rank_state: JSON of this rank.
        Raises: what the save before failed with, as `wait` does; ValueError, on all ranks, if the tensors of the ranks
        do not make up whole ones or a state is not JSON.
        """
        self.wait()
        with torch.no_grad():
            texts = self._prepare(tensors, state, rank_state, files or {})
            flat = flat_tensors(tensors)
            for key, view in self._image.views.items():
                view.copy_(local(flat[key]), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.background:
            self._thread = threading.Thread(target=self._write, args=(step, texts), daemon=True)
            self._thread.start()
        else:
            self._write(step, texts)
            self.wait()
        return self.root / f"step-{step}"

    def wait(self) -> None:
        """Wait until the open write has ended.

        Raises: OSError, on all ranks, naming the rank and path that could not be written (earlier checkpoints stay as
        they are); RuntimeError if a rank is gone.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _prepare(
        self, tensors: Tensors, state: Mapping[str, Any], rank_state: Mapping[str, Any], files: Mapping[str, Any]
    ) -> dict[str, bytes]:
        """Plan what this rank writes, if that has changed on any rank; the JSON files that this rank writes."""
        rank, size = self._ranks.rank, self._ranks.size
        flat = flat_tensors(tensors)
        layout = [(k, t.shape, t.dtype, *(getattr(t, a, None) for a in LAYOUT)) for k, t in flat.items()]

        texts: dict[str, bytes] = {}

        def check() -> bool:
            for stem in tensors:
                if "." in stem or not stem:
                    raise ValueError(f"Saver.save: a stem must be a word without dots, got {stem!r}")
            named = {rank_file(rank, size): rank_state}
            if rank == 0:
                named |= {**files, "state.json": dict(state)}
            texts.update({name: _json(name, value) for name, value in named.items()})
            return layout != self._planned

        if self._ranks.agree(check, ValueError, "Saver.save", any)[1]:
            self._planned = None
            plan = _plan(flat, self._ranks)
            parts = [_new_part(item) for item in plan.items]
            pinned = any(t.device.type == "cuda" for t in flat.values())
            self._image, _ = self._ranks.agree(lambda: ShardImage(parts, pinned=pinned), ValueError, "Saver.save")
            self._planned = layout
        return texts

    def _write(self, step: int, texts: Mapping[str, bytes]) -> None:
        final = self.root / f"step-{step}"
        tmp = self.root / (final.name + TMP_SUFFIX)
        rank, size = self._ranks.rank, self._ranks.size
        what = f"Saver: {final}"

        def start() -> None:
            if rank == 0:
                self.root.mkdir(parents=True, exist_ok=True)
                remove_folder(tmp)
                tmp.mkdir()

        def write_shard() -> dict[str, Any]:
            shard = f"shard-{rank:05d}-of-{size:05d}.safetensors"
            entries = {shard: _write_file(tmp / shard, self._image.data)}
            return entries | {name: _write_file(tmp / name, memoryview(text)) for name, text in texts.items()}

        def commit(written: list[dict[str, Any]]) -> None:
            entries = {name: entry for some in written for name, entry in some.items()}
            _check_visible(tmp, entries)
            manifest = {**SHARDED_FORMAT, "step": step, "ranks": size, "block_bytes": BLOCK_BYTES, "files": entries}
            manifest["sha256"] = manifest_sha256(manifest)
            _write_file(tmp / MANIFEST, memoryview(_json(MANIFEST, manifest)))
            sync_folder(tmp)
            replace_folder(tmp, final)
            prune_checkpoints(self.root, self.keep_last, step)

        try:
            try:
                self._ranks.agree(start, OSError, what)
                self._ranks.agree(write_shard, OSError, what, commit)
            except OSError:  # known to all ranks: none of them writes any more
                if rank == 0:
                    with contextlib.suppress(OSError):  # the next save removes it
                        remove_folder(tmp)
                raise
        except OSError as e:
            self._failure = e
        except Exception as e:
            self._failure = RuntimeError(f"{what} was not committed; {type(e).__name__}: {e}")


def _plan(flat: Mapping[str, Tensor], ranks: Ranks) -> SavePlan:
    """The parts that this rank writes, from what all ranks hold."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)

    def plan_mine() -> SavePlan:
        planner.set_up_planner(dict(flat), is_coordinator=ranks.rank == 0)
        plan = planner.create_local_plan()
        # an empty shard may begin where another rank's begins, and would be taken for a copy of it
        items = [item for item in plan.items if _holds_something(item)]
        return dataclasses.replace(plan, items=items)

    plans: list[SavePlan] = []  # of the first rank
    ranks.agree(plan_mine, ValueError, "Saver.save", lambda every: plans.extend(planner.create_global_plan(every)[0]))
    return planner.finish_plan(ranks.scatter(plans))


def _holds_something(item: Any) -> bool:
    return math.prod(item.tensor_data.chunk.sizes) > 0 or math.prod(item.tensor_data.size) == 0


def _new_part(item: Any) -> NewPart:
    data = item.tensor_data
    return NewPart(
        key=item.index.fqn,
        dtype=data.properties.dtype,
        shape=tuple(data.size),
        offsets=tuple(data.chunk.offsets),
        sizes=tuple(data.chunk.sizes),
    )


def _json(name: str, value: Any) -> bytes:
    try:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{name} must be JSON, got {e}") from e
    return (text + "\n").encode()


def _write_file(path: Path, data: memoryview) -> dict[str, Any]:
    """Write and sync a file; what the manifest says of it. Raises: OSError that names `path`."""
    sums = Checksums()
    try:
        with open(path, "wb", buffering=0) as f:
            for begin in range(0, len(data), BLOCK_BYTES):
                block = data[begin : begin + BLOCK_BYTES]
                sums.add(block)
                while block:
                    block = block[f.write(block) :]
            sync(f.fileno(), path)
    except OSError as e:
        e.filename = e.filename or str(path)  # write(2) does not say to what
        raise
    return sums.entry()


def _check_visible(folder: Path, entries: Mapping[str, Any]) -> None:
    for name, entry in entries.items():
        found = (folder / name).stat().st_size
        if found != entry["bytes"]:
            raise OSError(f"{folder / name} must have {entry['bytes']} bytes, got {found}; is the folder shared?")
