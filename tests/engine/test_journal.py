import dataclasses
import enum
import math
from pathlib import Path

import numpy as np
import pytest

from herdkern.engine import Run, canonical_json, config_sha256
from herdkern.engine.journal import add_counters, format_line, parse_line, sum_counters


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Inner:
    x: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    names: tuple[str, ...] = ("b", "a")
    path: Path = Path("a/b")
    colour: Colour = Colour.RED
    flags: frozenset[int] = frozenset({3, 1})


def test_canonical_json_of_a_config():
    assert canonical_json(Outer()) == (
        '{"__type__":"Outer","colour":"red","flags":[1,3],"inner":{"__type__":"Inner","x":0.5},'
        '"names":["b","a"],"path":"a/b"}'
    )


def test_equal_values_have_equal_hashes_and_others_not():
    assert config_sha256({"a": 1, "b": (1, 2)}) == config_sha256({"b": [1, 2], "a": 1})
    assert config_sha256({"a": np.float32(0.5)}) == config_sha256({"a": 0.5})
    different = [
        {},
        {"a": 1},
        {"a": 1.5},
        {"a": "1"},
        {"a": b"1"},
        {"a": True},
        {"a": None},
        Inner(),
        Inner(x=1.0),
        Outer(),
    ]
    assert len({config_sha256(value) for value in different}) == len(different)


@pytest.mark.parametrize("value", [object(), {"a": print}, [Run]])
def test_what_has_no_json_form_is_refused(value):
    with pytest.raises(TypeError, match="a configuration may hold"):
        canonical_json(value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_refused(value):
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"a": value})


ENTRY = {"stage": "s", "task": "task-00000", "outputs": [], "counters": {"é": 1}}


def test_a_line_comes_back():
    assert parse_line(format_line(ENTRY)) == ENTRY


def test_any_changed_byte_is_noticed():
    line = format_line(ENTRY).rstrip(b"\n")
    for place in range(len(line)):
        for flip in (1, 0x80):
            damaged = bytearray(line)
            damaged[place] ^= flip
            assert parse_line(bytes(damaged)) in (None, ENTRY)
            if bytes(damaged)[place : place + 1].strip():
                assert parse_line(bytes(damaged)) is None


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b"null", b"\xff", b'{"check":"0"}', b'{"stage":1'])
def test_what_is_no_line_is_none(line):
    assert parse_line(line) is None


def work(inputs, out, config):
    (out / "x").write_bytes(inputs[0].read_bytes())


def finished_run(tmp_path):
    inputs = []
    for i in range(3):
        inputs.append(tmp_path / f"in-{i}")
        inputs[-1].write_text(str(i))
    with Run(tmp_path / "run") as run:
        run.map("work", work, inputs, config={})
    return inputs, tmp_path / "run" / "journal.jsonl"


def test_a_torn_last_line_is_cut_off_wherever_it_is_torn(tmp_path):
    inputs, path = finished_run(tmp_path)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for size in (last + 1, last + 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        with Run(tmp_path / "run") as run:
            assert path.read_bytes() == whole[:last]
            assert len(run.journal.entries) == 2
            assert not run.map("work", work, inputs, config={}).skipped
        assert len(path.read_bytes().splitlines()) == 3
        assert all(parse_line(line) for line in path.read_bytes().splitlines())


def test_a_damaged_line_makes_its_task_run_again(tmp_path, caplog):
    inputs, path = finished_run(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"task-00001", b"task-00007") + lines[2])
    with Run(tmp_path / "run") as run:
        assert "line 2 is damaged" in caplog.text
        assert not run.map("work", work, inputs, config={}).skipped
    with Run(tmp_path / "run") as run:
        assert run.map("work", work, inputs, config={}).skipped


def test_an_empty_or_deleted_journal_starts_over(tmp_path):
    inputs, path = finished_run(tmp_path)
    path.write_bytes(b"")
    with Run(tmp_path / "run") as run:
        assert not run.map("work", work, inputs, config={}).skipped
    path.unlink()
    with Run(tmp_path / "run") as run:
        assert not run.map("work", work, inputs, config={}).skipped
        assert run.map("work", work, inputs, config={}).skipped


def test_counters_add_up():
    assert sum_counters([]) == {}
    parts = [
        {"a": 1, "d": {"x": 1, "y": 2.5}, "l": [1], "s": "one"},
        {"a": 2, "d": {"x": 3, "z": 1}, "l": [2], "s": "two"},
    ]
    assert sum_counters(parts) == {"a": 3, "d": {"x": 4, "y": 2.5, "z": 1}, "l": [1, 2], "s": "one"}
    assert add_counters({"a": 1}, {"a": {"b": 1}}) == {"a": 1}
