"""The passport: what it says of each format, as text, JSON and a picture, and from the command line."""

import json
import re
from xml.etree import ElementTree

import pytest

from herdkern import cli
from herdkern.tokenizer import Tokenizer, train_bpe
from herdkern.tokenizer.formats import files, sentencepiece_file, tekken
from herdkern.tokenizer.formats.samples import SAMPLES
from herdkern.tokenizer.formats.sentencepiece_file import ModelFile, Piece, PieceType, Settings
from herdkern.tokenizer.inspect import inspect

BYTES = {bytes([b]): b for b in range(256)}


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("passport") / "tokenizer"
    trained.save(path, verify=False)
    return path


@pytest.mark.parametrize("name", ["", "tokenizer.json", "herdkern_tokenizer.json"])
def test_a_folder_of_ours(trained, folder, name):
    passport = inspect(folder / name)
    assert passport.model == "byte-level BPE"
    assert passport.split_pattern == "llama3"
    assert passport.n_vocab == trained.n_vocab
    assert passport.num_tokens == len(trained.mergeable_ranks)
    assert passport.num_merges == len(trained.mergeable_ranks) - 256
    assert passport.special_tokens == trained.special_tokens
    assert passport.skipped == ()
    assert set(passport.compression) == set(SAMPLES)
    english = passport.compression["English"]
    assert english.tokens == len(trained.encode_ordinary(SAMPLES["English"]))
    assert english.bytes_per_token == len(SAMPLES["English"]) / english.tokens
    assert sum(passport.lengths.values()) == passport.num_tokens
    assert passport.lengths[1] == 256


def test_first_merges_are_the_first(tmp_path):
    tokenizer = train_bpe(["aaab " * 30], 275)
    tokenizer.save(tmp_path, verify=False)
    token_of = {i: t.decode() for t, i in tokenizer.mergeable_ranks.items() if t.isascii()}
    first = inspect(tmp_path).first_merges[0]
    left, right = (part.strip("'") for part in first.split(" + "))
    assert left + right == token_of[256]


def test_ranks_without_a_pattern_have_no_compression(trained, tmp_path):
    trained.save(tmp_path / "ranks", format="tiktoken", verify=False)
    passport = inspect(tmp_path / "ranks")
    assert (passport.split_pattern, passport.compression) == ("not named by the file", {})
    assert inspect(tmp_path / "ranks", split_pattern="llama3").compression["Greek"].tokens > 0


def test_a_vocabulary_that_begins_as_a_published_one(cl100k_ranks, tmp_path):
    ranks = cl100k_ranks | {b"no such token": 100256}
    Tokenizer(ranks, {}).save(tmp_path / "ranks", format="tiktoken", verify=False)
    passport = inspect(tmp_path / "ranks")
    assert passport.name == "begins with the 100,256 ranks of cl100k_base"
    assert [(token, i) for token, i, _ in passport.skipped] == [("no such token", 100256)]
    assert "not two" in passport.skipped[0][2]


def test_tekken(tmp_path):
    Tokenizer(*tekken.renumbered(BYTES | {b"ab": 256}, {"<s>": 9})).save(tmp_path / "t", format="tekken", verify=False)
    passport = inspect(tmp_path / "t")
    assert (passport.format, passport.num_merges, passport.special_tokens) == ("tekken", 1, {"<s>": 0})


def small_model() -> ModelFile:
    texts = ("▁t", "he", "▁the", *"the▁r.")
    pieces = [Piece("<unk>", 0.0, PieceType.UNKNOWN), *(Piece(t, -float(i)) for i, t in enumerate(texts))]
    return ModelFile(pieces=tuple(pieces), settings=Settings(normalizer="identity"))


def test_sentencepiece(tmp_path):
    (tmp_path / "a.model").write_bytes(sentencepiece_file.to_bytes(small_model()))
    passport = inspect(tmp_path / "a.model")
    assert passport.model == "SentencePiece BPE over characters (1 unknown, 9 normal)"
    assert passport.first_merges == ("'▁' + 't'", "'h' + 'e'", "'▁t' + 'he'")
    assert "add_dummy_prefix" in passport.normalizer
    assert passport.compression["English"].tokens > 10


def test_tokenizer_json_over_characters(tmp_path):
    merges = [["▁", "t"], ["h", "e"], ["▁t", "he"], ["▁", "the"], ["t", "he"]]
    names = ["<unk>", *"▁the", "▁t", "he", "the", "▁the"]
    model = {"type": "BPE", "byte_fallback": True, "vocab": {n: i for i, n in enumerate(names)}, "merges": merges}
    content = {"model": model, "added_tokens": [{"id": 0, "content": "<unk>"}], "normalizer": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    passport = inspect(tmp_path)
    assert (passport.num_listed, passport.num_merges) == (5, 4)
    assert passport.model == "BPE over characters, converted from SentencePiece"
    assert "4 of 5 listed" in passport.as_text()


def test_own_samples(folder, trained, tmp_path):
    (tmp_path / "Klingon.txt").write_text("nuqneH " * 10)
    (tmp_path / "cut.txt").write_bytes("Grüße".encode()[:3])
    passport = inspect(folder, samples=tmp_path)
    assert list(passport.compression) == ["Klingon", "cut"]
    assert passport.compression["Klingon"].characters == 70
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="samples must be a folder with text files"):
        inspect(folder, samples=tmp_path / "empty")


def test_json_and_picture(folder):
    passport = inspect(folder)
    content = json.loads(passport.as_json())
    assert content["compression"]["Thai"]["bytes_per_token"] > 0
    assert content["first_merges"] == list(passport.first_merges)
    root = ElementTree.fromstring(passport.as_svg())
    assert len(root.findall("{http://www.w3.org/2000/svg}rect")) == 1 + len(SAMPLES) + 16


def test_command_line(folder, tmp_path, capsys):
    arguments = [str(folder), "--json", str(tmp_path / "p.json"), "--picture", str(tmp_path / "p.svg")]
    assert cli.main(["tokenizer", "inspect", *arguments]) == 0
    assert re.search(r"pattern +llama3\n", capsys.readouterr().out)
    assert json.loads((tmp_path / "p.json").read_text())["format"] == "herdkern"
    assert (tmp_path / "p.svg").read_text().startswith("<svg")


def test_export_from_the_command_line(folder, trained, tmp_path, capsys):
    out = tmp_path / "ranks.tiktoken"
    assert cli.main(["tokenizer", "export", str(folder), "--out", str(out), "--format", "tiktoken"]) == 0
    assert files.format_of(out) == "tiktoken"
    again = tmp_path / "folder"
    assert (
        cli.main(["tokenizer", "export", str(folder), "--out", str(again), "--format", "herdkern", "--skip-check"]) == 0
    )
    assert Tokenizer.load(again) == trained
    assert cli.main(["tokenizer", "export", str(folder), "--out", str(tmp_path / "x"), "--format", "tekken"]) == 1
    assert "must begin with the single bytes" in capsys.readouterr().err


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\x00\x01")
    with pytest.raises(ValueError, match="must be a folder with a tokenizer"):
        inspect(tmp_path / "x")
