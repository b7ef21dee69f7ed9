"""`Saver` in one process: the snapshot, the one open write, what a load refuses."""

import threading

import pytest
import torch

import herdkern.train.sharded_checkpoint as module
from herdkern.train import Saver, latest_sharded, load_checkpoint, load_sharded
from herdkern.train.checkpoint import checkpoint_folders

SECONDS = 30


@pytest.fixture
def gate(monkeypatch):
    """Writes of a shard begin only when it is set."""
    event = threading.Event()

    def write(*args, of=module._write_file):
        assert event.wait(SECONDS)
        return of(*args)

    monkeypatch.setattr(module, "_write_file", write)
    return event


def kinds():
    """Tensors of every kind that a file can hold."""
    wide = torch.arange(12, dtype=torch.float32).view(3, 4)
    return {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 5),
        "turned": wide.t(),
        "part": wide[:, 1:3],
        "nan": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "bool": torch.tensor([True, False, True]),
        **{
            str(dtype).removeprefix("torch."): (wide * 1.7 - 3).to(dtype)
            for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.int64)
        },
    }


def same(one, other):
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def test_every_kind_of_tensor_comes_back(tmp_path):
    saver = Saver(tmp_path)
    folder = saver.save(4, {"model": kinds()}, {"a": [1, "ä"]}, {"rng": 2}, {"config.json": {"b": 1}})
    saver.wait()
    found = {name: torch.full_like(tensor, 1) for name, tensor in kinds().items()}
    assert latest_sharded(tmp_path) == folder == tmp_path / "step-4"
    assert load_sharded(folder, {"model": found}) == ({"a": [1, "ä"]}, {"rng": 2})
    assert [name for name, tensor in kinds().items() if not same(found[name], tensor)] == []
    one = load_checkpoint(folder)
    assert one.state == {"a": [1, "ä"]}
    names = {name: name if name.startswith("lm_head.") else f"model.{name}" for name in kinds()}
    assert all(same(one.tensors["model"][names[name]], tensor) for name, tensor in kinds().items())


def test_what_changes_after_save_is_not_written(tmp_path, gate):
    weights, state = {"a": torch.ones(1000), "b": torch.ones(7, dtype=torch.bfloat16)}, {"step": 1, "list": [1]}
    saver = Saver(tmp_path)
    saver.save(1, {"model": weights}, state, {})
    for tensor in weights.values():
        tensor.zero_()
    state["list"].append(2)
    gate.set()
    saver.wait()
    found = {name: torch.full_like(tensor, 9) for name, tensor in weights.items()}
    assert load_sharded(tmp_path / "step-1", {"model": found})[0] == {"step": 1, "list": [1]}
    assert all(bool((tensor == 1).all()) for tensor in found.values())


def test_the_next_save_waits_for_the_open_write(tmp_path, gate):
    saver = Saver(tmp_path)
    saver.save(1, {"model": {"a": torch.full((5,), 1.0)}}, {}, {})
    assert checkpoint_folders(tmp_path) == []  # save has returned, nothing is there
    timer = threading.Timer(0.2, gate.set)
    timer.start()
    saver.save(2, {"model": {"a": torch.full((5,), 2.0)}}, {}, {})
    assert gate.is_set()
    assert tmp_path / "step-1" in checkpoint_folders(tmp_path)
    saver.wait()
    for step in (1, 2):
        found = {"a": torch.zeros(5)}
        load_sharded(tmp_path / f"step-{step}", {"model": found})
        assert found["a"].tolist() == [float(step)] * 5


def test_a_failed_write_is_told_by_the_next_save_once(tmp_path, monkeypatch):
    saver = Saver(tmp_path)
    tensors = {"model": {"a": torch.ones(5)}}
    saver.save(1, tensors, {}, {})
    saver.wait()

    def fail(descriptor, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(module, "sync", fail)
    saver.save(2, tensors, {}, {})
    with pytest.raises(
        OSError, match=r"step-2 failed on 1 of 1 ranks; rank 0: .*No space left.*step-2\.tmp/shard-00000"
    ):
        saver.save(3, tensors, {}, {})
    monkeypatch.undo()
    saver.wait()  # told once
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    saver.save(3, tensors, {}, {})
    saver.wait()
    assert latest_sharded(tmp_path) == tmp_path / "step-3"


def test_tensors_may_come_and_change_between_saves(tmp_path):
    saver = Saver(tmp_path, keep_last=9, background=False)
    cases = [
        {"model": {"a": torch.ones(5)}},
        {"model": {"a": torch.ones(5) * 2}, "average": {"a": torch.ones(5, dtype=torch.float64)}},
        {"model": {"a": torch.ones(2, 3)}},
        {"model": {"a": torch.ones(2, 3, dtype=torch.float16)}},
    ]
    for step, tensors in enumerate(cases):
        folder = saver.save(step, tensors, {}, {})
        found = {stem: {"a": torch.zeros_like(named["a"])} for stem, named in tensors.items()}
        load_sharded(folder, found)
        assert all(same(found[stem]["a"], named["a"]) for stem, named in tensors.items())


def test_what_does_not_fit_is_named(tmp_path):
    folder = Saver(tmp_path, background=False).save(
        1, {"model": {"a": torch.ones(5), "b": torch.ones(2)}, "average": {"a": torch.ones(5)}}, {}, {}
    )
    load_sharded(folder, {"average": {"a": torch.ones(5)}})  # a stem alone may be read
    with pytest.raises(ValueError, match=r"they differ in 'model\.b'"):
        load_sharded(folder, {"model": {"a": torch.ones(5)}})
    with pytest.raises(ValueError, match=r"they differ in 'model\.c'"):
        load_sharded(folder, {"model": {"a": torch.ones(5), "b": torch.ones(2), "c": torch.ones(2)}})
    with pytest.raises(ValueError, match=r"model\.b must be \(2,\) as in the checkpoint, got \(3,\)"):
        load_sharded(folder, {"model": {"a": torch.ones(5), "b": torch.ones(3)}})
    with pytest.raises(ValueError, match=r"model\.a must have a dtype of F64, .*, got torch\.complex64"):
        Saver(tmp_path).save(2, {"model": {"a": torch.ones(2, dtype=torch.complex64)}}, {}, {})
    with pytest.raises(ValueError, match="keep_last must be at least 1, got 0"):
        Saver(tmp_path, keep_last=0)


def test_there_may_be_none(tmp_path):
    assert latest_sharded(tmp_path / "absent") is None
    (tmp_path / "step-2.tmp").mkdir()
    assert latest_sharded(tmp_path) is None
