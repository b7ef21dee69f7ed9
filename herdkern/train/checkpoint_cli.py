"""`herdkern checkpoint inspect | verify | export`: what a checkpoint holds, if it is intact, its model for others."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from herdkern.command import UsageError, near, parse

USAGE = """usage: herdkern checkpoint COMMAND FOLDER [ARGUMENTS]

  inspect FOLDER           step, layout, files, tensors
  verify FOLDER            compare every file with its checksums; status 1 if one differs
  export FOLDER --to DIR   write the model as a Hugging Face folder

FOLDER is one checkpoint (step-N), or a folder of them or a run: then the newest intact one is taken (verify: all).
`herdkern checkpoint COMMAND --help` tells more."""


def main(args: list[str]) -> int:
    """Run `herdkern checkpoint ...`; returns the exit status."""
    commands: dict[str, Callable[..., int]] = {"inspect": inspect, "verify": verify, "export": export}
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if args else 2
    if args[0] not in commands:
        known = list(commands)
        raise UsageError(
            f"checkpoint: the word after it must be one of {', '.join(known)}, got {args[0]!r}{near(args[0], known)}"
        )
    return parse(commands[args[0]], args[1:], f"checkpoint {args[0]}")


def inspect(folder: Path, /) -> int:
    """Tell what a checkpoint holds, without reading its tensors.

    Args:
        folder: A checkpoint, a folder of checkpoints or a run.
    """
    from herdkern.engine import read_json
    from herdkern.train.checkpoint import read_manifest
    from herdkern.train.sharded_files import index_of

    found = _all(folder)[-1]
    manifest = read_manifest(found)
    state = read_json(found / "state.json")
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    print(f"{found}\nstep {manifest.get('step', state.get('step'))}, written by {manifest.get('ranks', 1)} ranks")
    if "parallel" in state:
        print("layout: " + ", ".join(f"{axis} {size}" for axis, size in state["parallel"].items()))
    index = index_of(found, manifest["files"])
    for stem in sorted({stem for stem, _ in index}):
        some = [one for (of, _), one in index.items() if of == stem]
        kinds = ", ".join(sorted({str(one.dtype).removeprefix("torch.") for one in some}))
        parts = max(len(one.parts) for one in some)
        print(f"{stem}: {len(some)} tensors, {sum(one.nbytes for one in some):,} bytes, {kinds}, at most {parts} parts")
    for name in sorted(sizes):
        print(f"  {sizes[name]:>16,}  {name}")
    print(f"  {sum(sizes.values()):>16,}  in all")
    return 0


def verify(folder: Path, /) -> int:
    """Compare every file with its checksums; status 1 if one differs.

    Args:
        folder: A checkpoint, a folder of checkpoints or a run.
    """
    from herdkern.train.checkpoint import CorruptCheckpointError, read_manifest, verify_file

    status = 0
    for one in _all(folder):
        damage = []
        try:
            manifest = read_manifest(one)
        except CorruptCheckpointError as e:
            manifest, damage = {"files": {}}, [str(e)]
        for name in sorted(manifest["files"]):
            try:
                verify_file(one, name, manifest)
            except CorruptCheckpointError as e:
                damage.append(str(e))
        print(f"{one}: " + (f"{len(damage)} damaged" if damage else f"{len(manifest['files'])} files verified"))
        print("".join(f"  {text}\n" for text in damage), end="")
        status |= bool(damage)
    return status


def export(
    folder: Path,
    /,
    *,
    to: Path,
    weights: Literal["model", "average"] = "model",
    dtype: Literal["fp32", "bf16"] = "fp32",
    tokenizer: Path | None = None,
) -> int:
    """Write the model of a checkpoint as a Hugging Face folder; it needs the memory of one tensor.

    Args:
        folder: A checkpoint, a folder of checkpoints or a run.
        to: The folder to write; it must not exist yet.
        weights: The model's own weights, or their average over the last steps.
        dtype: Of the weights on disk.
        tokenizer: A folder of a tokenizer, whose files are put beside the weights.
    """
    import torch

    from herdkern.train.checkpoint import latest_checkpoint
    from herdkern.train.sharded_export import export_checkpoint

    every = _all(folder)
    found = every[0] if every == [folder] else latest_checkpoint(every[-1].parent)
    if found is None:
        raise ValueError(f"checkpoint export: folder must hold an intact checkpoint, got {folder}")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    print(export_checkpoint(found, to, weights=weights, dtype=dtypes[dtype], tokenizer=tokenizer))
    return 0


def _all(folder: Path) -> list[Path]:
    """The checkpoints at `folder`, oldest first."""
    from herdkern.train.checkpoint import MANIFEST, checkpoint_folders

    if (folder / MANIFEST).is_file() or folder.name.startswith("step-"):
        return [folder]
    found = checkpoint_folders(folder) or checkpoint_folders(folder / "checkpoints")
    if not found:
        raise FileNotFoundError(f"checkpoint: folder must be a checkpoint, a folder of some or a run, got {folder}")
    return found
