"""Files: what we write reads the same in tiktoken and Hugging Face, and damaged files are refused."""

import json
import random

import pytest

from herdkern.tokenizer import LLAMA3_SPLIT_PATTERN, Tokenizer
from herdkern.tokenizer.export import (
    byte_level_alphabet,
    from_byte_level,
    merge_list,
    read_tiktoken,
    to_byte_level,
    write_tiktoken,
)
from herdkern.tokenizer.formats.huggingface import read as read_huggingface

BYTES = {bytes([b]): b for b in range(256)}


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "tokenizer"
    trained.save(path)
    return path


def test_folder_comes_back(trained, folder):
    assert Tokenizer.load(folder) == trained
    assert Tokenizer.load(folder / "tokenizer.json") == trained
    assert sorted(p.name for p in folder.iterdir()) == [
        "herdkern_tokenizer.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


def test_saving_twice_gives_the_same_bytes(trained, folder, tmp_path):
    Tokenizer.load(folder).save(str(tmp_path))
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_tiktoken_reads_the_model_file(trained, folder):
    load = pytest.importorskip("tiktoken.load")
    assert load.load_tiktoken_bpe(str(folder / "tokenizer.model")) == trained.mergeable_ranks
    assert read_tiktoken(folder / "tokenizer.model") == trained.mergeable_ranks
    assert Tokenizer.from_tiktoken(folder / "tokenizer.model", list(trained.special_tokens)) == trained


def huggingface_ids(path, texts):
    tokenizers = pytest.importorskip("tokenizers")
    encodings = tokenizers.Tokenizer.from_file(str(path)).encode_batch(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def test_hugging_face_gives_the_same_ids(trained, folder, small_texts):
    texts = small_texts[:40]
    assert huggingface_ids(folder / "tokenizer.json", texts) == trained.encode_ordinary_batch(texts)


def test_hugging_face_gives_the_same_ids_cl100k(cl100k_ranks, small_texts, tmp_path):
    tokenizer = Tokenizer(cl100k_ranks, {"<|endoftext|>": 100257})
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["ignore_merges"] is False
    texts = small_texts[:40]
    assert huggingface_ids(tmp_path / "tokenizer.json", texts) == tokenizer.encode_ordinary_batch(texts)
    assert Tokenizer.load(tmp_path) == tokenizer == Tokenizer.load(tmp_path / "tokenizer.json")


def test_hugging_face_decodes_and_knows_special_tokens(trained, folder):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Grüße <|eot_id|>\n  日本 <|begin_of_text|>"
    ids = trained.encode(text, allowed_special="all")
    assert theirs.encode(text).ids == [trained.bos_id, *ids]
    assert theirs.decode(ids, skip_special_tokens=False) == text == trained.decode(ids)


def test_transformers_opens_the_folder(trained, folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert theirs("Hello  world 123")["input_ids"] == [trained.bos_id, *trained.encode("Hello  world 123")]
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (trained.bos_id, trained.eos_id, trained.n_vocab)


def test_tokens_that_no_merge_makes(tmp_path):
    """Published vocabularies hold such tokens: they are reached as whole words, and by late merges."""
    extra = [b"ab", b"cd", b"abcd", b"bcab", b"abc", b"aaab", b"aa", b"abcab", b"bca"]
    tokenizer = Tokenizer({**BYTES, **{token: 256 + i for i, token in enumerate(extra)}}, {})
    merges, has_others = merge_list(tokenizer.mergeable_ranks)
    assert has_others
    assert (97, 98) in merges
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["ignore_merges"] is True
    rng = random.Random(5)
    texts = ["".join(rng.choices("abcd", k=rng.randrange(1, 12))) for _ in range(3000)]
    assert huggingface_ids(tmp_path / "tokenizer.json", texts) == tokenizer.encode_ordinary_batch(texts)
    assert Tokenizer.load(tmp_path / "tokenizer.json") == tokenizer


def test_special_tokens_first_as_hugging_face_trains_them(tmp_path, small_texts):
    """Their trainer gives special tokens the lowest ids and keeps them in the vocabulary."""
    tokenizers = pytest.importorskip("tokenizers")
    split = tokenizers.pre_tokenizers
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = split.Sequence(
        [
            split.Split(tokenizers.Regex(LLAMA3_SPLIT_PATTERN), "isolated"),
            split.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    theirs.train_from_iterator(
        small_texts[:60],
        tokenizers.trainers.BpeTrainer(
            vocab_size=1500,
            initial_alphabet=split.ByteLevel.alphabet(),
            special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
            show_progress=False,
        ),
    )
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.n_vocab) == (0, 1, 1500)
    assert huggingface_ids(tmp_path / "tokenizer.json", small_texts[60:80]) == ours.encode_ordinary_batch(
        small_texts[60:80]
    )


def test_byte_level_alphabet():
    assert len(set(byte_level_alphabet().values())) == 256
    assert to_byte_level(b" a\n\xc3\xa9") == "ĠaĊÃ©"
    assert from_byte_level("ĠaĊÃ©") == b" a\n\xc3\xa9"
    assert from_byte_level("<|日|>") is None
    tokenizers = pytest.importorskip("tokenizers")
    assert set(byte_level_alphabet().values()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"YQ==", "must be '<base64 token> <rank>', got b'YQ=='"),
        (b"YQ== 7 8", "must be '<base64 token> <rank>'"),
        (b"YQ== seven", "must be '<base64 token> <rank>'"),
        (b"Y*== 900", "must be '<base64 token> <rank>'"),
        (b"YQ 900", "must be '<base64 token> <rank>'"),
        (b"YQ== 900", "must have a token and a rank of its own"),
        (b"cXpx 11517401012222951002", "must be '<base64 token> <rank>'"),
        (b"YQ== 1 900", "must be '<base64 token> <rank>'"),
        (b"YQ== " + b"9" * 5000, "must be '<base64 token> <rank>'"),
        (b"cXpx 97", "must have a token and a rank of its own"),
        (b"cXpx -1", "must have a token and a rank of its own"),
        (b"\xff\xfe", "must be '<base64 token> <rank>'"),
    ],
    ids=repr,
)
def test_damaged_ranks_are_refused(tmp_path, line, message):
    path = tmp_path / "tokenizer.model"
    write_tiktoken(path, BYTES)
    with open(path, "ab") as f:
        f.write(line + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        read_tiktoken(path)
    assert f"read_tiktoken: {path}:257: " in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: data[:200] + b"\0" + data[201:]], ids=["cut", "flip"]
)
def test_damaged_folders_are_refused(trained, tmp_path, name, damage):
    trained.save(tmp_path)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="is damaged") as error:
        Tokenizer.load(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", ":1: must be JSON"),
        ("[]", "must describe a tokenizer"),
        ("{}", "must be herdkern-tokenizer version 1, got None"),
        ('{"format": "herdkern-tokenizer", "version": 1}', "must describe a tokenizer: files must be an object"),
        ('{"format": "herdkern-tokenizer", "version": 1, "files": {"../x": {}}}', r"got '../x'"),
        ('{"format": "other", "version": 1}', "must be herdkern-tokenizer version 1, got 'other'"),
    ],
)
def test_damaged_manifests_are_refused(trained, tmp_path, manifest, message):
    trained.save(tmp_path)
    (tmp_path / "herdkern_tokenizer.json").write_text(manifest)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_a_manifest_with_a_wrong_bit_is_refused(trained, tmp_path):
    trained.save(tmp_path, verify=False)
    path = tmp_path / "herdkern_tokenizer.json"
    data, rng = path.read_bytes(), random.Random(5)
    num_refused = 0
    for at in rng.sample(range(len(data)), 300):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        try:
            assert Tokenizer.load(tmp_path) == trained  # a space that became another one, say
        except ValueError:
            num_refused += 1
    assert num_refused > 200


def change(content, *path, to):
    target = content
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = to


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (("model", "type"), "Unigram", "must be BPE, got Unigram"),
        (("model", "dropout"), 0.1, "must have no dropout, got 0.1"),
        (("model", "merges", 1), ["Ġ", "nope"], "must make a token of no lower id"),
        (("model", "merges"), [], "must be made by a merge"),
        (("model", "vocab"), 5, "must describe a tokenizer"),
        (("normalizer",), {"type": "NFC"}, "must have no normalizer"),
        (("pre_tokenizer",), {"type": "ByteLevel"}, "must have add_prefix_space off"),
        (("pre_tokenizer",), {"type": "Whitespace"}, r"got the pre-tokenizers \['Whitespace'\]"),
        (("pre_tokenizer",), None, r"got the pre-tokenizers \[\]"),
        (("pre_tokenizer", "pretokenizers", 0, "type"), "Punctuation", "got the pre-tokenizer Punctuation"),
        (("pre_tokenizer", "pretokenizers", 0, "behavior"), "Removed", "must keep the words of a split whole"),
        (("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), "(a)\\1", "split_pattern"),
        (("model", "end_of_word_suffix"), "</w>", "must have no end_of_word_suffix"),
        (("model", "byte_fallback"), True, "converted from SentencePiece"),
        (("model", "merges", 0), ["a", "b", "c"], "merge 0 must be two tokens"),
        (("model", "vocab", "a"), 1.5, "the id of 'a' must be a whole number"),
        (("model", "vocab", "a"), True, "the id of 'a' must be a whole number"),
        (("added_tokens", 0, "content"), "\ud800", "must have no lone surrogate"),
        (("added_tokens",), None, "must describe a tokenizer"),
    ],
)
def test_foreign_tokenizers_are_refused(folder, tmp_path, path, to, message):
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content, *path, to=to)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_bad_json_names_file_and_line(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{\n "model": {},\n "x" }')
    with pytest.raises(ValueError, match=":3: must be JSON"):
        read_huggingface(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="must be UTF-8"):
        read_huggingface(path)
    with pytest.raises(OSError):
        Tokenizer.load(tmp_path / "missing")


def test_old_merges_as_strings(folder, trained, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = [f"{left} {right}" for left, right in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path) == trained
