"""The projection orders layouts as steps on real ranks do: those of the recorded benchmark, and measured anew."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # the scripts find each other there
RECORDED = BENCHMARKS / "results" / "layouts.json"
AT_LEAST = 0.8  # Spearman's rank correlation


@pytest.fixture
def recorded():
    report = json.loads(RECORDED.read_text(encoding="utf-8"))
    return report["cases"], report["rates"]


def test_projection_ranks_the_recorded_layouts_as_they_were_measured(recorded):
    import bench_layouts

    rows, rates = recorded
    assert len(rows) >= 20
    assert {row["case"] for row in rows} == set(bench_layouts.NAMES)
    found = bench_layouts.project_rows(rows, rates)
    assert found["spearman"] >= AT_LEAST


def test_a_projection_without_transfers_or_shared_cores_does_not_rank_them(recorded, monkeypatch):
    """The bound can fail: what the projection knows of this kind of host is what orders the layouts."""
    import bench_layouts

    rows, rates = recorded
    free = {"bytes_per_s": 1e30, "latency_s": 0.0}
    assert bench_layouts.project_rows(rows, rates | free)["spearman"] < AT_LEAST
    described = bench_layouts.this_machine(rates)
    monkeypatch.setattr(bench_layouts, "this_machine", lambda _: dataclasses.replace(described, cores=0))
    assert bench_layouts.project_rows(rows, rates)["spearman"] < AT_LEAST


@pytest.mark.full
@pytest.mark.distributed
def test_projection_ranks_layouts_measured_now(tmp_path):
    out = tmp_path / "layouts.json"
    script = [sys.executable, str(BENCHMARKS / "bench_layouts.py"), "--json", str(out), "--limit", "240"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    agreement = json.loads(out.read_text())["agreement"]
    assert agreement["layouts"] >= 20
    assert agreement["spearman"] >= AT_LEAST, agreement
