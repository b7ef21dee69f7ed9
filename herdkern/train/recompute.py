"""Computes activations again in the backward pass instead of keeping them: less memory, the same bits.

Source: Chen et al. 2016 (arXiv:1604.06174); what is worth it: Korthikanti et al. 2022 (arXiv:2205.05198).
"""

from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from herdkern import ops
from herdkern.model.layers import Block, FeedForward

Recompute = Literal["none", "swiglu", "block"]


def recompute_activations(model: nn.Module, what: Recompute) -> None:
    """Let `model` (a Transformer, or a part of one) keep less for its backward pass; weights and names stay.

    "swiglu": the product of gate and up is made again, a fifth of the memory for no matrix product.  "block": only
    the inputs of a block are kept, and its forward pass runs twice.  "none": all is kept.
    Raises: ValueError for another word, or if nothing in `model` can be computed again.
    """
    if what not in ("none", "swiglu", "block"):
        raise ValueError(f"recompute_activations: what must be 'none', 'swiglu' or 'block', got {what!r}")
    kinds: tuple[type[nn.Module], ...] = (Block, FeedForward)
    found = [module for module in model.modules() if isinstance(module, kinds)]
    if not found:
        raise ValueError(f"recompute_activations: model must hold blocks of herdkern.model, got {type(model).__name__}")
    for module in found:
        module.__dict__.pop("forward", None)  # what an earlier call has set
        if what == "block" and isinstance(module, Block):
            module.__dict__["forward"] = _Again(module)
        if what == "swiglu" and isinstance(module, FeedForward):
            module.__dict__["forward"] = _SwigluAgain(module)


class _Again:
    """The forward pass of a module, checkpointed."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.module).forward
        return checkpoint(
            forward, self.module, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )  # there is nothing random in a block


class _SwigluAgain:
    """The feed-forward layer, its product made again. The last product of matrices is not: it is not needed twice."""

    def __init__(self, module: FeedForward) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module
        gate, up = module.gate_proj(x), module.up_proj(x)

        def down(gate: Tensor, up: Tensor) -> Tensor:
            out: Tensor = module.down_proj(ops.swiglu(gate, up))
            return out

        out: Tensor = checkpoint(down, gate, up, use_reentrant=False, preserve_rng_state=False)
        return out
