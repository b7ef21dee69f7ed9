"""What the commands share: how a wrong command line is told, and parameters read from it."""

import difflib
import re
from collections.abc import Callable, Sequence


class UsageError(Exception):
    """The command line is wrong: exit status 2."""


def near(word: str, known: Sequence[str]) -> str:
    """ "; did you mean X?" for the closest known word, or nothing."""
    found = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def parse(function: Callable[..., int], args: list[str], name: str) -> int:
    """Call `function` with its parameters read from the command line."""
    import tyro

    return tyro.cli(function, args=args, prog=f"herdkern {name}", config=(tyro.conf.FlagCreatePairsOff,))


def to_bytes(size: str, command: str) -> int:
    """The bytes of "200MB", "1.5 GiB" or "1000". Raises: UsageError, as `command` would tell it."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", size.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{command}: max_memory must be a size as 200MB or 4GiB, got {size!r}")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))
