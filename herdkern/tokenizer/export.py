"""The door to tokenizer files: reading and writing every format of herdkern/tokenizer/formats."""

from herdkern.tokenizer.formats.byte_level import (
    byte_level_alphabet,
    byte_level_order,
    from_byte_level,
    to_byte_level,
)
from herdkern.tokenizer.formats.files import FORMATS, load, read, save
from herdkern.tokenizer.formats.huggingface import huggingface_json, merge_list
from herdkern.tokenizer.formats.tiktoken import read_tiktoken, write_tiktoken

__all__ = [
    "FORMATS",
    "byte_level_alphabet",
    "byte_level_order",
    "from_byte_level",
    "huggingface_json",
    "load",
    "merge_list",
    "read",
    "read_tiktoken",
    "save",
    "to_byte_level",
    "write_tiktoken",
]
