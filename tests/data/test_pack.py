import json
import os
import pickle
import shutil

import numpy as np
import pytest

from herdkern.data.document import Document, document_id, read_documents, write_documents
from herdkern.data.pack import CorruptShardError, PackConfig, TokenDataset, TokenShard, pack_documents, pack_shard
from herdkern.tokenizer import train_bpe

TEXTS = ["", "x", *(f"the quick brown fox {i} jumps over the lazy dog\n" * (i % 7 + 1) for i in range(60)), "日本 🙂"]
DOCUMENTS = [
    Document(id=document_id(str(i)), text=text, url=f"http://h/{i}", source="web", lang="en", record=f"a.warc.gz#{i}")
    for i, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    tokenizer = train_bpe(TEXTS, 400, special_tokens=("<|begin_of_text|>", "<|end_of_text|>"))
    tokenizer.save(folder / "tokenizer")
    write_documents(folder / "documents.jsonl.zst", DOCUMENTS)
    inputs = [folder / "tokenizer", folder / "documents.jsonl.zst"]
    counters = pack_shard(inputs, folder / "out", PackConfig(shard_tokens=400))
    return folder, tokenizer, counters


def shard_paths(folder):
    return sorted((folder / "out").glob("shard-*"))


def test_counters_and_layout(packed):
    folder, tokenizer, counters = packed
    dataset = TokenDataset(shard_paths(folder))
    assert len(dataset.shards) == counters["shards"] > 3
    assert counters["dropped"] == {"empty": 1}
    assert (dataset.num_tokens, dataset.num_docs) == (counters["tokens"], counters["docs_out"])
    assert dataset.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert (dataset.n_vocab, dataset.bos_id, dataset.eos_id) == (
        tokenizer.n_vocab,
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    assert dataset.shards[0].tokens.dtype == np.uint16
    assert not list((folder / "out").glob("*.tmp"))


def test_documents_decode_to_their_text_with_provenance(packed):
    folder, tokenizer, _ = packed
    dataset = TokenDataset(shard_paths(folder))
    for index, document in enumerate(d for d in DOCUMENTS if d.text):
        tokens, info = dataset.document(index)
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert tokenizer.decode(tokens[1:-1]) == document.text
        assert info["record"] == document.record
        assert info["id"] == document.id


def test_every_window_equals_the_whole(packed):
    folder, _, _ = packed
    dataset = TokenDataset(shard_paths(folder))
    documents = [dataset.document(i)[0] for i in range(dataset.num_docs)]
    whole = np.concatenate(documents)
    borders = np.cumsum([0, *map(len, documents)])
    rng = np.random.default_rng(0)
    cases = [(0, 0), (0, dataset.num_tokens), (dataset.num_tokens, 0), (dataset.num_tokens - 1, 1), (399, 1)]
    for _ in range(300):
        start = int(rng.integers(0, dataset.num_tokens))
        cases.append((start, int(rng.integers(0, dataset.num_tokens - start + 1))))
    for start, length in cases:
        tokens, cu_seqlens = dataset.window(start, length)
        inside = borders[(borders > start) & (borders < start + length)] - start
        assert tokens.dtype == np.int64
        assert cu_seqlens.dtype == np.int32
        assert np.array_equal(tokens, whole[start : start + length])
        assert cu_seqlens.tolist() == sorted({0, *inside.tolist(), length})


def test_locate_finds_the_document_of_every_token(packed):
    folder, _, _ = packed
    dataset = TokenDataset(shard_paths(folder))
    position = 0
    for index in range(dataset.num_docs):
        tokens, info = dataset.document(index)
        for token_index in (position, position + len(tokens) - 1):
            assert dataset.locate(token_index) == (index, info)
        position += len(tokens)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        *(("window", arguments) for arguments in ((-1, 2), (0, 10**9), (0, -1))),
        *(("document", (index,)) for index in (-1, 10**6)),
        *(("locate", (index,)) for index in (-1, 10**9)),
    ],
)
def test_outside_is_refused(packed, method, arguments):
    dataset = TokenDataset(shard_paths(packed[0]))
    with pytest.raises(ValueError, match=r"must (lie inside|be in)"):
        getattr(dataset, method)(*arguments)


def test_same_bytes_again_and_for_any_thread_count(packed, tmp_path):
    folder, _, _ = packed
    inputs = [folder / "documents.jsonl.zst"]
    pack_documents(folder / "tokenizer", inputs, tmp_path, PackConfig(shard_tokens=400, num_threads=3))
    for path in sorted((folder / "out").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(folder / "out")).read_bytes()


def test_large_vocabulary_uses_uint32(packed, tmp_path, monkeypatch):
    folder, tokenizer, _ = packed
    monkeypatch.setattr(type(tokenizer), "n_vocab", property(lambda self: 70_000))
    pack_documents(folder / "tokenizer", [folder / "documents.jsonl.zst"], tmp_path, PackConfig())
    wide, narrow = TokenDataset([tmp_path / "shard-00000"]), TokenDataset(shard_paths(folder))
    assert wide.shards[0].tokens.dtype == np.uint32
    assert np.array_equal(wide.window(0, wide.num_tokens)[0], narrow.window(0, narrow.num_tokens)[0])


def test_pickled_dataset_opens_again(packed):
    dataset = TokenDataset(shard_paths(packed[0]))
    again = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 5000
    assert np.array_equal(again.window(5, 500)[0], dataset.window(5, 500)[0])


def test_no_documents_make_no_shard(packed, tmp_path):
    write_documents(tmp_path / "none.jsonl", [])
    counters = pack_documents(packed[0] / "tokenizer", [tmp_path / "none.jsonl"], tmp_path / "out", PackConfig())
    assert counters["shards"] == 0
    with pytest.raises(ValueError, match="at least one shard"):
        TokenDataset([])


@pytest.fixture
def copied(packed, tmp_path):
    shutil.copytree(packed[0] / "out" / "shard-00001", tmp_path / "shard")
    return tmp_path / "shard"


@pytest.mark.parametrize("name", ["tokens.npy", "cu_seqlens.npy", "documents.jsonl.zst"])
def test_flipped_byte_is_found_by_verify(copied, name):
    TokenDataset([copied]).verify()
    data = bytearray((copied / name).read_bytes())
    data[-5] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(CorruptShardError, match=rf"{name}: corrupt at byte 0") as caught:
        TokenShard(copied).verify()
    assert caught.value.path == copied / name


def test_verify_names_the_block(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("herdkern.data.pack.BLOCK_BYTES", 256)
    folder = packed[0]
    pack_documents(folder / "tokenizer", [folder / "documents.jsonl.zst"], tmp_path, PackConfig())
    path = tmp_path / "shard-00000" / "tokens.npy"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShardError) as caught:
        TokenDataset([tmp_path / "shard-00000"]).verify()
    assert (caught.value.path, caught.value.offset) == (path, 768)


@pytest.mark.parametrize("name", ["tokens.npy", "cu_seqlens.npy", "documents.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "grown", "missing", "empty"])
def test_wrong_size_is_refused_at_opening(copied, name, damage):
    data = (copied / name).read_bytes()
    if damage == "missing":
        (copied / name).unlink()
    else:
        (copied / name).write_bytes({"cut": data[:-3], "grown": data + b"x", "empty": b""}[damage])
    with pytest.raises(CorruptShardError, match=name):
        TokenShard(copied)


@pytest.mark.parametrize(("field", "value"), [("bos_id", 3), ("text_bytes", 0), ("n_vocab", 999)])
def test_edited_manifest_is_refused(copied, field, value):
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, field: value}))
    with pytest.raises(CorruptShardError, match="its own checksum"):
        TokenShard(copied)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": "other"}', '{"format": "herdkern-tokens", "version": 1}']
)
def test_damaged_manifest_is_refused(copied, content):
    (copied / "manifest.json").write_text(content)
    with pytest.raises(CorruptShardError, match=r"manifest\.json"):
        TokenShard(copied)


def test_newer_version_and_no_shard_are_told_apart(copied, tmp_path):
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(ValueError, match="version 1, got 2"):
        TokenShard(copied)
    with pytest.raises(FileNotFoundError, match="must be a token shard"):
        TokenShard(tmp_path)


def test_shards_of_two_tokenizers_are_refused(packed, tmp_path):
    other = train_bpe(TEXTS, 300, special_tokens=("<|begin_of_text|>", "<|end_of_text|>"))
    other.save(tmp_path / "tokenizer")
    pack_documents(tmp_path / "tokenizer", [packed[0] / "documents.jsonl.zst"], tmp_path, PackConfig())
    with pytest.raises(ValueError, match="one tokenizer"):
        TokenDataset([*shard_paths(packed[0]), tmp_path / "shard-00000"])


def test_failure_leaves_no_half_shard(packed, tmp_path):
    write_documents(tmp_path / "good.jsonl", DOCUMENTS)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"te')
    inputs = [tmp_path / "good.jsonl", tmp_path / "bad.jsonl"]
    with pytest.raises(ValueError, match=r"bad\.jsonl.*line 2"):
        pack_documents(packed[0] / "tokenizer", inputs, tmp_path / "out", PackConfig())
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []
    assert len(list(read_documents(tmp_path / "good.jsonl"))) == len(DOCUMENTS)
