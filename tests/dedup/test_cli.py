"""`herdkern dedup ACTION` on real files: every kind of input, resuming, errors with a remedy and their exit status."""

import gzip
import json
import os
import random
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from herdkern import cli
from herdkern.data.document import Document, read_documents, write_documents
from herdkern.data.warc import WarcWriter
from herdkern.dedup.cli import ACTIONS

LINE = "Copyright of everybody, all rights reserved"


def library_documents(count=30):
    """Files of the standard library: pages with older versions, near-copies, exact copies and a line on all of them."""
    rng = random.Random(1)
    documents = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:count]:
        text = f"{path.read_text(encoding='utf-8')[:6000]}\n{LINE}"
        url = f"http://docs.example/{path.stem}"
        documents.append(Document(id=f"{rng.getrandbits(64):016x}", text=text, url=url, timestamp=5))
        if rng.random() < 0.3:
            documents.append(
                Document(id=f"{rng.getrandbits(64):016x}", text="old\n" + text, url=url + "#a", timestamp=3)
            )
        if rng.random() < 0.3:
            near = text.replace(" the ", " teh ", 2)
            documents.append(Document(id=f"{rng.getrandbits(64):016x}", text=near, url=url + "/near", timestamp=2))
        if rng.random() < 0.3:
            documents.append(Document(id=f"{rng.getrandbits(64):016x}", text=text, url=url + "/copy", timestamp=1))
    rng.shuffle(documents)
    return documents


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    documents = library_documents()
    write_documents(folder / "a.jsonl.zst", documents[::3])
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as f:
        f.writelines(document.to_json() + "\n" for document in documents[1::3])
    write_documents(folder / "c.jsonl", documents[2::3])
    return folder


def call(capsys, *arguments):
    """(exit status, the kept documents' files, what stderr said)."""
    capsys.readouterr()
    status = cli.main(["dedup", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, [Path(line) for line in out.splitlines()], err


def documents_of(files):
    return [document for path in files for document in read_documents(path)]


def herdkern(*arguments):
    command = [sys.executable, "-m", "herdkern", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})


def test_help_names_every_action(capsys):
    status, _, _ = call(capsys, "--help")
    assert status == 0
    cli.main(["dedup", "--help"])
    out = capsys.readouterr().out
    assert "usage: herdkern dedup" in out
    assert all(f"\n  {action} " in out for action in ACTIONS)


@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_every_action_has_help(action, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["dedup", action, "--help"])
    assert end.value.code == 0
    assert f"usage: herdkern dedup {action}" in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    code = "import herdkern.cli, sys; herdkern.cli.main(['dedup', '--help'])\n"
    code += "print([m for m in ('torch', 'pyarrow', 'tyro', 'scipy', 'faiss') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_url_keeps_the_newest(inputs, tmp_path, capsys):
    status, files, err = call(capsys, "url", inputs, "--out", tmp_path / "run", "--executor", "serial")
    assert status == 0
    kept = documents_of(files)
    urls = [d.url.partition("#")[0] for d in kept]
    assert len(urls) == len(set(urls))
    assert "duplicate url" in err
    assert len(files) == 3
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("executor", ["serial", "threads"])
def test_exact_with_every_executor(inputs, tmp_path, capsys, executor):
    arguments = ("exact", inputs, "--out", tmp_path / "run", "--executor", executor, "--workers", 2)
    status, files, _ = call(capsys, *arguments)
    assert status == 0
    texts = [d.text for d in documents_of(files)]
    every = [d.text for d in documents_of(sorted(inputs.iterdir()))]
    assert sorted(texts) == sorted(set(every))
    assert len(texts) < len(every)


def test_minhash_takes_a_preset_and_prints_its_curve(inputs, tmp_path, capsys):
    arguments = ("minhash", inputs, "--out", tmp_path / "run", "--executor", "serial", "--preset", "fineweb")
    status, files, err = call(capsys, *arguments, "--keep", "longest")
    assert status == 0
    assert "14 bands x 8 rows" in err
    config = json.loads((tmp_path / "run" / "config.json").read_text())["steps"]["dedup_minhash"]
    assert (config["num_bands"], config["rows_per_band"], config["keep"]) == (14, 8, "longest")
    assert len(documents_of(files)) < len(documents_of(sorted(inputs.iterdir())))


def test_lines_removes_the_line_of_all_pages(inputs, tmp_path, capsys):
    status, files, err = call(capsys, "lines", inputs, "--out", tmp_path / "run", "--executor", "serial")
    assert status == 0
    assert "lines removed" in err
    assert not [d for d in documents_of(files) if LINE in d.text]


@pytest.mark.parametrize("spelling", [["all"], []], ids=["all", "old"])
def test_all_three_in_a_row(inputs, tmp_path, capsys, spelling):
    arguments = (*spelling, inputs, "--out", tmp_path / "run", "--executor", "serial", "--min-similarity", 0.8)
    status, files, err = call(capsys, *arguments)
    assert status == 0
    steps = [line[:20].split("]")[1].strip() for line in err.splitlines() if line.startswith("[")]
    assert steps == ["dedup urls", "dedup minhash", "dedup lines"]
    texts = [d.text for d in documents_of(files)]
    assert len(texts) == len(set(texts))
    status, again, err = call(capsys, *arguments)
    assert (status, again) == (0, files)
    assert err.count("done before") == 3


def test_old_options_still_skip(inputs, tmp_path, capsys):
    arguments = (inputs, "--out", tmp_path / "run", "--skip-documents", "--skip-lines", "--executor", "serial")
    status, _, err = call(capsys, *arguments)
    assert status == 0
    assert "dedup urls" in err
    assert "dedup minhash" not in err


def test_parquet_in_and_out(inputs, tmp_path, capsys):
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    arguments = ("--executor", "serial", "--format", "parquet")
    _, plain, _ = call(capsys, "exact", inputs, "--out", tmp_path / "a", "--executor", "serial")
    _, files, _ = call(capsys, "exact", inputs, "--out", tmp_path / "b", *arguments)
    assert {path.name for path in files} == {"documents.parquet"}
    assert [(d.id, d.text, d.timestamp) for d in documents_of(files)] == [
        (d.id, d.text, d.timestamp) for d in documents_of(plain)
    ]
    status, again, _ = call(capsys, "minhash", *files, "--out", tmp_path / "c", *arguments)
    assert status == 0
    assert 0 < len(documents_of(again)) < len(documents_of(files))


def test_warc_is_extracted_first(tmp_path, capsys):
    body = "".join(f"<p>{'A sentence that says something about the page it stands on. ' * 4}{i}</p>" for i in range(5))
    page = f"<html><body><article>{body}</article></body></html>".encode()
    response = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + page
    with WarcWriter(tmp_path / "crawl.warc.gz", date="2024-01-01T00:00:00Z", software="test") as writer:
        for url in ("http://a.example/1", "http://a.example/2", "http://a.example/1#again"):
            writer.write_page(url, b"GET / HTTP/1.1\r\n\r\n", response, [])
    write_documents(
        tmp_path / "more.jsonl", [Document(id="0" * 16, text="quite another text", url="http://b.example/")]
    )
    inputs = (tmp_path / "crawl.warc.gz", tmp_path / "more.jsonl")
    status, files, err = call(capsys, "url", *inputs, "--out", tmp_path / "run", "--executor", "serial")
    assert status == 0
    assert [d.url.partition("#")[0] for d in documents_of(files)].count("http://a.example/1") == 1
    assert len(documents_of(files)) == 3
    assert "[1/2] extract" in err


def test_add_drops_what_the_index_has(inputs, tmp_path, capsys):
    files = sorted(inputs.iterdir())
    index = tmp_path / "index"
    options = ("--executor", "serial", "--keep", "smallest_id")
    saved = ("minhash", files[0], "--out", tmp_path / "first", "--save-index", index, *options)
    assert call(capsys, *saved)[0] == 0
    assert call(capsys, *saved)[0] == 0  # the same command again
    status, _, err = call(capsys, "minhash", files[0], "--out", tmp_path / "other", "--save-index", index, *options)
    assert status == 1
    assert str(index) in err
    command = ("add", *files, "--out", tmp_path / "second", "--index", index, "--executor", "serial")
    status, kept, _ = call(capsys, *command)
    assert status == 0
    ids = [d.id for d in documents_of(kept)]
    assert not set(ids) & {d.id for d in documents_of(files[:1])}  # all of it is in the index
    assert ids
    status, again, err = call(capsys, *command)  # adding once more would drop everything
    assert (status, again) == (0, kept)
    assert "done before" in err
    third = ("add", *files, "--out", tmp_path / "third", "--index", index, "--executor", "serial")
    assert documents_of(call(capsys, *third)[1]) == []


def test_add_without_an_index_is_status_1(inputs, tmp_path, capsys):
    status, _, err = call(capsys, "add", inputs, "--out", tmp_path / "run", "--index", tmp_path / "none")
    assert status == 1
    assert "none" in err


def test_semantic_reads_a_file_of_embeddings(tmp_path, capsys):
    documents = [Document(id=f"{i:016x}", text=f"text {i}") for i in range(8)]
    write_documents(tmp_path / "in.jsonl", documents)
    np.save(tmp_path / "in.npy", np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1, 2, 3]])
    arguments = ("semantic", tmp_path / "in.jsonl", "--embeddings", tmp_path / "in.npy", "--keep", "smallest_id")
    status, files, _ = call(capsys, *arguments, "--out", tmp_path / "run", "--executor", "serial")
    assert status == 0
    assert [d.id for d in documents_of(files)] == [f"{i:016x}" for i in range(4)]


def test_duplicates_only_if_wanted(inputs, tmp_path, capsys):
    for flag, wanted in (("--write-duplicates", True), ("--no-write-duplicates", False)):
        call(capsys, "exact", inputs, "--out", tmp_path / flag, "--executor", "serial", flag)
        assert bool(list((tmp_path / flag).rglob("dropped.jsonl.zst"))) == wanted


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["exakt", "x.jsonl"], "did you mean 'exact'?"),
        (["url", "--out", "run"], "inputs must have at least one file or folder, got none"),
        (["minhash", "in", "--out", "run", "--max-memory", "lots"], "must be a size as 200MB or 4GiB, got 'lots'"),
        (["minhash", "in", "--out", "run", "--max-memory", "100MB"], "at least 128 MiB for each of"),
        (["exact", "in", "--out", "run", "--workers", "-2"], "workers must be at least 0, got -2"),
        (["all", "in", "--out", "run", "--skip-urls", "--skip-documents", "--skip-lines"], "all are skipped"),
    ],
)
def test_a_wrong_command_line_is_status_2(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    write_documents(tmp_path / "in" / "a.jsonl", [])
    status, _, err = call(capsys, *arguments)
    assert status == 2
    assert said in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [["--executer", "serial"], ["--executor", "cluster"], ["--workers", "many"]])
def test_a_wrong_option_is_named(inputs, tmp_path, capsys, option):
    with pytest.raises(SystemExit) as end:
        cli.main(["dedup", "exact", str(inputs), "--out", str(tmp_path / "run"), *option])
    assert end.value.code == 2
    assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "bad.jsonl, line 2"),
        ("bad.jsonl.zst", b"\x28\xb5\x2f\xfd cut", "bad.jsonl.zst"),
        ("none.bin", b"", "none.bin must end in"),
    ],
)
def test_bad_input_is_status_1_and_named(name, content, said, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    status, _, err = call(capsys, "exact", tmp_path / name, "--out", tmp_path / "run", "--executor", "serial")
    assert status == 1
    assert said in err
    assert "Traceback" not in err


def test_no_such_input_is_status_1(tmp_path, capsys):
    status, _, err = call(capsys, "exact", tmp_path / "none.jsonl", "--out", tmp_path / "run")
    assert status == 1
    assert "none.jsonl must be a file or folder, there is none" in err


def test_report_of_no_run_is_status_1(tmp_path, capsys):
    status, _, err = call(capsys, "report", tmp_path)
    assert status == 1
    assert "must be a run folder" in err


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def check_kills(inputs, folder, kills, seed):
    command = [sys.executable, "-m", "herdkern", "dedup", "all", str(inputs), "--executor", "threads", "--out"]
    started = time.monotonic()
    subprocess.run([*command, str(folder / "calm")], check=True, capture_output=True)
    longest = time.monotonic() - started
    wanted = tree(folder / "calm" / "data")
    rng = random.Random(seed)
    done = 0
    while done < kills:
        out = folder / f"killed-{done}"
        while True:
            process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            try:
                _, error = process.communicate(timeout=rng.uniform(0.3, longest))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                done += 1
                continue
            assert process.returncode == 0, error
            break
        assert tree(out / "data") == wanted


def test_the_same_command_goes_on_after_a_kill(inputs, tmp_path):
    check_kills(inputs, tmp_path, 1, seed=1)


@pytest.mark.full
def test_the_same_command_goes_on_after_many_kills(inputs, tmp_path):
    check_kills(inputs, tmp_path, 30, seed=2)


def test_processes_work_from_the_command(inputs, tmp_path):
    done = herdkern("dedup", "exact", inputs, "--out", tmp_path / "run", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
