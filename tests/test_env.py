"""`herdkern env`: the table, the reasons, the self-test and its exit status."""

import torch

from herdkern import env
from herdkern.ops import backend


def test_report_passes_and_names_every_op(capsys):
    assert env.report() == 0
    out = capsys.readouterr().out
    for name in ("attention", "rms_norm", "swiglu", "rope", "linear_cross_entropy", "self-test passed", "kernel level"):
        assert name in out
    assert "dtype must be float32 or bfloat16, got float64" in out


def test_environment_record_is_json_like():
    info = env.environment()
    assert info["kernel_level"] in ("baseline", "avx2", "avx512", "amx", "not built")
    assert info["packages"]["torch"] == torch.__version__
    assert info["cores"] >= 1


def test_native_is_taken_for_both_trained_dtypes():
    assert backend.active_isa() is not None, "the kernels are not built"
    for case in env.op_cases():
        for dtype in (torch.float32, torch.bfloat16):
            assert env.backends_of(case, dtype) == ("native", [])


def test_a_wrong_kernel_is_found_and_fails(monkeypatch, capsys):
    cases = env.op_cases()
    wrong = env.OpCase(
        name=cases[1].name,
        run=lambda dtype, backend: cases[1].run(dtype, backend) * 1.02,
        reference=cases[1].reference,
    )
    assert env.op_fault(cases[1], torch.float32) == ""
    assert "must be at most" in env.op_fault(wrong, torch.float32)
    monkeypatch.setattr(env, "op_cases", lambda: [wrong])
    assert env.report() == 1
    assert "FAULT rms_norm" in capsys.readouterr().out


def test_a_wrong_text_kernel_is_found(monkeypatch):
    assert env.text_faults() == []
    monkeypatch.setattr(env, "plain_bpe", lambda word, ranks: [0])
    assert any(fault.startswith("tokenizer:") for fault in env.text_faults())
