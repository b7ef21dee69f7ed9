"""Reading JSON that others wrote: whatever is not as expected is a ValueError that names it."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path | str) -> Any:
    """The value of a JSON file. Raises: OSError; ValueError naming file and line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"load: {path}:{e.lineno}: must be JSON, got {e.msg} at column {e.colno}") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"load: {path}: must be UTF-8, got {e.reason} at byte {e.start}") from e
    except (RecursionError, ValueError) as e:
        raise ValueError(f"load: {path}: must be JSON of a sane depth and size, got {e}") from e


def mapping(value: Any, what: str) -> dict[str, Any]:
    """`value` if it is an object. Raises: ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"must describe a tokenizer: {what} must be an object, got {_kind(value)}")
    return value


def items(value: Any, what: str) -> list[Any]:
    """`value` if it is an array. Raises: ValueError."""
    if not isinstance(value, list):
        raise ValueError(f"must describe a tokenizer: {what} must be an array, got {_kind(value)}")
    return value


def integer(value: Any, what: str) -> int:
    """`value` if it is a whole number from 0 to 2**31 - 1. Raises: ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise ValueError(f"must describe a tokenizer: {what} must be a whole number, got {_kind(value)}")
    return value


def text(value: Any, what: str) -> str:
    """`value` if it is a text that UTF-8 can hold. Raises: ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"must describe a tokenizer: {what} must be a text, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"must describe a tokenizer: {what} must have no lone surrogate, got {value!r:.80}") from e
    return value


def _kind(value: Any) -> str:
    return f"{value!r:.60}" if value is None or isinstance(value, int | float | str) else type(value).__name__
