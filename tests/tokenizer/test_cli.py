"""`herdkern tokenizer ...` as a person meets it."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from herdkern import cli
from herdkern.tokenizer import Tokenizer, WordCounts, extend_vocabulary, iter_counts, train_bpe
from herdkern.tokenizer.cli import ACTIONS
from herdkern.tokenizer.cli_inputs import to_bytes, to_weights
from herdkern.tokenizer.extend import ExtensionOptions
from herdkern.tokenizer.train import TrainingOptions

TEXTS = ["the cat sat on the mat", "die Katze saß auf der Matte", "the cat's hat"]


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    (folder / "de").mkdir(parents=True)
    (folder / "en.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[::2]))
    (folder / "de" / "a.jsonl").write_text(json.dumps({"text": TEXTS[1]}) + "\n")
    (folder / "notes.xyz").write_text("not a shard")
    return folder


def run(*arguments):
    return cli.main(["tokenizer", *map(str, arguments)])


def test_count_merge_train_encode(shards, tmp_path, capsys):
    counts, merged = tmp_path / "counts", tmp_path / "merged"
    assert run("count", shards, "--out", counts, "--max-memory", "2GB", "--num-threads", 1) == 0
    expected = WordCounts().add(TEXTS)
    assert dict(iter_counts(counts)) == dict(expected.items())
    assert capsys.readouterr().out == f"{counts}: {len(expected)} words, {expected.num_occurrences} occurrences\n"
    assert run("merge", counts, counts.with_name("counts"), "--out", merged) == 0
    assert dict(iter_counts(merged)) == dict(expected.merge(expected).items())
    capsys.readouterr()
    for inputs in ([merged], [shards]):
        assert run("train", *inputs, "--out", tmp_path / "vocabulary", "--vocab-size", 300) == 0
        trained = Tokenizer.load(tmp_path / "vocabulary")
        assert trained == train_bpe(TEXTS, 300)
    assert f"{tmp_path / 'vocabulary'}: 300 entries\n" in capsys.readouterr().out
    assert run("encode", "the cat", "--tokenizer", tmp_path / "vocabulary") == 0
    assert capsys.readouterr().out.split() == [str(i) for i in trained.encode("the cat")]


def test_train_takes_what_train_bpe_takes(shards, tmp_path, capsys):
    """Every option of the command against the same keyword, from texts, from counts and within a budget."""
    first, counts = tmp_path / "first", tmp_path / "counts"
    assert run("train", shards, "--out", first, "--vocab-size", 290, "--split-pattern", "gpt2") == 0
    assert Tokenizer.load(first) == train_bpe(TEXTS, 290, split_pattern="gpt2")
    resumed = train_bpe(TEXTS, 310, split_pattern="gpt2", resume=Tokenizer.load(first))
    assert run("count", shards, "--out", counts, "--split-pattern", "gpt2") == 0
    for inputs in (counts, shards):  # text is cut as the tokenizer that is resumed cuts it
        for budget in ([], ["--max-memory", "2GB"]):
            out = tmp_path / "resumed"
            assert run("train", inputs, "--out", out, "--vocab-size", 310, "--resume", first, *budget) == 0
            assert Tokenizer.load(out) == resumed
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("resumed.")]
    options = ["--special-tokens", "<|a|>", "<|b|>", "--initial-tokens", "hat", "Katze", "--ties", "tiktoken"]
    limits = ["--min-frequency", 2, "--max-token-length", 4]
    assert run("train", shards, "--out", tmp_path / "own", "--vocab-size", 280, *options, *limits) == 0
    assert Tokenizer.load(tmp_path / "own") == train_bpe(
        TEXTS,
        280,
        special_tokens=["<|a|>", "<|b|>"],
        initial_tokens=["hat", "Katze"],
        ties="tiktoken",
        min_frequency=2,
        max_token_length=4,
    )
    assert run("train", shards, "--out", tmp_path / "none", "--vocab-size", 280, "--no-special-tokens") == 0
    assert Tokenizer.load(tmp_path / "none") == train_bpe(TEXTS, 280, special_tokens=())
    capsys.readouterr()
    assert run("train", counts, "--out", tmp_path / "x", "--split-pattern", "llama3") == 1
    assert "split_pattern must be that of the counts" in capsys.readouterr().err


def test_the_options_of_the_commands_are_those_of_the_functions():
    """A keyword that the functions get must not be missing from the commands."""
    for action, options in (("train", TrainingOptions), ("extend", ExtensionOptions)):
        shown = subprocess.run(
            [sys.executable, "-m", "herdkern", "tokenizer", action, "--help"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        missing = [name for name in options.__annotations__ if f"--{name.replace('_', '-')}" not in shown]
        assert missing == ["progress"], f"{action}: {missing}"


def test_extend_takes_weights_and_limits(shards, tmp_path, capsys):
    base = tmp_path / "base"
    assert run("train", shards / "en.jsonl", "--out", base, "--vocab-size", 290) == 0
    (tmp_path / "de.txt").write_text(TEXTS[1])
    (tmp_path / "nl.txt").write_text("de kat zat op de mat en de hoed")
    arguments = [tmp_path / "de.txt", tmp_path / "nl.txt", "--base", base, "--guard", shards / "en.jsonl"]
    limits = ["--num-new", 20, "--weights", "de.txt=2", "nl.txt=1/2", "--max-token-length", 3, "--min-frequency", 1]
    assert run("extend", *arguments, "--out", tmp_path / "out", *limits) == 0
    start = Tokenizer.load(base)
    expected, _ = extend_vocabulary(
        start,
        {"de.txt": [TEXTS[1]], "nl.txt": ["de kat zat op de mat en de hoed"]},
        20,
        guard=TEXTS[::2],
        language_weights={"de.txt": 2, "nl.txt": 0.5},
        max_token_length=3,
    )
    assert Tokenizer.load(tmp_path / "out") == expected
    assert run("extend", *arguments, "--out", tmp_path / "out", "--weights", "de.txt=lots", "nl.txt=1") == 2
    assert "the weight of de.txt must be a number as 2, 0.5 or 1/3, got 'lots'" in capsys.readouterr().err


def test_a_bad_line_is_one_message(shards, tmp_path, capsys):
    """File, line and what to do, without a traceback."""
    (shards / "en.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    assert run("count", shards, "--out", tmp_path / "counts") == 1
    told = capsys.readouterr().err
    assert told.startswith("herdkern: count_shards: en.jsonl#2 must be a readable document, got no_text: ")
    assert f"{shards / 'en.jsonl'}, line 2: " in told
    assert "mend or remove it and run again" in told
    assert told.count("\n") == 1


def test_weights_and_executors(shards, tmp_path):
    out = tmp_path / "counts"
    assert run("count", shards, "--out", out, "--weights", "*/de/*=2", "en.jsonl=1/2", "--executor", "threads") == 0
    counts = dict(iter_counts(out))
    assert counts[b"die"] == 2
    assert counts[b"the"] == 1
    assert run("merge", out, "--out", tmp_path / "other", "--weights", "counts=3") == 0
    assert dict(iter_counts(tmp_path / "other"))[b"die"] == 6


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_has_help(action, capsys):
    with pytest.raises(SystemExit) as end:
        run(action, "--help")
    assert end.value.code == 0
    assert f"usage: herdkern tokenizer {action}" in capsys.readouterr().out


def test_help_names_every_action_and_loads_nothing_heavy():
    code = """
import sys
from herdkern import cli
assert cli.main(["tokenizer", "--help"]) == cli.main(["--help"]) == 0
heavy = {"numpy", "torch", "tyro", "zstandard", "pyarrow"} & sys.modules.keys()
assert not heavy, heavy
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for action in ACTIONS:
        assert f"\n  {action} " in out


def test_counting_loads_no_torch(shards, tmp_path):
    code = """
import sys
from herdkern import cli
cli.main(["tokenizer", "count", *sys.argv[1:]])
assert not {"torch", "pyarrow", "transformers", "tokenizers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code, shards, "--out", tmp_path / "counts"], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cuont"], "did you mean 'count'?"),
        (
            ["train", "{counts}", "{counts}", "--out", "x"],
            "must be one counts file, or text, got 2 counts files among 2",
        ),
        (["train", "{shards}", "--out", "x", "--special-tokens", "<|a|>", "--no-special-tokens"], "got both"),
        (["count", "--out", "x"], "inputs must have at least one file or folder, got none"),
        (["merge", "--out", "x"], "inputs must have at least one counts file, got none"),
        (["count", "{shards}", "--out", "x", "--max-memory", "lots"], "must be a size as 200MB or 4GiB, got 'lots'"),
        (["count", "{shards}", "--out", "x", "--weights", "de"], "weights must be NAME=FACTOR, got 'de'"),
    ],
)
def test_a_wrong_command_line_is_told(shards, tmp_path, arguments, message, capsys):
    WordCounts().add("a").save(tmp_path / "counts")
    names = {"shards": shards, "counts": tmp_path / "counts"}
    assert run(*(argument.format(**names) for argument in arguments)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["count", "missing", "--out", "x"], "missing must be a file or folder, there is none"),
        (["count", "{shards}/notes.xyz", "--out", "x"], "path must end in .jsonl"),
        (["merge", "{shards}/en.jsonl", "--out", "x"], "must begin with b'herdkern word counts 2"),
        (["count", "{shards}", "--out", "x", "--split-pattern", "("], "split_pattern"),
        (["count", "{shards}", "--out", "x", "--max-memory", "1MB"], "max_memory must be at least"),
    ],
)
def test_what_cannot_be_done_is_told(shards, tmp_path, monkeypatch, arguments, message, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*(argument.format(shards=shards) for argument in arguments)) == 1
    assert message in capsys.readouterr().err
    assert not Path("x").exists()


def test_sizes_and_weights():
    assert [to_bytes(size) for size in ("", "1000", "200MB", "1.5 GiB", "2k", "3T")] == [
        None,
        1000,
        200_000_000,
        3 << 29,
        2000,
        3 * 10**12,
    ]
    assert to_weights(("a=b=2", "*/de/*=1/3")) == {"a=b": "2", "*/de/*": "1/3"}


def test_a_bar_is_shown_on_a_terminal_alone(shards, tmp_path):
    command = [sys.executable, "-m", "herdkern", "tokenizer", "count", shards, "--out", tmp_path / "counts"]
    quiet = subprocess.run(command, check=True, capture_output=True)
    assert quiet.stderr == b""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=terminal)
    os.write(terminal, b"end")  # something to read, whatever the command wrote
    shown = os.read(main, 1 << 16)
    os.close(terminal)
    os.close(main)
    assert b"count" in shown
    assert b"100%" in shown or b"B/s" in shown
