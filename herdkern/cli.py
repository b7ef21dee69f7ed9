"""The command line: `herdkern COMMAND ...`. Nothing heavy is imported before the command that needs it runs.

Exit status: 0 done, 1 the work failed (the message says what to do), 2 the command line is wrong, 130 interrupted.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from herdkern.command import UsageError, near, parse, read_options

USAGE = """usage: herdkern COMMAND [ARGUMENTS]

  run RECIPE        run a recipe: raw records to a trained model and its report (demo, llama3-8b, ...)
  pretrain RECIPE   train from the packed tokens of a run, on many ranks if torchrun starts it
  report RUN        write RUN/report.html again
  generate          continue a prompt with the model of a run or a Hugging Face folder
  export            write a run's model as a Hugging Face folder
  checkpoint        inspect, verify or export the checkpoints of a run, of any number of ranks
  tokenizer count   count the words of JSONL, Parquet or text files, within a memory budget
  tokenizer merge   sum word counts, weighted
  tokenizer train   learn a byte-level BPE vocabulary from word counts, JSONL, Parquet or text
  tokenizer encode  token ids of a text
  extract           clean documents from WARC, HTML, JSONL, Parquet or text
  dedup             drop copies from documents: by URL, text, near-duplicate text, line, embedding; or all in a row
  pipeline show     an interleaved pipeline schedule: order, bubble, memory, picture
  plan              layouts of a model on many devices: which fit, how fast, why the others do not
  launch            start a command on several ranks, watched: who dies or hangs is named, the run goes on
  flight            which rank left the order of collectives: one line from a run's flight recorders
  top               a run, live: loss, speed, ranks, restarts, effective training time
  tensorboard       a run's metrics as TensorBoard's event files
  env               versions, processor, backends and a self-test

`herdkern COMMAND --help` tells more; `herdkern run RECIPE --help` lists every setting. Version: herdkern --version"""


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
    except (ValueError, OSError, ImportError, RuntimeError, OverflowError, MemoryError) as error:
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
        known = [*COMMANDS, "tokenizer"]
        raise UsageError(f"COMMAND must be one of {', '.join(known)}, got {command!r}{near(command, known)}")
    return COMMANDS[command](rest)


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
    options = read_options(options_type, default, args, f"run {name}")
    if options.dry_run:
        from herdkern.recipes.plan import describe

        print(describe(options.recipe, options.out))
        return 0
    from herdkern.recipes.pretrain import run_recipe

    run_recipe(options.recipe, options.out)
    return 0


def _pretrain(args: list[str]) -> int:
    from dataclasses import make_dataclass
    from typing import Annotated

    import tyro

    from herdkern.parallel.config import ParallelConfig
    from herdkern.recipes import RECIPES, load_recipe
    from herdkern.recipes.config import Recipe

    if not args or args[0] in ("-h", "--help"):
        print("usage: [torchrun --nproc-per-node N -m] herdkern pretrain RECIPE --tokens RUN [--out DIR]")
        print(
            "       [--parallel.tp N] [--parallel.cp N] [--parallel.pp N] [--parallel.dp N] [--SECTION.SETTING V ...]"
        )
        return 0 if args else 2
    name, rest = args[0], args[1:]
    if name not in RECIPES:
        raise UsageError(f"RECIPE must be one of {', '.join(RECIPES)}, got {name!r}{near(name, list(RECIPES))}")
    tokens = tyro.conf.arg(help="The folder whose tokens/ and tokenizer/ are read: a run of `herdkern run`.")
    fields = [
        ("out", Annotated[Path, tyro.conf.arg(help="The run folder; a run that was stopped goes on from there.")]),
        ("tokens", Annotated[Path | None, tokens]),
        ("parallel", ParallelConfig),
        ("recipe", Annotated[Recipe, tyro.conf.arg(name="")]),
    ]
    options_type = make_dataclass("Options", fields, frozen=True, kw_only=True)
    options_type.__doc__ = "Train from packed tokens; the layout is that of torchrun's ranks."
    default = options_type(out=Path("runs") / name, tokens=None, parallel=ParallelConfig(), recipe=load_recipe(name))
    options = read_options(options_type, default, rest, f"pretrain {name}")
    from herdkern.recipes.packed import pretrain_packed

    result = pretrain_packed(options.recipe, options.out, options.tokens or options.out, options.parallel)
    if os.environ.get("RANK", "0") == "0":
        end = "stopped" if result.interrupted else "done"
        print(f"{end} at step {result.step:,}, {result.tokens:,} tokens: {result.checkpoint}")
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

    return parse(report, args, "report")


def _env(args: list[str]) -> int:
    def env() -> int:
        """Versions, processor, the backend that each op takes and why, and a self-test; status 1 if it fails."""
        from herdkern.env import report

        return report()

    return parse(env, args, "env")


def _generate(args: list[str]) -> int:
    def generate(
        *,
        model: Path,
        prompt: str = "",
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int = 0,
    ) -> int:
        """Continue a prompt.

        Args:
            model: A run folder, or a Hugging Face Llama folder with a tokenizer of ours.
            prompt: The text to continue; the empty text asks for a whole document.
            max_new_tokens: Tokens to write at most.
            temperature: 0 takes the most likely token each time.
            top_p: Draw from the smallest set of tokens that holds this probability.
            seed: Decides the draw.
        """
        from herdkern.recipes.config import SampleConfig
        from herdkern.recipes.model_stages import continue_text

        settings = SampleConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        print(prompt + continue_text(model_folder(model), prompt, settings))
        return 0

    return parse(generate, args, "generate")


def model_folder(path: Path) -> Path:
    """The Hugging Face folder at `path`: the folder itself, or that of a run.

    Raises: FileNotFoundError if there is none.
    """
    for folder in (path, path / "hf"):
        if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
            return folder
    raise FileNotFoundError(f"generate: model must be a finished run or a Hugging Face folder, got {path}")


def _export(args: list[str]) -> int:
    def export(run: Path, /, out: Path) -> int:
        """Write the model of a run as a Hugging Face folder: weights, configuration, tokenizer.

        Args:
            run: A finished run folder.
            out: The folder to write; it must not exist yet.
        """
        import shutil

        source = model_folder(run)
        if out.exists():
            raise FileExistsError(f"export: out must not exist yet, got {out}")
        shutil.copytree(source, out)
        print(out)
        return 0

    return parse(export, args, "export")


def _extract(args: list[str]) -> int:
    def extract(
        inputs: tuple[Path, ...],
        /,
        out: Path,
        languages: tuple[str, ...] = (),
        rules: tuple[str, ...] = ("gopher_quality", "gopher_repetition", "c4"),
    ) -> int:
        """Clean documents from raw records: main text, language, quality rules, with the reason for every drop.

        Args:
            inputs: WARC, HTML, JSONL, Parquet or text files, or folders of them.
            out: The run folder; its report shows what was dropped.
            languages: Languages to keep; none given keeps all.
            rules: Rule sets: gopher_quality, gopher_repetition, c4, fineweb.
        """
        from herdkern.recipes.text_only import extract_documents

        files = extract_documents(_some(inputs, "extract"), out, languages, rules)
        print("\n".join(map(str, files)))
        return 0

    return parse(extract, args, "extract")


def _dedup(args: list[str]) -> int:
    from herdkern.dedup.cli import main as dedup_main

    return dedup_main(args)


def _some(inputs: tuple[Path, ...], command: str) -> tuple[Path, ...]:
    if not inputs:
        raise UsageError(f"{command}: inputs must have at least one file or folder, got none")
    return inputs


def _tokenizer(args: list[str]) -> int:
    from herdkern.tokenizer.cli import main as tokenizer_main

    return tokenizer_main(args)


def _pipeline(args: list[str]) -> int:
    from herdkern.parallel.cli import main as pipeline_main

    return pipeline_main(args)


def _plan(args: list[str]) -> int:
    from herdkern.parallel.layout_cli import main as plan_main

    return plan_main(args)


def _checkpoint(args: list[str]) -> int:
    from herdkern.train.checkpoint_cli import main as checkpoint_main

    return checkpoint_main(args)


def _of_run(command: str) -> Callable[[list[str]], int]:
    def run(args: list[str]) -> int:
        from herdkern.train.cli import main as train_main

        return train_main(command, args)

    return run


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "pretrain": _pretrain,
    "report": _report,
    "generate": _generate,
    "export": _export,
    "checkpoint": _checkpoint,
    "extract": _extract,
    "dedup": _dedup,
    "env": _env,
    "pipeline": _pipeline,
    "plan": _plan,
    "launch": _of_run("launch"),
    "flight": _of_run("flight"),
    "top": _of_run("top"),
    "tensorboard": _of_run("tensorboard"),
}


if __name__ == "__main__":
    sys.exit(main())
