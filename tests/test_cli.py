"""The command line as a person meets it: help, misspelt words, exit statuses, bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from herdkern import __version__, cli


def herdkern(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "herdkern.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "COLUMNS": "120"})


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in (*cli.COMMANDS, "tokenizer train", "tokenizer encode"):
        assert f"\n  {command} " in out


def test_no_command_shows_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: herdkern" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"herdkern {__version__}"


@pytest.mark.parametrize("name", ["run", "report", "generate", "export", "extract", "dedup", "env"])
def test_every_command_has_help(name, capsys):
    try:
        status = cli.main([name, "--help"])
    except SystemExit as end:
        status = end.code
    assert status == 0
    assert f"usage: herdkern {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "encode"])
def test_tokenizer_commands_have_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["tokenizer", name, "--help"])
    assert end.value.code == 0
    assert f"usage: herdkern tokenizer {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["rnu", "demo"], "'run'"),
        (["run", "dmo"], "'demo'"),
        (["run", "llama3-8"], "'llama3-8b'"),
        (["tokenizer", "trian"], "'train'"),
        (["exprot"], "'export'"),
    ],
)
def test_misspelt_word_gets_the_nearest_name(arguments, nearest, capsys):
    assert cli.main(arguments) == 2
    assert f"did you mean {nearest}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("--train.step", "--train.steps"), ("--trian.steps", "--train.steps"), ("--data.input", "--data.inputs")],
)
def test_misspelt_key_gets_the_nearest_name(key, nearest, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "demo", "--dry-run", key, "5"])
    assert end.value.code == 2
    assert f"unknown option {key}; did you mean {nearest!r}?" in capsys.readouterr().err


def test_a_value_of_the_wrong_type_is_named(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "demo", "--train.steps", "many"])
    assert end.value.code == 2
    assert "--train.steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("train.steps", "0", "steps must be"), ("data.heldout-share", "1.5", "heldout_share must")],
)
def test_a_value_out_of_range_is_named(key, value, named, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "demo", "--dry-run", f"--{key}", value])
    assert end.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "parameters"), [("llama3-8b", "8.03B"), ("llama3-70b", "70.6B"), ("llama3-405b", "406B")]
)
def test_dry_run_prints_the_released_sizes(recipe, parameters, capsys):
    assert cli.main(["run", recipe, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert parameters in out
    for word in (
        "FLOPs",
        "memory unsharded: total",
        "GiB",
        "--train.schedule.peak-lr",
        "--tokenizer.vocab-size 128256",
    ):
        assert word in out


def test_dry_run_takes_overrides_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "demo", "--dry-run", "--train.steps", "2000", "--data.inputs", "a.warc.gz", "b.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "--train.steps 2000" in out
    assert "read a.warc.gz, b.jsonl" in out
    assert list(tmp_path.iterdir()) == []


def test_settings_of_the_plan_are_the_command_line(capsys):
    """Every `--name value` line of a plan can be given back and leads to the same plan."""
    assert cli.main(["run", "demo", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    lines = [line.split() for line in plan.partition("settings\n")[2].splitlines()]
    given = [word for words in lines if words[1:] != ["(none)"] and words[0] != "--samples.prompts" for word in words]
    flags = [word for word in given if word not in ("True", "False")]
    assert cli.main(["run", "demo", "--dry-run", *(w for w in given if w in flags and not _is_switch(w, lines))]) == 0
    assert capsys.readouterr().out == plan


def _is_switch(word: str, lines: list[list[str]]) -> bool:
    return any(words[0] == word and words[1:] in (["True"], ["False"]) for words in lines)


def test_report_of_a_folder_that_is_no_run(capsys, tmp_path):
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "read_run: run_dir must be a run folder" in capsys.readouterr().err


def test_missing_input_is_named(capsys, tmp_path):
    missing = tmp_path / "missing.warc.gz"
    assert cli.main(["run", "demo", "--out", str(tmp_path / "run"), "--data.inputs", str(missing)]) == 1
    assert str(missing) in capsys.readouterr().err


def test_input_of_an_unknown_kind_is_named(capsys, tmp_path):
    file = tmp_path / "data.xyz"
    file.write_text("x")
    assert cli.main(["run", "demo", "--out", str(tmp_path / "run"), "--data.inputs", str(file)]) == 1
    assert "data.xyz" in capsys.readouterr().err


def test_counts_that_overflow_are_told_without_a_traceback(capsys, tmp_path):
    from herdkern.tokenizer import WordCounts

    WordCounts().add_words({b"a": 1 << 62}).save(tmp_path / "a.counts")
    assert (
        cli.main(["tokenizer", "merge", str(tmp_path / "a.counts"), "--out", f"{tmp_path}/b", "--weights", "*=4"]) == 1
    )
    assert "must stay below 2**63" in capsys.readouterr().err


def test_unwritable_run_folder_is_named(capsys, tmp_path):
    """A file where the folder should be cannot be written below, whoever asks (root included)."""
    (tmp_path / "run").write_text("in the way")
    file = tmp_path / "a.txt"
    file.write_text("some text\n")
    assert cli.main(["run", "demo", "--out", str(tmp_path / "run"), "--data.inputs", str(file)]) == 1
    assert str(tmp_path / "run") in capsys.readouterr().err
    assert (tmp_path / "run").read_text() == "in the way"


def test_output_into_a_closed_pipe_is_quiet():
    done = subprocess.run(
        f"{sys.executable} -m herdkern.cli run llama3-8b --dry-run | head -1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("recipe llama3-8b")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_module_and_script_are_the_same():
    assert herdkern("--version").stdout == f"herdkern {__version__}\n"
