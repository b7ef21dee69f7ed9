"""What the commands share: how a wrong command line is told, and parameters read from it."""

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any


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


def read_options(options_type: type[Any], default: Any, args: list[str], name: str) -> Any:
    """The options of `args`, an object of `options_type`; what is not given is as in `default`.

    An unknown option ends with status 2, after the name nearest to it: tyro shows eight that contain it, by alphabet.
    """
    import tyro

    config = (tyro.conf.FlagCreatePairsOff,)
    try:
        return tyro.cli(options_type, default=default, args=args, prog=f"herdkern {name}", config=config)
    except SystemExit as end:
        if end.code == 2:
            parser = tyro.extras.get_parser(options_type, default=default, config=config)
            known = list(parser._option_string_actions)
            given = (arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--"))
            for key in given:
                hint = "" if key in known else near(key, known)
                if hint:
                    print(f"herdkern {name}: unknown option {key}{hint}", file=sys.stderr)
        raise


def to_bytes(size: str, command: str) -> int:
    """The bytes of "200MB", "1.5 GiB" or "1000". Raises: UsageError, as `command` would tell it."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", size.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{command}: max_memory must be a size as 200MB or 4GiB, got {size!r}")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))
