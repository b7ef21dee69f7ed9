"""Attention, RMSNorm, SwiGLU, RoPE, the fused linear cross entropy and AdamW, each with its plain reference."""

from herdkern.ops.adamw import AdamwSettings, adamw_reference, adamw_step, grad_norm
from herdkern.ops.attention import attention, attention_reference
from herdkern.ops.backend import faster_peers
from herdkern.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from herdkern.ops.linear_cross_entropy_parallel import vocab_parallel_linear_cross_entropy
from herdkern.ops.paged_attention import paged_attention, paged_attention_reference
from herdkern.ops.rms_norm import rms_norm, rms_norm_reference
from herdkern.ops.rope import RopeScaling, rope, rope_qk, rope_qk_reference, rope_reference, rope_table
from herdkern.ops.swiglu import swiglu, swiglu_reference

__all__ = [
    "AdamwSettings",
    "RopeScaling",
    "adamw_reference",
    "adamw_step",
    "attention",
    "attention_reference",
    "faster_peers",
    "grad_norm",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "paged_attention",
    "paged_attention_reference",
    "rms_norm",
    "rms_norm_reference",
    "rope",
    "rope_qk",
    "rope_qk_reference",
    "rope_reference",
    "rope_table",
    "swiglu",
    "swiglu_reference",
    "vocab_parallel_linear_cross_entropy",
]
