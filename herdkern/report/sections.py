"""The sections of a report: each takes the run's record and returns HTML, or "" when the run holds nothing for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from herdkern.report.figures import Series, bars, compact, histogram, line_chart
from herdkern.report.html import cards, details, escape, grid, panel, side_by_side, table, text_block
from herdkern.report.record import RunRecord, TokenStats, finite


def size(num_bytes: float) -> str:
    """A number of bytes as a person writes it: 512 B, 3.4 MB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """A number of seconds as a person writes it: 0.4 s, 52 s, 3:05 min, 2:10 h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def words(name: str) -> str:
    """A stage name or drop reason with spaces instead of underscores."""
    return name.replace("_", " ").replace("-", " ")


def summary(record: RunRecord) -> str:
    """The figures a reader looks for first."""
    items: list[tuple[str, str]] = []
    evaluation = record.evaluation
    if "bits_per_byte" in evaluation:
        items.append((f"{evaluation['bits_per_byte']:.3f}", "held-out bits per byte"))
    if "unigram_bits_per_byte" in evaluation:
        items.append((f"{evaluation['unigram_bits_per_byte']:.3f}", "unigram baseline, bits per byte"))
    text_stages = [s for s in record.stages if s.docs_out]
    if text_stages:
        items.append((f"{max(max(s.docs_in, s.docs_out) for s in text_stages):,}", "pages and documents read"))
        items.append((f"{text_stages[-1].docs_out:,}", "documents kept"))
    if record.tokens:
        items.append((compact(sum(t.num_tokens for t in record.tokens)), "tokens in the shards"))
    if evaluation.get("num_parameters"):
        items.append((compact(evaluation["num_parameters"]), "parameters"))
    _, rates = finite(record.metrics, "tokens_per_s")
    if rates:
        items.append((compact(float(np.median(rates))), "training tokens/s (median)"))
    total = sum(record.timings.values()) or sum(s.seconds for s in record.stages)
    if total:
        items.append((duration(total), "time of all stages"))
    return cards(items) if items else ""


def funnel(record: RunRecord) -> str:
    """What each stage kept and dropped, and why."""
    stages = [s for s in record.stages if s.docs_in or s.docs_out]
    if not stages:
        return ""
    most = max(max(s.docs_in, s.docs_out) for s in stages) or 1
    rows = []
    for stage in stages:
        kept = stage.docs_out / most * 100
        lost = max(max(stage.docs_in, stage.docs_out) - stage.docs_out, 0) / most * 100
        label = f"{stage.docs_out:,}" + (f" · {size(stage.bytes_out)}" if stage.bytes_out else "")
        rows.append(
            f'<div class="row"><span class="name">{escape(words(stage.name))}</span><span class="track">'
            f'<i class="keep" style="width:{kept:.2f}%"></i><i class="drop" style="width:{lost:.2f}%"></i></span>'
            f'<span class="value">{escape(label)}</span></div>'
        )
    legend = '<div class="legend"><span class="key"><i class="keep"></i>kept</span>'
    legend += '<span class="key"><i class="drop"></i>dropped here</span></div>'
    chart = panel("Documents after each stage", f'<div class="bars funnel">{"".join(rows)}</div>{legend}')
    cells = [
        [
            words(s.name),
            f"{s.docs_in:,}" if s.docs_in else "",
            f"{s.docs_out:,}",
            f"{1 - s.docs_out / s.docs_in:.1%}" if s.docs_in and s.docs_out <= s.docs_in else "",
            size(s.bytes_out) if s.bytes_out else "",
        ]
        for s in stages
    ]
    return chart + panel(
        "", table(["stage", "documents in", "out", "dropped", "bytes out"], cells, numeric=(1, 2, 3, 4))
    )


def dropped(record: RunRecord) -> str:
    """Reasons with counts; each opens to a few of the documents that fell to it."""
    parts = []
    for stage in (s for s in record.stages if s.dropped and sum(s.dropped.values())):
        order = [row for row in sorted(stage.dropped.items(), key=lambda item: (-item[1], item[0])) if row[1]]
        shown = record.examples.get(stage.name, {})
        rows = [_reason(reason, count, order[0][1], shown.get(reason, [])) for reason, count in order]
        heading = f"{words(stage.name)}: {sum(stage.dropped.values()):,} dropped"
        parts.append(panel(heading, f'<div class="bars">{"".join(rows)}</div>'))
    note = '<p class="note">Open a reason to read what fell to it.</p>'
    return note + "".join(parts) if parts else ""


def _reason(reason: str, count: int, most: int, documents: Sequence[Any]) -> str:
    blocks = []
    for document in documents:
        measured = ", ".join(f"{k} {_short(v)}" for k, v in document.meta.items() if k != "reason")
        about = " · ".join(part for part in (document.url or document.record, measured) if part)
        text = text_block(document.text, 600) if document.text else ""
        blocks.append(f'<div class="url">{escape(about[:400])}</div>{text}')
    width = max(count / most * 100, 0.4)
    row = f'<span class="name">{escape(words(reason))}</span>'
    row += f'<span class="track"><i class="drop" style="width:{width:.1f}%"></i></span>'
    row += f'<span class="value">{count:,}</span>'
    if not blocks:
        return f'<div class="row">{row}</div>'
    return f'<details class="reason"><summary class="row">{row}</summary>{"".join(blocks)}</details>'


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:80]


def duplicates(record: RunRecord) -> str:
    """Near-duplicate pairs side by side and the lines that line dedup removed."""
    parts: list[str] = []
    for pair in record.pairs:
        left, right = side_by_side(str(pair.get("kept", "")), str(pair.get("dropped", "")))
        body = '<div class="pair">'
        for which, text in (("kept", left), ("dropped", right)):
            url = escape(str(pair.get(f"{which}_url", ""))[:300])
            body += f'<div><div class="url">{which}: {url}</div><pre>{text}</pre></div>'
        title = str(pair.get("dropped_url") or pair.get("dropped_id", "pair"))
        similarity = pair.get("similarity")
        note = f"similarity {similarity:.2f}" if isinstance(similarity, float) else ""
        parts.append(details(title.rpartition("/")[2][-90:] or title[-90:], note, body + "</div>", is_open=not parts))
    note = "From the least to the most similar. Clusters grow pair by pair, so members may be less alike than one pair."
    html = panel("Near-duplicates: what was kept and what was dropped for it", "".join(parts), note) if parts else ""
    if record.removed_lines:
        rows = [(text[:110], count, f"{count:,}") for text, count in record.removed_lines[:20]]
        html += panel("Lines removed because they repeat across documents", bars(rows, colour="drop"))
    return html


def composition(record: RunRecord) -> str:
    """Languages and sources of the documents that reached the shards."""
    panels = []
    for key, heading in (("languages", "Languages"), ("sources", "Sources, bytes of text")):
        for stage in reversed(record.stages):
            counts = stage.counters.get(key)
            if isinstance(counts, dict) and counts:
                order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:12]
                show = size if key == "sources" else lambda n: f"{n:,.0f}"
                panels.append(panel(heading, bars([(name or "unknown", n, show(n)) for name, n in order])))
                break
    return grid(panels) if panels else ""


def tokens(record: RunRecord) -> str:
    """Shards, document lengths, the vocabulary's longest and most frequent entries."""
    if not record.tokens:
        return ""
    rows = [
        [
            t.name,
            f"{t.num_docs:,}",
            f"{t.num_tokens:,}",
            size(t.text_bytes),
            f"{t.text_bytes / max(t.num_tokens - 2 * t.num_docs, 1):.2f}",
            f"{float(np.median(t.lengths)):,.0f}" if len(t.lengths) else "",
        ]
        for t in record.tokens
    ]
    head = ["shards", "documents", "tokens", "text", "bytes/token", "median length"]
    html = panel("", table(head, rows, numeric=(1, 2, 3, 4, 5)))
    lengths = np.concatenate([t.lengths for t in record.tokens])
    panels = []
    if len(lengths):
        top = max(float(lengths.max()), 16.0)
        edges = [2.0**k for k in range(3, int(np.ceil(np.log2(top))) + 1)]
        counts, _ = np.histogram(np.clip(lengths, edges[0], edges[-1]), bins=edges)
        panels.append(
            panel("Tokens per document", histogram("Tokens per document", edges, counts.tolist(), x_title="tokens"))
        )
    counts = np.sum([_padded(t, max(len(t.counts) for t in record.tokens)) for t in record.tokens], axis=0)
    panels.append(panel("Token frequency by rank", _zipf(counts), "Both axes logarithmic (base 10 of the rank below)."))
    return html + grid(panels) + _vocabulary(record.vocabulary, counts)


def _padded(stats: TokenStats, length: int) -> np.ndarray:
    return np.pad(stats.counts, (0, length - len(stats.counts)))


def _zipf(counts: np.ndarray) -> str:
    order = np.sort(counts[counts > 0])[::-1]
    at = np.unique(np.geomspace(1, max(len(order), 1), 120).astype(np.int64)) - 1
    series = Series(label="occurrences", x=np.log10(at + 1.0).tolist(), y=order[at].astype(float).tolist())
    return line_chart("Token frequency by rank", [series], x_title="log10 rank", is_log_y=True)


def _vocabulary(vocabulary: Sequence[bytes], counts: np.ndarray) -> str:
    if not vocabulary:
        return ""
    longest = sorted(range(len(vocabulary)), key=lambda i: (-len(vocabulary[i]), i))[:36]
    known = counts[: len(vocabulary)]
    frequent = [int(i) for i in np.argsort(-known, kind="stable")[:48] if known[i]]
    last = range(max(len(vocabulary) - 36, 0), len(vocabulary))

    def chips(ids: Sequence[int], note: bool = False) -> str:
        notes = [f" <small>{int(counts[i]):,}</small>" if note else "" for i in ids]
        inner = "".join(
            f'<span class="chip">{escape(visible(vocabulary[i]))}{extra}</span>' for i, extra in zip(ids, notes)
        )
        return f'<div class="chips">{inner}</div>'

    used = int((known > 0).sum())
    return (
        panel(
            "Most frequent tokens",
            chips(frequent, note=True),
            f"{used:,} of {len(vocabulary):,} entries occur in the shards.",
        )
        + panel("Longest tokens", chips(longest))
        + panel("Last merges learned", chips(list(last)))
    )


def visible(token: bytes) -> str:
    """A token's bytes as text: spaces as ␣, line ends as ↵, bytes that are no UTF-8 of their own as hex."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in token)
    text = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    return text if len(text) <= 64 else f"{text[:60]}…×{len(text)}"


def training(record: RunRecord) -> str:
    """Loss, learning rate, gradient norm and throughput over the steps."""
    rows = record.metrics
    if not rows:
        return ""
    steps, losses = finite(rows, "loss")
    bands = _anneal_band(record)
    smooth = smoothed(losses)
    loss = [
        Series(label="each step", x=steps, y=losses, colour="c1", is_faint=True),
        Series(label="running mean", x=steps, y=smooth, colour="c1"),
    ]
    eval_steps, eval_losses = finite(rows, "heldout_loss")
    if eval_steps:
        loss.append(Series(label="held-out", x=eval_steps, y=eval_losses, colour="c2"))
    baseline = record.evaluation.get("unigram_loss")
    level = (float(baseline), "unigram baseline") if isinstance(baseline, float) else None
    panels = [panel("Loss (nats per token)", line_chart("Loss", loss, bands=bands, level=level))]
    for key, heading, note in (
        ("lr", "Learning rate", ""),
        ("grad_norm", "Gradient norm before clipping", ""),
        ("tokens_per_s", "Throughput (tokens per second)", ""),
        ("mfu", "Model FLOPs utilisation", _mfu_note(rows)),
    ):
        x, y = finite(rows, key)
        if not x:
            continue
        series = [Series(label=key, x=x, y=y)]
        if key == "grad_norm":
            series = [
                Series(label="each step", x=x, y=y, colour="c4", is_faint=True),
                Series(label="running mean", x=x, y=smoothed(y), colour="c4"),
            ]
        elif key in ("tokens_per_s", "mfu"):
            series = [Series(label=key, x=x, y=y, colour="c3")]
        zero = key in ("lr", "tokens_per_s", "mfu")
        panels.append(panel(heading, line_chart(heading, series, bands=bands, from_zero=zero), note))
    return grid(panels)


def _anneal_band(record: RunRecord) -> list[tuple[float, float, str]]:
    """The steps of the annealing phase as the configuration has them."""
    train = record.config.get("train") or {}
    steps, anneal = train.get("steps", 0), (train.get("schedule") or {}).get("anneal_steps", 0)
    return [(float(steps - anneal), float(steps), "anneal")] if steps and anneal else []


def _mfu_note(rows: Sequence[dict[str, Any]]) -> str:
    return next((str(row["mfu_convention"]) for row in reversed(rows) if row.get("mfu_convention")), "")


def smoothed(values: Sequence[float], weight: float = 0.1) -> list[float]:
    """Exponential running mean of `values` with the start corrected for its missing past."""
    out, total, share = [], 0.0, 0.0
    for value in values:
        total = total * (1 - weight) + value * weight
        share = share * (1 - weight) + weight
        out.append(total / share)
    return out


def evaluation(record: RunRecord) -> str:
    """Held-out bits per byte against the unigram baseline, overall and by source."""
    found = record.evaluation
    if "bits_per_byte" not in found:
        return ""
    rows = [("unigram baseline", float(found.get("unigram_bits_per_byte", 0.0)))]
    rows += [(str(name), float(value)) for name, value in found.get("models") or [("model", found["bits_per_byte"])]]
    chart = bars([(name, value, f"{value:.3f}") for name, value in rows[:1] if value], colour="base", most=rows[0][1])
    chart += bars([(name, value, f"{value:.3f}") for name, value in rows[1:]], most=max(v for _, v in rows))
    note = str(
        found.get(
            "note", "Lower is better. Bits per byte of held-out text; the baseline knows token frequencies alone."
        )
    )
    html = [panel("Held-out bits per byte", chart, note)]
    by_source = found.get("by_source") or {}
    if by_source:
        cells = [
            [name, f"{v['unigram_bits_per_byte']:.3f}", f"{v['bits_per_byte']:.3f}", f"{int(v['num_tokens']):,}"]
            for name, v in sorted(by_source.items())
        ]
        html.append(
            panel("By source", table(["source", "unigram", "model", "held-out tokens"], cells, numeric=(1, 2, 3)))
        )
    return grid(html)


def samples(record: RunRecord) -> str:
    """Texts that the trained model wrote; the prompt is set apart."""
    blocks = []
    for sample in record.samples:
        prompt, text = str(sample.get("prompt", "")), str(sample.get("text", ""))
        blocks.append(panel("", f'<pre><span class="prompt">{escape(prompt)}</span>{escape(text)}</pre>'))
    told = [f"Temperature {record.samples[0]['temperature']:g}"] if record.samples[0:1] else []
    rate = next((s.counters["tokens_per_s"] for s in record.stages if s.counters.get("tokens_per_s")), 0.0)
    told += [f"{rate:,.0f} tokens/s with the KV cache"] if rate else []
    note = f'<p class="note">The prompt is in colour. {escape(", ".join(told))}.</p>' if told else ""
    return note + grid(blocks) if blocks else ""


def timings(record: RunRecord) -> str:
    """Seconds of every stage, the sum of its tasks."""
    found = dict(record.timings) or {stage.name: stage.seconds for stage in record.stages}
    return panel("", bars([(words(k), v, duration(v)) for k, v in found.items()])) if found else ""


def settings(record: RunRecord) -> str:
    """The resolved configuration and the machine."""
    html = ""
    if record.environment:
        rows = [[str(k), _flat(v)] for k, v in record.environment.items()]
        html += panel("Machine and versions", table(["", ""], rows))
    if record.config:
        rows = [[key, value] for key, value in flatten(record.config)]
        html += panel("", details("Resolved configuration", f"{len(rows)} settings", table(["setting", "value"], rows)))
    return html


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def flatten(config: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, value) of every leaf of a nested configuration, in order."""
    if not isinstance(config, dict):
        return [(prefix, _flat(config))]
    return [leaf for key, value in config.items() for leaf in flatten(value, f"{prefix}.{key}" if prefix else str(key))]
