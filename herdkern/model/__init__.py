"""Llama 3: configuration, layers on herdkern.ops, generation (`herdkern.model.generate`), Hugging Face folders.

`config` needs no torch; the other names load it when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from herdkern.model.config import PRESETS, ModelConfig

if TYPE_CHECKING:
    from herdkern.model.generate import GenerateConfig
    from herdkern.model.hf_weights import load_hf, save_hf
    from herdkern.model.layers import KVCache
    from herdkern.model.transformer import Transformer

__all__ = ["PRESETS", "GenerateConfig", "KVCache", "ModelConfig", "Transformer", "load_hf", "save_hf"]

_HOMES = {
    "GenerateConfig": "generate",
    "KVCache": "layers",
    "Transformer": "transformer",
    "load_hf": "hf_weights",
    "save_hf": "hf_weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
