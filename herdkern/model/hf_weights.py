"""Hugging Face Llama folders (config.json, model.safetensors, tokenizer.json) and Meta's layout, read and written.

Rotation pairs: Hugging Face and herdkern hold (x_i, x_{i + head_dim/2}), Meta's files hold (x_{2i}, x_{2i+1}); the
converters move rows of q and k and change no bit.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from herdkern.model.config import ModelConfig
from herdkern.model.transformer import Transformer

INDEX_NAME = "model.safetensors.index.json"
META_NAMES = {  # ours -> Meta's, inside a layer
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
META_TOP_NAMES = {"embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output"}


class SavesItself(Protocol):
    """A tokenizer that writes its files into a folder."""

    def save(self, folder: Path) -> Any:
        """Write tokenizer.json and its companions into `folder`."""
        ...


def save_hf(
    model: Transformer,
    folder: Path | str,
    *,
    tokenizer: SavesItself | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write `model` as a folder that `AutoModelForCausalLM.from_pretrained` opens.

    dtype: of the weights on disk.  tokenizer: saved beside the weights.  Above `max_shard_bytes` the weights go into
    several files with an index.  Raises: OSError if the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().to(dtype).contiguous() for name, tensor in hf_state(model).items()}
    (folder / INDEX_NAME).unlink(missing_ok=True)
    files = cut_into_files(state, max_shard_bytes)
    for name, sizes in files.items():
        _save_safetensors({key: state[key] for key in sizes}, folder / name)
    save_hf_config(folder, model.config, files, dtype=dtype)
    if tokenizer is not None:
        tokenizer.save(folder)


def save_hf_config(
    folder: Path, config: ModelConfig, files: Mapping[str, Mapping[str, int]], *, dtype: torch.dtype
) -> None:
    """Write the JSON files beside the weights of `cut_into_files`: config, generation config, and the index of many."""
    if len(files) > 1:
        weight_map = {key: name for name, sizes in files.items() for key in sizes}
        total = sum(sum(sizes.values()) for sizes in files.values())
        _save_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _save_json(folder / "config.json", config_to_hf(config, dtype))
    special = {k: v for k, v in (("bos_token_id", config.bos_id), ("eos_token_id", config.eos_id)) if v >= 0}
    _save_json(folder / "generation_config.json", {"_from_model_config": True, **special})


def load_hf(folder: Path | str, *, compute_dtype: torch.dtype = torch.float32) -> Transformer:
    """The Llama model in a Hugging Face folder, with fp32 parameters.

    Raises: FileNotFoundError without config.json or weights; ValueError naming the tensor if names or shapes do not
    fit, or the setting if the model is not a plain Llama.
    """
    folder = Path(folder)
    config = config_from_hf(_load_json(folder / "config.json"))
    with torch.device("meta"):
        model = Transformer(config, compute_dtype=compute_dtype)
    model = materialize(model)
    expected = hf_state(model)
    files = _weight_files(folder)
    found = {name: file for file in files for name in _tensor_names(file)}
    if config.tied_embeddings:
        found.pop("lm_head.weight", None)
    _check_names(set(found), set(expected), folder)
    for file in files:
        with safe_open(file, framework="pt") as reader:
            for name in sorted(set(reader.keys()) & set(expected)):
                tensor = reader.get_tensor(name)
                if tensor.shape != expected[name].shape:
                    raise ValueError(
                        f"load_hf: {name} in {file} must be {tuple(expected[name].shape)} as config.json says, "
                        f"got {tuple(tensor.shape)}"
                    )
                expected[name].data.copy_(tensor)
    return model


def materialize(model: Transformer) -> Transformer:
    """The same model with real, zeroed fp32 parameters on the CPU in place of meta ones, and its rotation table."""
    config, compute_dtype = model.config, model.compute_dtype
    model = model.to_empty(device="cpu")
    if config.tied_embeddings:
        model.tie_embeddings()
    for param in model.parameters():
        param.data.zero_()
    model.compute_dtype = compute_dtype
    model.fill_rope_table()
    return model


def hf_state(model: Transformer) -> dict[str, Tensor]:
    """The parameters of `model` under Hugging Face's names; a tied head is left out."""
    return {hf_name(name): param for name, param in model.named_parameters()}  # a shared parameter is listed once


def config_to_hf(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The config.json of a Hugging Face Llama of this shape."""
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": config.bos_id if config.bos_id >= 0 else None,
        "eos_token_id": config.eos_id if config.eos_id >= 0 else None,
    }
    if config.rope_scaling_factor != 1.0:
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling_factor,
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_max_seq_len,
        }
    return values


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """The shape in a Hugging Face config.json (fields of transformers 4 and 5).

    Raises: ValueError naming the setting that a plain Llama does not have, or that is missing.
    """
    plain = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, value in plain.items():
        if values.get(key, value) != value:
            raise ValueError(f"config_from_hf: {key} must be {value!r}, got {values[key]!r}")
    missing = [
        key for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers") if key not in values
    ]
    if missing:
        raise ValueError(f"config_from_hf: config.json must have {missing[0]!r}, got only {sorted(values)}")
    num_heads = int(values["num_attention_heads"])
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"config_from_hf: rope_type must be 'default' or 'llama3', got {rope_type!r}")
    scaling = {}
    if rope_type == "llama3":
        scaling = {
            "rope_scaling_factor": float(rope["factor"]),
            "rope_low_freq_factor": float(rope["low_freq_factor"]),
            "rope_high_freq_factor": float(rope["high_freq_factor"]),
            "rope_original_max_seq_len": int(rope["original_max_position_embeddings"]),
        }
    return ModelConfig(
        vocab_size=int(values["vocab_size"]),
        dim=int(values["hidden_size"]),
        num_layers=int(values["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(values.get("num_key_value_heads") or num_heads),
        head_dim=int(values.get("head_dim") or values["hidden_size"] // num_heads),
        ffn_dim=int(values["intermediate_size"]),
        max_seq_len=int(values.get("max_position_embeddings", 8192)),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 10_000.0))),
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        init_std=float(values.get("initializer_range", 0.02)),
        bos_id=_first_id(values.get("bos_token_id")),
        eos_id=_first_id(values.get("eos_token_id")),
        **scaling,  # type: ignore[arg-type]
    )


def to_meta_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A state dict of `Transformer` under Meta's names, with the rows of q and k interleaved as Meta keeps them."""
    return {_meta_name(name): _swap_pairs(name, tensor, config, to_meta=True) for name, tensor in state.items()}


def from_meta_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A state dict of `Transformer` from one in Meta's names and layout.

    Raises: ValueError naming a tensor that a Llama does not have.
    """
    ours = {meta: name for name, meta in META_NAMES.items()}
    ours_top = {meta: name for name, meta in META_TOP_NAMES.items()}
    converted = {}
    for meta_name, tensor in state.items():
        if meta_name == "rope.freqs":  # a table that old files carry; ours is computed
            continue
        match = re.fullmatch(r"(?:layers\.(\d+)\.)?([a-z_.0-9]+)\.weight", meta_name)
        stem = (ours if match and match[1] else ours_top).get(match[2]) if match else None
        if match is None or stem is None:
            raise ValueError(f"from_meta_state: tensors must be those of a Llama, got {meta_name!r}")
        name = f"layers.{match[1]}.{stem}.weight" if match[1] else f"{stem}.weight"
        converted[name] = _swap_pairs(name, tensor, config, to_meta=False)
    return converted


def _swap_pairs(name: str, tensor: Tensor, config: ModelConfig, *, to_meta: bool) -> Tensor:
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor.clone()
    half = config.head_dim // 2
    shape = (
        (-1, 2, half, tensor.shape[1]) if to_meta else (-1, half, 2, tensor.shape[1])
    )  # (heads, pairs apart or together)
    return tensor.reshape(shape).transpose(1, 2).reshape(tensor.shape).clone()


def _meta_name(name: str) -> str:
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    if match:
        return f"layers.{match[1]}.{META_NAMES[match[2]]}.weight"
    return f"{META_TOP_NAMES[name.removesuffix('.weight')]}.weight"


def hf_name(name: str) -> str:
    """The name that Hugging Face gives to the parameter `name` of ours."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def _first_id(value: int | list[int] | None) -> int:
    if isinstance(value, list):
        return value[0] if value else -1
    return -1 if value is None else value


class HasBytes(Protocol):
    """A tensor, or what will be one."""

    @property
    def nbytes(self) -> int:
        """Its bytes in a file."""
        ...


def cut_into_files(state: Mapping[str, HasBytes], max_shard_bytes: int) -> dict[str, dict[str, int]]:
    """The bytes of each tensor by the name of the file that it goes into: model.safetensors, or model-I-of-N."""
    shards: list[dict[str, int]] = [{}]
    room = max_shard_bytes
    for name, tensor in state.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor.nbytes
        room -= tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def _save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    tmp = path.with_name(path.name + ".tmp")
    save_file(state, tmp, metadata={"format": "pt"})
    tmp.replace(path)


def _save_json(path: Path, value: dict[str, Any]) -> None:
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tmp.replace(path)


def _load_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"load_hf: {path} must be JSON, got {e}") from e
    if not isinstance(value, dict):
        raise ValueError(f"load_hf: {path} must be a JSON object, got {type(value).__name__}")
    return value


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise FileNotFoundError(f"load_hf: {folder} must hold model.safetensors or {INDEX_NAME}, found neither")
        return [single]
    weight_map = _load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"load_hf: {index} must map tensor names to file names under 'weight_map'")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"load_hf: {index} must name files of its own folder, got {name!r}")
        if not (folder / name).exists():
            raise FileNotFoundError(f"load_hf: {folder} must hold {name}, which {INDEX_NAME} lists")
    return [folder / name for name in names]


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as reader:
            return list(reader.keys())
    except (SafetensorError, json.JSONDecodeError) as e:
        raise ValueError(f"load_hf: {file} must be a whole safetensors file, got {e}") from e


def _check_names(found: set[str], expected: set[str], folder: Path) -> None:
    found = {name for name in found if not name.endswith("rotary_emb.inv_freq")}  # a table that old files carry
    problems = [f"lacks {sorted(expected - found)[:3]}"] if expected - found else []
    problems += [f"has unknown {sorted(found - expected)[:3]}"] if found - expected else []
    if problems:
        raise ValueError(
            f"load_hf: weights in {folder} must be those of its config.json, but it {' and '.join(problems)}"
        )
