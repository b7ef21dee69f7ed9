"""Attention, RMSNorm, SwiGLU, RoPE and the fused linear cross entropy, each with its plain reference."""

from herdkern.ops.rms_norm import rms_norm, rms_norm_reference

__all__ = ["rms_norm", "rms_norm_reference"]
