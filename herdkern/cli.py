"""The command line: `herdkern COMMAND ...`. Nothing heavy is imported before the command that needs it runs.

Exit status: 0 done, 1 the work failed (the message says what to do), 2 the command line is wrong, 130 interrupted.
"""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

USAGE = """usage: herdkern COMMAND [ARGUMENTS]

  run RECIPE        run a recipe: raw records to a trained model and its report (demo, llama3-8b, ...)
  report RUN        write RUN/report.html again
  generate          continue a prompt with the model of a run or a Hugging Face folder
  export            write a run's model as a Hugging Face folder
  tokenizer train   learn a byte-level BPE vocabulary from text, JSONL or Parquet
  tokenizer encode  token ids of a text
  extract           clean documents from WARC, HTML, JSONL, Parquet or text
  dedup             drop URL, near-duplicate and repeated-line copies from documents
  env               versions, processor, backends and a self-test

`herdkern COMMAND --help` tells more; `herdkern run RECIPE --help` lists every setting. Version: herdkern --version"""


class UsageError(Exception):
    """The command line is wrong: exit status 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(args)
    except UsageError as error:
        print(f"herdkern: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nherdkern: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `herdkern ... | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("PYTHONDEVMODE") or sys.flags.dev_mode:
            raise
        print(f"herdkern: {error}", file=sys.stderr)
        return 1


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        from herdkern import __version__

        print(f"herdkern {__version__}")
        return 0
    command, rest = args[0], args[1:]
    if command == "tokenizer":
        return _tokenizer(rest)
    if command not in COMMANDS:
        raise UsageError(
            f"COMMAND must be one of {', '.join([*COMMANDS, 'tokenizer'])}, got {command!r}{near(command, [*COMMANDS, 'tokenizer'])}"
        )
    return COMMANDS[command](rest)


def near(word: str, known: Sequence[str]) -> str:
    """ "; did you mean X?" for the closest known word, or nothing."""
    found = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _parse(function: Callable[..., int], args: list[str], name: str) -> int:
    """Call `function` with its parameters read from the command line."""
    import tyro

    return tyro.cli(function, args=args, prog=f"herdkern {name}", config=(tyro.conf.FlagCreatePairsOff,))


def _run(args: list[str]) -> int:
    from herdkern.recipes import RECIPES

    if not args or args[0] in ("-h", "--help"):
        print("usage: herdkern run RECIPE [--out DIR] [--dry-run] [--SECTION.SETTING VALUE ...]\n")
        print("\n".join(f"  {name:14} {about}" for name, (_, _, about) in RECIPES.items()))
        print("\n`herdkern run RECIPE --help` lists the settings. The same command again resumes where a run stopped.")
        return 0 if args else 2
    name, rest = args[0], args[1:]
    if name not in RECIPES:
        raise UsageError(f"RECIPE must be one of {', '.join(RECIPES)}, got {name!r}{near(name, list(RECIPES))}")
    return _run_recipe(name, rest)


def _run_recipe(name: str, args: list[str]) -> int:
    from dataclasses import make_dataclass
    from typing import Annotated

    import tyro

    from herdkern.recipes import RECIPES, load_recipe
    from herdkern.recipes.config import Recipe

    fields = [
        ("out", Annotated[Path, tyro.conf.arg(help="The run folder; a run that was stopped goes on from there.")]),
        ("dry_run", Annotated[bool, tyro.conf.arg(help="Print the plan, parameters, memory and FLOPs, and stop.")]),
        ("recipe", Annotated[Recipe, tyro.conf.arg(name="")]),
    ]
    options_type = make_dataclass("Options", fields, frozen=True, kw_only=True)
    options_type.__doc__ = RECIPES[name][2]
    default = options_type(out=Path("runs") / name, dry_run=False, recipe=load_recipe(name))
    config = (tyro.conf.FlagCreatePairsOff,)
    options = tyro.cli(options_type, default=default, args=args, prog=f"herdkern run {name}", config=config)
    if options.dry_run:
        from herdkern.recipes.plan import describe

        print(describe(options.recipe, options.out))
        return 0
    from herdkern.recipes.pretrain import run_recipe

    run_recipe(options.recipe, options.out)
    return 0


def _report(args: list[str]) -> int:
    def report(run: Path, /, out: Path | None = None) -> int:
        """Write the report of a run again.

        Args:
            run: The run folder.
            out: Where to write it; RUN/report.html by default.
        """
        from herdkern.report import write_report

        print(write_report(run, out))
        return 0

    return _parse(report, args, "report")


def _env(args: list[str]) -> int:
    def env() -> int:
        """Versions, processor, the backend that each op takes and why, and a self-test; status 1 if it fails."""
        from herdkern.env import report

        return report()

    return _parse(env, args, "env")


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "report": _report,
    "env": _env,
}


if __name__ == "__main__":
    sys.exit(main())
