"""A recipe small enough for tests: a few real pages of this Python's documentation, a nano model, a few steps."""

import hashlib
import json
import os
import pydoc
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from herdkern.data.document import Document, DocumentWriter
from herdkern.data.pack import PackConfig, pack_documents
from herdkern.recipes.data_stages import VocabularyConfig, learn_vocabulary

PAGES = ("json", "textwrap", "statistics", "shlex", "string", "random", "calendar", "fractions", "bisect", "heapq")
SETTINGS = {
    "tokenizer.vocab-size": 512,
    "data.num-workers": 1,
    "data.heldout-share": 0.2,
    "data.filter.rules": "gopher_quality",
    "model.dim": 32,
    "model.num-layers": 2,
    "model.num-heads": 2,
    "model.num-kv-heads": 1,
    "model.head-dim": 16,
    "model.ffn-dim": 64,
    "train.steps": 12,
    "train.seq-len": 64,
    "train.batch-size": 4,
    "train.average-every-steps": 1,
    "train.eval-every-steps": 6,
    "train.schedule.anneal-steps": 4,
    "train.schedule.warmup-steps": 2,
    "train.checkpoint.every-steps": 3,
    "samples.max-new-tokens": 8,
}
UNTIMED = ("journal.jsonl", "timings.json", "metrics.jsonl", "environment.json", "report.html", ".lock", "train.lock")


def arguments(out: Path, *inputs: Path, **changed: object) -> list[str]:
    """The command line of a tiny run; `train__steps=5` changes --train.steps."""
    settings = SETTINGS | {name.replace("__", ".").replace("_", "-"): value for name, value in changed.items()}
    words = ["run", "demo", "--out", str(out)]
    if inputs:
        words += ["--data.inputs", *map(str, inputs)]
    for name, value in settings.items():
        words += [f"--{name}", *str(value).split()]
    return words


def start(words: list[str], **options: object) -> subprocess.Popen:
    """The command in a process group of its own, on one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [sys.executable, "-m", "herdkern.cli", *words]
    return subprocess.Popen(command, env=env, start_new_session=True, text=True, **options)


def run(words: list[str]) -> subprocess.CompletedProcess:
    """The command to its end."""
    with start(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def fingerprint(run_dir: Path) -> dict[str, str]:
    """SHA-256 of every file that must not depend on when and how a run was stopped, and the untimed part of metrics."""
    found = {
        str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run_dir.rglob("*"))
        if path.is_file() and path.name not in UNTIMED and path.parent.name != "heartbeat"
    }
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "seconds", "tokens_per_s", "mfu", "mfu_convention")
    found["metrics"] = json.dumps([{k: v for k, v in row.items() if k not in timed} for row in rows])
    return found


@pytest.fixture(scope="session")
def runs() -> SimpleNamespace:
    """The functions above, for the tests."""
    return SimpleNamespace(arguments=arguments, start=start, run=run, fingerprint=fingerprint)


@pytest.fixture(scope="session")
def pages(tmp_path_factory) -> Path:
    """A folder of real HTML pages: the documentation of some modules, one of them twice."""
    folder = tmp_path_factory.mktemp("pages")
    for name in PAGES:
        body = pydoc.html.document(pydoc.locate(name, forceload=0), name)
        (folder / f"{name}.html").write_text(pydoc.html.page(name, body), encoding="utf-8")
    (folder / "zz-copy.html").write_text((folder / "random.html").read_text().replace("uniform", "flat", 3))
    return folder


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> Path:
    """A folder with tokens/ and tokenizer/ as an undisturbed run leaves them, of the same documentation as text."""
    out = tmp_path_factory.mktemp("packed")
    for split, names in (("train", PAGES[2:]), ("heldout", PAGES[:1])):
        path = out / f"{split}.jsonl.zst"
        with DocumentWriter(path) as writer:
            for name in names:
                text = pydoc.plaintext.document(pydoc.locate(name, forceload=0), name)
                text = text if split == "train" else text[:4000]  # a few dozen windows
                writer.write(Document(id=name, text=text, source="web"))
        if split == "train":
            learn_vocabulary([path], out, VocabularyConfig(vocab_size=512, max_text_bytes=1 << 20))
        pack_documents(out / "tokenizer", [path], out / "tokens" / split / "web", PackConfig())
    return out


@pytest.fixture(scope="session")
def finished(tmp_path_factory, pages) -> Path:
    """An undisturbed run over `pages`."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = run(arguments(out, pages))
    assert done.returncode == 0, done.stdout + done.stderr
    return out
