"""metrics.jsonl survives a torn line and is cut back to a step; the peak is a positive number."""

import json

import pytest
import torch

from herdkern.train.metrics import MetricsLog, measured_peak_flops


def test_a_torn_last_line_is_left_out_and_steps_are_cut(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.read() == []
    log.keep_until(3)  # nothing there yet
    for step in range(1, 6):
        log.append({"step": step, "loss": 1 / step})
    with open(log.path, "a") as f:
        f.write('{"step": 6, "lo')
    assert [r["step"] for r in log.read()] == [1, 2, 3, 4, 5]
    log.keep_until(3)
    log.append({"step": 4, "loss": 0.1})
    assert [r["loss"] for r in log.read()] == [1.0, 1 / 2, 1 / 3, 0.1]
    log.sync()


def test_a_damaged_line_is_named(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl must be JSON"):
        log.read()


def test_values_that_are_not_json_are_refused(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError):
        log.append({"step": 1, "loss": float("nan")})
    log.append({"step": 1, "loss": None})
    assert json.loads(log.path.read_text()) == {"step": 1, "loss": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_peak_is_measured(dtype):
    assert measured_peak_flops(dtype, size=64, repeats=2) > 0
