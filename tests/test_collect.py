"""The README's table says what the reports say, losses included."""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))  # the scripts find each other there
import attention_picture
import bpe_table
import collect
import harness
import pytest

from herdkern.ops import faster_peers

MACHINE = {
    "cpu": "some",
    "cores": 2,
    "isa": "avx2",
    "compiler": "g++ 12",
    "versions": {"torch": "2", "rensa": "1", "x": "3"},
}
MACHINE |= {"date": "2026-01-01"}


def case(name: str, ours: float, peer: float) -> dict:
    times = {"herdkern": ours, "rensa": peer}
    return {"case": name, **times, "ratio": peer / ours, "best_peer": "rensa", "spread": times}


def test_table_shows_range_median_and_losses():
    report = {
        "bench": "minhash",
        "machine": MACHINE,
        "cases": [case("a", 1, 4), case("b", 2, 1), case("c", 0.01, 0.02)],
    }
    text = collect.table([report])
    assert "| `minhash` | 3 | 0.5 to 4, median 2 | c: 10 µs, rensa 20 µs |" in text
    assert "rensa 1, torch 2" in text
    assert "x 3" not in text


def test_runs_of_single_cases_join_to_one_report():
    first = {"bench": "a", "machine": MACHINE | {"commit": "1"}, "cases": [case("x", 1, 4), case("y", 1, 4)]}
    second = {"bench": "a", "machine": MACHINE | {"commit": "2"}, "cases": [case("y", 1, 5)]}
    found = collect.joined([first, second])
    assert [(c["case"], c["commit"], c["ratio"]) for c in found["cases"]] == [("x", "1", 4), ("y", "2", 5)]
    with pytest.raises(ValueError, match="joined: reports must be of one benchmark"):
        collect.joined([first, second | {"bench": "b"}])
    with pytest.raises(ValueError, match="one cpu"):
        collect.joined([first, second | {"machine": MACHINE | {"cpu": "other"}}])


def test_without_reports_it_says_so():
    assert "No full benchmark run" in collect.table([])


def test_short_runs_are_named_and_empty_reports_left_out(tmp_path):
    (tmp_path / "a.json").write_text('{"bench": "a", "quick": true, "cases": []}')
    assert collect.load_reports(tmp_path) == []
    reports = collect.load_reports(collect.HERE / "results")
    short = [report["bench"] for report in reports if report["quick"]]
    assert all(f"| `{report['bench']}` |" in collect.table(reports) for report in reports)
    assert ("short runs" in collect.table(reports)) == bool(short)
    full = [{**report, "quick": False} for report in reports]
    assert "short runs" not in collect.table(full)


def test_page_on_attention_holds_the_table_of_the_recorded_report():
    page = collect.ATTENTION.read_text(encoding="utf-8")
    assert collect.attention_page(collect.HERE / "results", page) == page, "run python benchmarks/collect.py"


def test_ops_tell_the_cases_that_a_peer_wins():
    assert collect.FASTER_PEERS.read_text(encoding="utf-8") == collect.faster_peers(collect.HERE / "results")
    lost = {op: collect.json.loads(collect.FASTER_PEERS.read_text(encoding="utf-8"))[op] for op in collect.OP_BENCHES}
    assert faster_peers("adamw") == lost["adamw"]
    assert faster_peers("linear_cross_entropy") == lost["cross_entropy"]
    assert faster_peers("no_such_op") == []


def test_faster_peers_are_the_cases_below_one(tmp_path):
    report = {"bench": "rope", "machine": MACHINE, "cases": [case("a", 1, 4), case("b", 2, 1)]}
    (tmp_path / "rope.json").write_text(collect.json.dumps(report))
    (row,) = collect.json.loads(collect.faster_peers(tmp_path))["rope"]
    assert (row["case"], row["peer"], row["times_faster"]) == ("b", "rensa", 2.0)


def test_page_on_ops_holds_the_tables_of_the_recorded_reports():
    page = collect.OPS.read_text(encoding="utf-8")
    assert collect.ops_page(collect.HERE / "results", page) == page, "run python benchmarks/collect.py"


def test_table_of_an_op_shows_every_case_and_who_wins_it():
    won = case("a", 1, 4) | {"limit_share": 0.5, "peak_mib": {"herdkern": 1.2, "rensa": 3.0}, "rounds": 9}
    report = {"bench": "rope", "machine": MACHINE, "cases": [won, case("b", 2, 1) | {"rounds": 1}]}
    text = collect.op_table(report)
    assert "| a | 1 ms | rensa 4 ms | 4.00 | 50 % | 1 / 3 |" in text
    assert "| b (few rounds) | 2 ms | rensa 1 ms | **0.50** |  |  |" in text
    assert "A peer is faster in 1 of 2 cases." in text
    assert "No peer is faster." in collect.op_table(report | {"cases": [won]})


def attention_report(**more) -> dict:
    times = {"herdkern": 2.0, "SDPA per document": 5.0}
    case = {
        "case": "bf16-zipf-T2048-D128",
        **times,
        "ratio": 2.5,
        "best_peer": "SDPA per document",
        "gflop_per_s": 100.0,
    }
    limits = {"peak_bfloat16_gflop_per_s": 400.0, "gemm_bfloat16_gflop_per_s": 300.0}
    machine = {**MACHINE, "lscpu": {}, "threads": 2, "torch_isa": "AVX2", "commit": "abc", "limits": limits}
    return {"bench": "attention", "quick": False, "cases": [{**case, **more}], "machine": machine}


def test_attention_table_and_picture_show_every_implementation_that_was_timed():
    text = attention_picture.table(attention_report(limit_share=0.25))
    assert "| `bf16-zipf-T2048-D128` | 2 | SDPA per document | 5 | 2.50 |  |  | 25 % |" in text
    drawn = attention_picture.picture(attention_report())
    assert "SDPA per document</text>" in drawn
    assert "dense mask" not in drawn


def test_attention_rates_follow_from_the_times():
    ((ours, points), (peer, slower)) = attention_picture.rates(attention_report()).items()
    assert (ours, points) == (("bf16", "zipf", 128, "herdkern"), [(2048, 100.0)])
    assert (peer[3], slower) == ("SDPA per document", [(2048, 40.0)])


def test_what_callgrind_counts_runs_alone():
    script = str(collect.HERE / "attention_instructions.py")
    for dtype in ("fp32", "bf16"):
        done = subprocess.run([sys.executable, script, "--work", dtype, "1", "1"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_peer_that_is_not_timed_at_one_thread_is_named(capsys):
    import torch

    threads, kind = torch.get_num_threads(), harness.clock.kind
    slow = harness.Case(name="a", setup=dict, slow_peers=("slow",))
    functions = {name: lambda: sum(range(1000)) for name in ("herdkern", "quick", "slow")}
    times = dict.fromkeys(functions, 0.01)
    result = {"case": "a", **times, "spread": times, "rounds": 3, "peak_mib": {}, "limit_share": None}
    found = harness.at_one_thread(slow, functions, result, 0.05)
    assert set(found["cpu_ms_1_thread"]) == {"herdkern", "quick"}
    assert found["not_at_1_thread"] == ["slow"]
    harness.print_case(slow, result | found)
    assert "no part of ratio_1_thread: slow" in capsys.readouterr().out
    assert (torch.get_num_threads(), harness.clock.kind) == (threads, kind)


def test_tokenizer_tables_show_what_failed():
    machine = MACHINE | {"versions": {"rustbpe": "1", "tiktoken": "2"}}
    train = {"case": "10MB", "herdkern": 500.0, "rustbpe": 3000.0, "spread": {"herdkern": 0, "rustbpe": 0}}
    train |= {"mb_per_s": {"herdkern": 20.0, "rustbpe": 3.3}, "peak_mib": {"herdkern": 5.0, "rustbpe": 50.0}}
    train |= {"failed": {"tokenizers": "failed: not finished in 600 s"}}
    encode = {"case": "cl100k english large cold", "herdkern": 50.0, "tiktoken": 500.0, "phase": "cold"}
    encode |= {"ratio": 10.0, "best_peer": "tiktoken", "spread": {"herdkern": 0, "tiktoken": 0}}
    encode |= {
        "mb_per_s": {"herdkern": 100.0, "tiktoken": 10.0},
        "failed": {"tokie": "other ids, for instance for 'x'"},
    }
    reports = {
        "bpe_train": {"machine": machine, "cases": [train]},
        "bpe_encode": {
            "machine": machine,
            "cases": [encode],
            "exactness": {
                "cl100k": {"kitoken": {"string": "\u200d", "number": 3, "of": 9}, "rs-bpe": {"string": None}}
            },
            "worst_case": {"cl100k": [{"family": "spaces", "ratio": 2.1, "mb_per_s": 80.0}]},
        },
    }
    text = bpe_table.tables(reports)
    assert "| 10MB | herdkern | 0.5 |  | 20 | 5 |" in text
    assert "|  | rustbpe | 3 | 6.0 | 3.3 | 50 |" in text
    assert "| | tokenizers | failed: not finished in 600 s |" in text
    assert "| cl100k english large | 100 (10.00 × tiktoken) |  |  |  |" in text
    assert "tokie: other ids, for instance for 'x' (cl100k english large)" in text
    assert "kitoken, cl100k: 3 of 9 torture strings" in text
    assert "rs-bpe" not in text
    assert "2.10 times the time" in text
    assert "no full run on record" in bpe_table.tables({"bpe_train": reports["bpe_train"] | {"quick": True}})
