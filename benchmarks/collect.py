"""Writes the tables of README.md and of the pages in docs/ from benchmarks/results/*.json.

README has one row for each benchmark, the pages (attention, ops, tokenizer) one for each of their cases. The cases that
an op loses also go to herdkern/ops/faster_peers.json, from which `herdkern.ops.faster_peers` and `herdkern env` tell.

    python benchmarks/collect.py --run             runs every benchmark in full first and keeps its JSON report
    python benchmarks/collect.py --run --quick     the same in the short form; the table says so
    python benchmarks/collect.py                   only writes the tables again
    python benchmarks/collect.py --join WHOLE.json PART.json ...
                                                   makes one report of runs of single cases (--case)

A ratio is the time of the best peer over ours, case by case; a row gives the range and the median over all cases, so a
case that we lose is seen.
"""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import attention_picture
import bpe_table
from harness import write_json

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
ATTENTION = HERE.parent / "docs/attention.md"
TOKENIZER = HERE.parent / "docs/tokenizer.md"
OPS = HERE.parent / "docs/ops.md"
FASTER_PEERS = HERE.parent / "herdkern/ops/faster_peers.json"
OP_BENCHES = ("rms_norm", "swiglu", "rope", "cross_entropy", "adamw")
MARKERS = re.compile(r"(<!-- benchmarks -->\n).*?(<!-- /benchmarks -->)", re.S)


def load_reports(folder: Path) -> list[dict[str, Any]]:
    """The reports of a folder by name; those without a case are left out."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [report for report in reports if report.get("cases")]


def milliseconds(value: float) -> str:
    """A time with three figures and a fitting unit."""
    return f"{value / 1000:.3g} s" if value >= 1000 else f"{value:.3g} ms" if value >= 1 else f"{1000 * value:.3g} µs"


def row(report: dict[str, Any]) -> str:
    """One line of the table: range of the ratios, and the case in the middle with its times."""
    cases = [case for case in report["cases"] if case.get("ratio")]
    if not cases:
        first = report["cases"][0]
        ours = milliseconds(first["herdkern"])
        return f"| `{report['bench']}` | {len(report['cases'])} | no peer | {first['case']}: {ours} |"
    ordered = sorted(cases, key=lambda case: case["ratio"])
    low, middle, high = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    median = statistics.median(case["ratio"] for case in cases)
    span = f"{low['ratio']:.2g} to {high['ratio']:.2g}, median {median:.2g}" if len(cases) > 1 else f"{median:.2g}"
    peer = middle["best_peer"]
    example = f"{middle['case']}: {milliseconds(middle['herdkern'])}, {peer} {milliseconds(middle[peer])}"
    return f"| `{report['bench']}` | {len(report['cases'])} | {span} | {example} |"


def table(reports: list[dict[str, Any]]) -> str:
    """The table and a line on the machine; a sentence instead if nothing was measured yet."""
    if not reports:
        return "No full benchmark run has been recorded yet: `python benchmarks/collect.py --run`.\n"
    machine = reports[0]["machine"]
    versions: dict[str, str] = {}
    for report in reports:
        versions |= report["machine"].get("versions", {})
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if is_peer(name, reports))
    dates = sorted({report["machine"]["date"] for report in reports})
    about = f"{machine['cpu']}, {machine['cores']} cores, kernel level {machine.get('isa') or 'of the text kernels'}"
    head = ["| benchmark | cases | times faster than the best peer | the case in the middle |", "|---|---|---|---|"]
    short = sorted(report["bench"] for report in reports if report.get("quick"))
    about += f"; short runs (`--quick`, few rounds) of {', '.join(short)}" if short else ""
    foot = (
        f"\n{about}; {machine['compiler']}; {named}; {dates[-1]}. A figure below 1 is a case where a peer is faster.\n"
    )
    return "\n".join([*head, *map(row, reports)]) + "\n" + foot


def attention_page(folder: Path, text: str) -> str:
    """`text` with the table of every report named attention*.json, each after its own heading."""
    parts = []
    for report in load_reports(folder):
        if report["bench"].startswith("attention"):
            level = report["machine"]["isa"]
            parts.append(f"### Level {level}\n\n{attention_picture.table(report)}")
    return MARKERS.sub(lambda m: m[1] + "\n".join(parts) + m[2], text)


def tokenizer_page(folder: Path, text: str) -> str:
    """`text` with the tables of the tokenizer's reports."""
    reports = {report["bench"]: report for report in load_reports(folder)}
    return MARKERS.sub(lambda m: m[1] + bpe_table.tables(reports) + m[2], text)


def op_table(report: dict[str, Any]) -> str:
    """One line for each case of an op's benchmark, the peers' victories in bold, and a line on how it was measured."""
    head = "| case | herdkern | best peer | times faster | share of the limit | MiB added, ours / peer |"
    lines = [head, "|---|---|---|---|---|---|"]
    for case in report["cases"]:
        peer, ratio, memory = case["best_peer"], case["ratio"], case.get("peak_mib", {})
        faster = f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"
        limit = "" if case.get("limit_share") is None else f"{100 * case['limit_share']:.0f} %"
        added = f"{memory['herdkern']:.0f} / {memory[peer]:.0f}" if {"herdkern", peer} <= memory.keys() else ""
        few = " (few rounds)" if case.get("rounds", 3) < 3 else ""
        ours, theirs = milliseconds(case["herdkern"]), milliseconds(case[peer])
        lines.append(f"| {case['case']}{few} | {ours} | {peer} {theirs} | {faster} | {limit} | {added} |")
    machine = report["machine"]
    lost = [case["case"] for case in report["cases"] if case["ratio"] < 1]
    about = f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}, torch {machine['versions']['torch']}"
    about += f", {machine['date']}" + ", short run (`--quick`), without torch.compile" * bool(report.get("quick"))
    verdict = f"A peer is faster in {len(lost)} of {len(report['cases'])} cases." if lost else "No peer is faster."
    return "\n".join(lines) + f"\n\n{verdict} {about}.\n"


def ops_page(folder: Path, text: str) -> str:
    """`text` with the table of every op in OP_BENCHES that has a report, each after its own heading."""
    reports = {report["bench"]: report for report in load_reports(folder)}
    parts = [f"### `bench_{name}.py`\n\n{op_table(reports[name])}" for name in OP_BENCHES if name in reports]
    return MARKERS.sub(lambda m: m[1] + "\n".join(parts) + m[2], text)


def faster_peers(folder: Path) -> str:
    """The cases of every op in which a peer is faster, as JSON: {op: [{case, peer, times_faster, measured_on}]}."""
    lost: dict[str, list[dict[str, Any]]] = {}
    for report in load_reports(folder):
        if report["bench"] in OP_BENCHES:
            machine = report["machine"]
            lost[report["bench"]] = [
                {
                    "case": case["case"],
                    "peer": case["best_peer"],
                    "times_faster": round(1 / case["ratio"], 2),
                    "measured_on": f"{machine['cpu']}, {machine['isa']}, torch {machine['versions']['torch']}",
                }
                for case in report["cases"]
                if case["ratio"] < 1
            ]
    return json.dumps(lost, indent=2, sort_keys=True) + "\n"


def is_peer(name: str, reports: list[dict[str, Any]]) -> bool:
    """Whether a package is torch or named by some implementation of some case."""
    implementations = {key for report in reports for case in report["cases"] for key in case.get("spread", {})}
    return name == "torch" or any(name.split("-")[0] in key.lower() for key in implementations)


def joined(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several of the same benchmark on one machine: a later case replaces an earlier one of its name.

    Every case tells the commit and the date of its run. Raises: ValueError for other benchmarks or machines.
    """
    cases: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    for report in reports:
        for key in ("cpu", "cores"):
            if whole and (report["bench"], report["machine"][key]) != (whole["bench"], whole["machine"][key]):
                raise ValueError(f"joined: reports must be of one benchmark and one {key}, got {report['bench']!r} too")
        run = {key: report["machine"][key] for key in ("commit", "date") if key in report["machine"]}
        cases |= {case["case"]: {**run, **case} for case in report["cases"]}
        whole |= report
    return {**whole, "cases": list(cases.values())}


def run_all(folder: Path, *options: str) -> int:
    """Every benchmark, one after the other; returns the number that failed."""
    failed = 0
    for script in sorted(HERE.glob("bench_*.py")):
        out = folder / f"{script.stem.removeprefix('bench_')}.json"
        failed += subprocess.run([sys.executable, str(script), "--json", str(out), *options]).returncode != 0
    return failed


def main() -> int:
    """Runs the benchmarks if asked to, then writes the table; returns the exit status."""
    if sys.argv[1:2] == ["--join"]:
        parts = [json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[3:]]
        write_json(sys.argv[2], joined(parts))
        return 0
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    failed = run_all(folder, *(["--quick"] if "--quick" in sys.argv else [])) if "--run" in sys.argv else 0
    text = README.read_text(encoding="utf-8")
    README.write_text(MARKERS.sub(lambda m: m[1] + table(load_reports(folder)) + m[2], text), encoding="utf-8")
    for page, write in ((ATTENTION, attention_page), (OPS, ops_page), (TOKENIZER, tokenizer_page)):
        page.write_text(write(folder, page.read_text(encoding="utf-8")), encoding="utf-8")
    FASTER_PEERS.write_text(faster_peers(folder), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
