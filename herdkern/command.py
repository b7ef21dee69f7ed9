"""What the commands share: how a wrong command line is told, and parameters read from it."""

import difflib
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
