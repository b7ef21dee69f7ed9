"""The native text kernels (csrc/text); use herdkern.tokenizer and herdkern.dedup."""

from typing import Any

unicode_version: str

def __getattr__(name: str) -> Any: ...
