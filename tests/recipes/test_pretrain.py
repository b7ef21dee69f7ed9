"""The whole job on tiny settings: what it leaves, that it resumes, that kills change nothing, how it complains."""

import gzip
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from herdkern.data.pack import TokenDataset
from herdkern.engine import read_json


def test_run_leaves_what_it_promises(finished):
    for name in ("config.json", "journal.jsonl", "metrics.jsonl", "environment.json", "timings.json", "report.html"):
        assert (finished / name).stat().st_size > 0
    assert (finished / "tokenizer/tokenizer.json").is_file()
    assert (finished / "hf/model.safetensors").is_file()
    assert (finished / "checkpoints/step-12/model.safetensors").is_file()
    assert not list(finished.rglob("*.tmp"))
    assert read_json(finished / "config.json")["train"]["steps"] == 12


def test_evaluation_counts_model_and_baseline(finished):
    found = read_json(finished / "evaluation.json")
    assert [name for name, _ in found["models"]] == ["last step", "averaged"]
    assert 0 < found["bits_per_byte"] < 9
    assert 0 < found["unigram_bits_per_byte"] < 9
    assert found["bits_per_byte"] == found["models"][-1][1]


def test_heldout_documents_are_in_no_training_shard(finished):
    def ids(split: str) -> set[str]:
        folders = (finished / "tokens" / split).iterdir()
        sets = [TokenDataset(sorted(folder.glob("shard-*"))) for folder in folders]
        return {dataset.document(i)[1]["id"] for dataset in sets for i in range(dataset.num_docs)}

    train, heldout = ids("train"), ids("heldout")
    assert train
    assert heldout
    assert not train & heldout


def test_every_token_leads_back_to_its_record(finished, pages):
    dataset = TokenDataset(sorted((finished / "tokens/train/web").glob("shard-*")))
    dataset.verify()
    for token in np.linspace(0, dataset.num_tokens - 1, 7).astype(int):
        _, info = dataset.locate(int(token))
        assert (pages.parent / info["record"].partition("#")[0]).is_file()


def test_near_duplicate_is_dropped_and_shown(finished):
    report = (finished / "report.html").read_text(encoding="utf-8")
    assert "near duplicate" in report
    for anchor in ("summary", "evaluation", "samples", "training", "funnel", "dropped", "duplicates", "tokens"):
        assert f'<h2 id="{anchor}">' in report


def test_second_run_says_that_everything_is_done(runs, finished, pages):
    before = runs.fingerprint(finished)
    done = runs.run(runs.arguments(finished, pages))
    assert done.returncode == 0, done.stderr
    assert "everything was done before" in done.stdout
    assert done.stdout.count("done before") >= 14
    assert runs.fingerprint(finished) == before


def test_changed_setting_is_named_and_redoes_only_what_follows(runs, finished, pages, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    done = runs.run(runs.arguments(out, pages, samples__max_new_tokens=5))
    assert "changed since the last run: samples.max_new_tokens: 8 -> 5" in done.stdout
    lines = {line.split("]")[1].split()[0]: line for line in done.stdout.splitlines() if line.startswith("[")}
    assert all("done before" in lines[name] for name in ("extract", "filter", "tokenizer", "pack", "train"))
    assert "done before" not in lines["samples"]


def test_changed_training_sets_the_old_checkpoints_aside(runs, finished, pages, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    done = runs.run(runs.arguments(out, pages, train__steps=8))
    assert "identity.steps: 12 -> 8" in done.stdout
    assert (out / "checkpoints.old/step-12").is_dir()
    assert (out / "checkpoints/step-8").is_dir()
    assert read_json(out / "evaluation.json") != read_json(finished / "evaluation.json")


def test_any_kind_of_input_runs(runs, finished, pages, tmp_path):
    """The same recipe on JSON lines, gzipped text and HTML together, broken lines among them."""
    texts = [(pages / f"{name}.html").read_text() for name in ("json", "shlex")]
    lines = [json.dumps({"text": f"{text[:4000]}", "url": f"http://a.test/{i}"}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{broken", '{"no": "text"}']) + "\n")
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write(Path(random.__file__).read_text())
    inputs = (tmp_path / "a.jsonl", tmp_path / "b.txt.gz", pages / "string.html", pages / "calendar.html")
    done = runs.run(runs.arguments(tmp_path / "run", *inputs, train__steps=4, train__schedule__anneal_steps=0))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "invalid json 1" in done.stdout


def test_too_little_text_is_said_plainly(runs, tmp_path):
    (tmp_path / "a.txt").write_text("Far too little to learn anything from.\n")
    done = runs.run(runs.arguments(tmp_path / "run", tmp_path / "a.txt"))
    assert done.returncode == 1
    assert "run_recipe: the train documents must be at least one" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_with_other_files_is_not_touched(runs, tmp_path, pages):
    (tmp_path / "mine.txt").write_text("keep me")
    done = runs.run(runs.arguments(tmp_path, pages))
    assert done.returncode == 1
    assert "must be new, empty or that of an earlier run" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(runs: Any, words: list[str], watched: Path, num_lines: int, seconds: float) -> bool:
    """Start the run and kill -9 it `seconds` after `watched` grew by num_lines lines; False if it had ended."""
    target = count_lines(watched) + num_lines
    with open(os.devnull, "w") as quiet:
        process = runs.start(words, stdout=quiet, stderr=quiet)
        while process.poll() is None and count_lines(watched) < target:
            time.sleep(0.002)
        time.sleep(seconds)
        was_running = process.poll() is None
        if was_running:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return was_running


def run_with_kills(runs: Any, pages: Path, out: Path, *, in_data: int, in_training: int, seed: int) -> None:
    """A run that is killed so often while it works on data, then so often while it trains, then left to finish."""
    rng = random.Random(seed)
    words = runs.arguments(out, pages)
    killed = 0
    while killed < in_data:
        if (out / "checkpoints").exists():  # past the data: once more from the beginning
            shutil.rmtree(out)
        killed += kill_after(
            runs, words, out / "journal.jsonl", rng.randint(0, 2), rng.random() * (0.6 if killed < 2 else 0.1)
        )
    killed = 0
    while killed < in_training:
        if (out / "checkpoints/step-12").exists():  # trained to the end: training once more
            shutil.rmtree(out / "checkpoints")
            (out / "metrics.jsonl").unlink()
        killed += kill_after(runs, words, out / "metrics.jsonl", rng.randint(0, 3), rng.random() * 0.2)
    done = runs.run(words)
    assert done.returncode == 0, done.stdout + done.stderr


def test_killed_run_ends_as_an_undisturbed_one(runs, finished, pages, tmp_path):
    run_with_kills(runs, pages, tmp_path / "run", in_data=3, in_training=2, seed=1)
    assert runs.fingerprint(tmp_path / "run") == runs.fingerprint(finished)


@pytest.mark.full
def test_often_killed_run_ends_as_an_undisturbed_one(runs, finished, pages, tmp_path):
    run_with_kills(runs, pages, tmp_path / "run", in_data=20, in_training=10, seed=2)
    assert runs.fingerprint(tmp_path / "run") == runs.fingerprint(finished)
