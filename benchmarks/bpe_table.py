"""Tables of the tokenizer's reports for docs/tokenizer.md."""

from typing import Any

OURS = "herdkern"
PHASES = ("cold", "warm", "steady", "decode")


def tables(reports: dict[str, dict[str, Any]]) -> str:
    """Training, then encoding; a sentence for what was not measured."""
    parts = []
    for name, write in (("bpe_train", train_table), ("bpe_encode", encode_table)):
        report = reports.get(name)
        full = report is not None and not report.get("quick") and "versions" in report["machine"]
        picture = f"![bench_{name}.py](../benchmarks/results/{name}.svg)\n\n"
        parts.append(picture + write(report) if full and report else f"`bench_{name}.py` has no full run on record.\n")
    return "\n".join(parts)


def about(report: dict[str, Any], names: set[str]) -> str:
    """Processor, date and versions of those that were measured."""
    machine = report["machine"]
    versions = [f"{name} {version}" for name, version in sorted(machine["versions"].items()) if name in names]
    return f"{machine['cpu']}, one thread, {machine['date']}; {', '.join(versions)}.\n"


def train_table(report: dict[str, Any]) -> str:
    """A line for each candidate of each case: CPU seconds, times of ours, memory beyond the documents."""
    lines = ["| case | | CPU seconds | times ours | MB/s | MiB beyond the input |", "|---|---|---|---|---|---|"]
    names: set[str] = set()
    for case in report["cases"]:
        aside = case.get("aside", {})
        shown = sorted((name for name in case["spread"] if name not in aside), key=lambda n: (n != OURS, case[n]))
        for name in [*shown, *(name for name in aside if not name.startswith(OURS))]:
            names.add(name)
            label = case["case"] if name == OURS else ""
            times = "" if name == OURS else f"{case[name] / case[OURS]:.1f}"
            seconds = case[name] / 1e3
            mark = " ¹" if name in aside else ""
            lines.append(
                f"| {label} | {name}{mark} | {seconds:.3g} | {times} | {case['mb_per_s'][name]:g} | "
                f"{case['peak_mib'][name]:g} |"
            )
        for name, why in case.get("failed", {}).items():
            lines.append(f"| | {name} | {why} | | | |")
    note = "¹ another task, see the head of the script. " if any("¹" in line for line in lines) else ""
    if "count_2_threads" in report:
        note += f"Two threads count 700 MB {report['count_2_threads']} times as fast as one, by the clock on the wall. "
    return "\n".join([*lines, "", note + about(report, names)])


def memory_lines(report: dict[str, Any]) -> list[str]:
    """What the largest batch adds to the memory of each candidate, and what its process held in all."""
    lines = []
    for case in report["cases"]:
        if case["case"].endswith("multilingual large cold") and case.get("process_mib"):
            added = sorted(case["peak_mib"].items(), key=lambda item: item[1])
            shown = ", ".join(f"{name} {mib:.0f} ({case['process_mib'][name]:.0f})" for name, mib in added)
            lines.append(
                f"- MiB that {case['case'].removesuffix(' cold')} adds (and the whole process holds): {shown}."
            )
    return lines


def encode_table(report: dict[str, Any]) -> str:
    """A line for each text and shape: MB per CPU second of ours by phase, and against the best exact peer."""
    cells: dict[str, dict[str, str]] = {}
    names: set[str] = set()
    wrong: dict[str, str] = {}
    for case in report["cases"]:
        names |= set(case["spread"])
        row = case["case"].rsplit(" ", 1)[0]
        ours, peer = case["mb_per_s"][OURS], case["best_peer"]
        over = f" ({case['ratio']:.2f} × {peer}" if peer else ""
        if peer and case.get("over_tiktoken") and peer != "tiktoken":
            over += f", {case['over_tiktoken']:.1f} × tiktoken"
        over += ")" * bool(peer)
        cells.setdefault(row, {})[case["phase"]] = f"{ours:.3g}{over}"
        wrong |= {name: f"{why} ({row})" for name, why in case.get("failed", {}).items() if name not in wrong}
    lines = ["| MB/s | " + " | ".join(PHASES) + " |", "|---|" + "---|" * len(PHASES)]
    lines += [
        f"| {row} | " + " | ".join(found.get(phase, "") for phase in PHASES) + " |" for row, found in cells.items()
    ]
    lines += ["", about(report, names), *memory_lines(report)]
    lines += [f"- {name}: {why}" for name, why in sorted(wrong.items())]
    for vocabulary, found in report.get("exactness", {}).items():
        for name, what in found.items():
            if what.get("string") is not None:
                lines.append(
                    f"- {name}, {vocabulary}: {what['number']} of {what['of']} torture strings get other ids than "
                    f"tiktoken's, for instance `{what['string']!r}`"
                )
    for vocabulary, families in report.get("worst_case", {}).items():
        if families and "ratio" in families[0]:
            worst = max(families, key=lambda family: family["ratio"])
            lines.append(
                f"- Twice the text takes at most {worst['ratio']:.2f} times the time with {vocabulary}, on "
                f"{len(families)} hostile families (the worst: {worst['family']}; the slowest runs at "
                f"{min(family['mb_per_s'] for family in families):g} MB/s)."
            )
    return "\n".join(lines) + "\n"
