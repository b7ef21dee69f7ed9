"""A checkpoint of any layout as a Hugging Face folder, one tensor in memory at a time, without a process group."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from herdkern.engine import read_json
from herdkern.engine.shards import TMP_SUFFIX, files_below, remove_folder, replace_folder, seal_folder
from herdkern.model.hf_weights import config_from_hf, cut_into_files, hf_name, save_hf_config
from herdkern.train.checkpoint import read_manifest, verify_checkpoint
from herdkern.train.sharded_files import NewPart, StoredTensor, header_of, index_of, read_whole


def export_checkpoint(
    folder: Path | str,
    out: Path | str,
    *,
    weights: str = "model",
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write `out`, which `AutoModelForCausalLM.from_pretrained` opens, from the weights of the checkpoint `folder`.

    weights: the stem that holds them, "model" or "average".  dtype: on disk.  tokenizer: a folder whose files are put
    beside the weights.  Above `max_shard_bytes` the weights go into several files with an index.
    Raises: CorruptCheckpointError if a checksum differs; FileExistsError if `out` is there; ValueError if the
    checkpoint is not of a Llama, or has no such weights.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise FileExistsError(f"export_checkpoint: out must not exist yet, got {out}")
    verify_checkpoint(folder)
    files = read_manifest(folder)["files"]
    if "config.json" not in files:
        raise ValueError(f"export_checkpoint: {folder} must have the config.json of a Llama, got {sorted(files)[:5]}")
    config = config_from_hf(read_json(folder / "config.json"))
    index = index_of(folder, files)
    stored = {hf_name(name): one for (stem, name), one in sorted(index.items()) if stem == weights}
    if not stored:
        stems = ", ".join(sorted({stem for stem, _ in index}))
        raise ValueError(f"export_checkpoint: weights must be one of {stems}, got {weights!r}")
    parts = {name: _whole_part(name, one, dtype) for name, one in stored.items()}
    places = cut_into_files(parts, max_shard_bytes)
    tmp = out.with_name(out.name + TMP_SUFFIX)
    remove_folder(tmp)
    tmp.mkdir(parents=True)
    try:
        for file, names in places.items():
            with open(tmp / file, "wb") as f:
                f.write(header_of((parts[name] for name in names), whole=True))
                for name in names:
                    f.write(_bytes_of(read_whole(stored[name]).to(dtype)))
        save_hf_config(tmp, config, places, dtype=dtype)
        for source in files_below(Path(tokenizer)) if tokenizer is not None else []:
            if not (tmp / source.name).exists() and source.suffix != ".safetensors":
                shutil.copyfile(source, tmp / source.name)
        seal_folder(tmp)
        replace_folder(tmp, out)
    except BaseException:
        remove_folder(tmp)
        raise
    return out


def _whole_part(name: str, stored: StoredTensor, dtype: torch.dtype) -> NewPart:
    shape = stored.shape
    return NewPart(key=name, dtype=dtype, shape=shape, offsets=(0,) * len(shape), sizes=shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
