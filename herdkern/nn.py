"""Modules on `herdkern.ops`: RMSNorm, SwiGLU, RotaryEmbedding, LinearCrossEntropy; Hugging Face's parameter names.

Each takes what its op takes; shapes with leading dimensions are flattened at the door where the op is packed.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from herdkern import ops

__all__ = ["LinearCrossEntropy", "RMSNorm", "RotaryEmbedding", "SwiGLU"]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale, in place of LlamaRMSNorm or torch.nn.RMSNorm.

    The one parameter is `weight`, (dim,), as in both; its first value is 1 - weight_offset, so that nothing is scaled.
    eps: None is torch.nn.RMSNorm's default, the epsilon of the dtype that it computes in.
    casting: where the result is rounded, see `herdkern.ops.rms_norm`: "llama" is LlamaRMSNorm, "gemma"
    torch.nn.RMSNorm, and with weight_offset=1.0 GemmaRMSNorm.
    Raises: ValueError for a dim that is not positive or a casting that is not known.
    """

    def __init__(
        self,
        dim: int,
        eps: float | None = 1e-6,
        *,
        casting: Literal["llama", "gemma", "none"] = "llama",
        weight_offset: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim <= 0:
            raise ValueError(f"RMSNorm: dim must be positive, got {dim}")
        if casting not in ("llama", "gemma", "none"):
            raise ValueError(f"RMSNorm: casting must be llama, gemma or none, got {casting!r}")
        self.eps, self.casting, self.weight_offset = eps, casting, weight_offset
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale to one."""
        nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Return (..., dim) from x: (..., dim), or (out, new_residual) where a residual of that shape is given.

        new_residual = x + residual, out its norm: the addition before a norm costs no pass over memory of its own.
        """
        eps = self.eps
        if eps is None:
            eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        return ops.rms_norm(
            x, self.weight, residual=residual, eps=eps, casting=self.casting, weight_offset=self.weight_offset
        )

    def extra_repr(self) -> str:
        """What print shows between the brackets."""
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return f"{self.weight.numel()}, eps={self.eps}, casting={self.casting!r}{offset}"


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), the feed-forward layer of Llama, in place of LlamaMLP.

    packed: gate and up are one matrix `gate_up_proj`, (2 * ffn_dim, dim), gate first: one matrix product in place of
    two, and one gradient. A state_dict with gate_proj and up_proj loads into it too.
    Raises: ValueError for a width that is not positive.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        *,
        packed: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("ffn_dim", ffn_dim)):
            if value <= 0:
                raise ValueError(f"SwiGLU: {name} must be positive, got {value}")
        self.packed = packed
        if packed:
            self.gate_up_proj = nn.Linear(dim, 2 * ffn_dim, bias, device, dtype)
            self.register_load_state_dict_pre_hook(_join_gate_and_up)
        else:
            self.gate_proj = nn.Linear(dim, ffn_dim, bias, device, dtype)
            self.up_proj = nn.Linear(dim, ffn_dim, bias, device, dtype)
        self.down_proj = nn.Linear(ffn_dim, dim, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) from x: (..., dim)."""
        if self.packed:
            return self.down_proj(ops.swiglu(self.gate_up_proj(x)))
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


def _join_gate_and_up(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for kind in ("weight", "bias"):
        gate, up = (f"{prefix}{name}.{kind}" for name in ("gate_proj", "up_proj"))
        if gate in state_dict and up in state_dict:
            state_dict[f"{prefix}gate_up_proj.{kind}"] = torch.cat([state_dict.pop(gate), state_dict.pop(up)])


class RotaryEmbedding(nn.Module):
    """Rotary position embedding of queries and keys, with its table of cos and sin.

    The table is no part of the state_dict and stays float32 when the module is cast: in bfloat16 the angles of
    neighbouring positions become equal.  scaling: Llama 3.1's (`herdkern.ops.RopeScaling`).  interleaved: pairs are
    neighbours (Meta's layout) instead of the two halves (Hugging Face's).
    Raises: ValueError for a max_position that is not positive, an odd head_dim or a theta that is not positive.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        head_dim: int,
        max_position: int,
        *,
        theta: float = 500000.0,
        scaling: ops.RopeScaling | None = None,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if max_position <= 0:
            raise ValueError(f"RotaryEmbedding: max_position must be positive, got {max_position}")
        self.head_dim, self.max_position = head_dim, max_position
        self.theta, self.scaling, self.interleaved = theta, scaling, interleaved
        cos, sin = self._table(device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _table(self, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        return ops.rope_table(self.max_position, self.head_dim, theta=self.theta, scaling=self.scaling, device=device)

    def reset_parameters(self) -> None:
        """Compute the table again where it lies: after `to_empty`, or on leaving the meta device."""
        self.cos, self.sin = self._table(self.cos.device)

    def _apply(self, fn: Any, recurse: bool = True) -> "RotaryEmbedding":
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:  # .half(), .bfloat16(), .double() of a whole model
            self.reset_parameters()
        return self

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        positions: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return (q, k) turned.  q: (total_tokens, num_heads, head_dim), k: (total_tokens, num_kv_heads, head_dim).

        positions: (total_tokens,) int; or cu_seqlens: (num_docs + 1,) int32, each document counts from 0; or neither:
        0 to total_tokens - 1.  inplace: into q and k, see `herdkern.ops.rope_qk`.
        """
        return ops.rope_qk(
            q,
            k,
            self.cos,
            self.sin,
            positions,
            cu_seqlens=cu_seqlens,
            interleaved=self.interleaved,
            inplace=inplace,
        )

    def extra_repr(self) -> str:
        """What print shows between the brackets."""
        more = f", scaling={self.scaling}" if self.scaling else ""
        return f"{self.head_dim}, {self.max_position}, theta={self.theta}, interleaved={self.interleaved}{more}"


class LinearCrossEntropy(nn.Module):
    """The cross entropy of a linear layer that never holds all logits: `loss(hidden, lm_head.weight, targets)`.

    It has no parameter: the weight stays where the model keeps it, tied or not.  Options as in
    `herdkern.ops.linear_cross_entropy`.
    Raises: ValueError for a reduction that is not known or a label_smoothing outside [0, 1].
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        reduction: Literal["none", "sum", "mean"] = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        return_logps: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("none", "sum", "mean"):
            raise ValueError(f"LinearCrossEntropy: reduction must be none, sum or mean, got {reduction!r}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"LinearCrossEntropy: label_smoothing must lie in [0, 1], got {label_smoothing}")
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.z_loss, self.softcap, self.return_logps = z_loss, softcap, return_logps

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        """Return the loss, or (loss, logps) with return_logps.

        hidden: (..., dim).  weight: (vocab_size, dim).  targets: (...) int64, already shifted: the token that each
        hidden state predicts.  logps, and the loss of reduction="none", have the shape of targets.
        Raises: ValueError if hidden and targets do not fit each other.
        """
        if targets.shape != hidden.shape[:-1]:
            expected = tuple(hidden.shape[:-1])
            raise ValueError(f"LinearCrossEntropy: targets must have shape {expected}, got {tuple(targets.shape)}")
        result = ops.linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            targets.reshape(-1),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            return_logps=self.return_logps,
        )
        loss, logps = result if self.return_logps else (result, None)
        loss = loss.view(targets.shape) if self.reduction == "none" else loss
        return (loss, logps.view(targets.shape)) if logps is not None else loss

    def extra_repr(self) -> str:
        """What print shows between the brackets."""
        shown = ("ignore_index", "reduction", "label_smoothing", "z_loss", "softcap", "return_logps")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
