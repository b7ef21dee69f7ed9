"""A run folder written by hand: every file that the report reads, with hostile text where text may be hostile."""

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest

from herdkern.data.document import Document, DocumentWriter
from herdkern.engine import write_json_atomic
from herdkern.engine.journal import format_line

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'text' \x00\x1b[31m </pre></div>"


def journal_line(stage: str, task: str, counters: dict, seconds: float) -> bytes:
    entry = {"stage": stage, "task": task, "function": "f", "config_sha256": "", "inputs": [], "outputs": []}
    return format_line({**entry, "counters": counters, "seconds": seconds})


def write_tokens(folder: Path, lengths: list[int], n_vocab: int, seed: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tokens = np.minimum(rng.zipf(1.3, sum(lengths)), n_vocab - 1).astype(np.uint16)
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "cu_seqlens.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    manifest = {"num_tokens": len(tokens), "num_docs": len(lengths), "n_vocab": n_vocab, "text_bytes": 4 * len(tokens)}
    write_json_atomic(folder / "manifest.json", manifest)


def metrics() -> list[dict]:
    rows = []
    for step in range(1, 301):
        anneal = step > 250
        rows.append(
            {
                "step": step,
                "tokens": step * 4096,
                "loss": 3.2 + 5.2 * math.exp(-step / 60) + 0.15 * math.sin(step * 1.7),
                "lr": 3e-3 * min(step / 20, 1) * (1 - (step - 250) / 50 if anneal else 1),
                "grad_norm": 0.6 + 2 * math.exp(-step / 15) + 0.1 * math.cos(step * 3.1),
                "tokens_per_s": 9000 + 500 * math.sin(step),
                "mfu": 0.21 + 0.01 * math.sin(step),
                "mfu_convention": "model FLOPs: 6 N + causal attention inside documents; peak: measured",
                **({"heldout_loss": 3.4 + 5 * math.exp(-step / 60)} if step % 50 == 0 else {}),
            }
        )
    return rows


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run named after a tag, with two data stages, shards, metrics, samples and an evaluation."""
    run = tmp_path / "run"
    stages = [
        ("crawl", {"docs_out": 500, "bytes_out": 21_000_000, "status": {"200": 498, "404": 2}}, 24.0),
        (
            "extract",
            {"docs_in": 500, "docs_out": 470, "bytes_in": 21e6, "bytes_out": 6e6, "dropped": {"no_text": 30}},
            3.1,
        ),
        (
            "filter",
            {
                "docs_in": 470, "docs_out": 400, "bytes_in": 6e6, "bytes_out": 5.1e6,
                "dropped": {"gopher_short": 40, HOSTILE: 30}, "languages": {"en": 396, "de": 4},
                "sources": {"web": 4e6, "code": 1.1e6},
            },
            2.2,
        ),
    ]  # fmt: skip
    for name, _, _ in stages:
        (run / "data" / name / "task-00000").mkdir(parents=True)
    (run / "journal.jsonl").write_bytes(b"".join(journal_line(n, "task-00000", c, s) for n, c, s in stages))
    with DocumentWriter(run / "data/filter/task-00000/dropped.jsonl.zst") as writer:
        for i in range(9):
            document = Document(
                id=f"{i:016x}", text=HOSTILE + " words" * 20 * i, url=f"http://a/{HOSTILE}", meta={"score": 0.25}
            )
            writer.write(document, reason="gopher_short" if i % 2 else HOSTILE)
    pair = {"kept": "one two three four " + HOSTILE, "dropped": "one two 3 four " + HOSTILE, "similarity": 0.93}
    pair |= {"kept_url": "http://a/x.html", "dropped_url": "http://a/" + HOSTILE}
    (run / "pairs.jsonl").write_text(json.dumps(pair) + "\n" + json.dumps(pair) + "\n")
    (run / "removed_lines.jsonl").write_text(json.dumps({"line": HOSTILE, "count": 71}) + "\n")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics()) + '{"step": 301, "lo')
    sample = {"prompt": HOSTILE, "text": " continues " + HOSTILE, "temperature": 0.8}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    evaluation = {
        "bits_per_byte": 1.42,
        "unigram_bits_per_byte": 2.61,
        "unigram_loss": 6.9,
        "num_parameters": 5_012_345,
    }
    evaluation |= {"models": [["pretrained", 1.49], ["annealed", 1.44], ["averaged", 1.42]]}
    evaluation["by_source"] = {"web": {"bits_per_byte": 1.3, "unigram_bits_per_byte": 2.5, "num_tokens": 40_000}}
    write_json_atomic(run / "evaluation.json", evaluation)
    write_json_atomic(
        run / "config.json", {"name": "demo " + HOSTILE, "train": {"steps": 300, "schedule": {"anneal_steps": 50}}}
    )
    write_json_atomic(run / "environment.json", {"herdkern": "0.1.0", "cpu": HOSTILE})
    write_json_atomic(run / "timings.json", {"crawl": 24.0, "extract": 3.1, "pretrain": 131.0})
    write_tokens(run / "tokens/train/shard-00000", [60, 900, 40, 7000, 300], 512, 0)
    write_tokens(run / "tokens/train/shard-00001", [5, 80], 512, 1)
    write_tokens(run / "tokens/heldout/shard-00000", [400, 20], 512, 2)
    (run / "tokenizer").mkdir()
    vocabulary = [bytes([i]) for i in range(256)] + [b"<script>", b" the", b"\n\n", "naïve".encode(), b"\xff\xfe" * 40]
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(vocabulary))
    (run / "tokenizer/tokenizer.model").write_text(lines)
    return run
