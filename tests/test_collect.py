"""The README's table says what the reports say, losses included."""

import importlib.util
from pathlib import Path

SPEC = importlib.util.spec_from_file_location(
    "collect", Path(__file__).resolve().parent.parent / "benchmarks/collect.py"
)
collect = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(collect)

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
