"""tokenizer.json of others: every way to split that we read gives the ids of `tokenizers`; the rest is refused."""

import json
import random

import pytest

from herdkern.tokenizer import Tokenizer, train_bpe
from herdkern.tokenizer.formats import files, huggingface, huggingface_characters, verify
from herdkern.tokenizer.pretokenize import SPLIT_PATTERNS, split_words

tokenizers = pytest.importorskip("tokenizers")

BYTES = {bytes([b]): b for b in range(256)}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def split(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


WITHOUT = BYTE_LEVEL | {"use_regex": False}
LLAMA3 = SPLIT_PATTERNS["llama3"]
PRE_TOKENIZERS = {
    "byte level alone is GPT-2": BYTE_LEVEL,
    "byte level with its pattern named": BYTE_LEVEL | {"use_regex": True},
    "byte level without a pattern": WITHOUT,
    "one pattern": sequence(split({"Regex": LLAMA3}), WITHOUT),
    "what lies between, removed": sequence(split({"Regex": LLAMA3}, "Removed", True), WITHOUT),
    "a text": sequence(split({"String": "a.b"}), WITHOUT),
    "single digits": sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL),
    "runs of digits": sequence({"type": "Digits", "individual_digits": False}, BYTE_LEVEL),
    "three patterns": sequence(*(split({"Regex": p}) for p in (r"\p{N}{1,3}", r"[一-龥]+", r"\s+|\S+")), WITHOUT),
    "a sequence in a sequence": sequence(sequence(split({"Regex": r"\p{N}"})), sequence(BYTE_LEVEL)),
}


@pytest.fixture(scope="module")
def content(trained):
    return json.loads(files._huggingface(trained))


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers(content, tmp_path, name):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content | {"pre_tokenizer": PRE_TOKENIZERS[name]}))
    ours = Tokenizer.load(path)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    texts = [*verify.check_texts(), "xa.ba.bb 12345 1a23 ½٣²", "中文12中文 a.ba"]
    batch = theirs.encode_batch(texts, add_special_tokens=False)
    verify.compare("tokenizers", texts, ours.encode_ordinary_batch(texts), [encoding.ids for encoding in batch])
    ours.save(tmp_path / "again.json", format="huggingface")
    assert Tokenizer.load(tmp_path / "again.json") == ours


@pytest.mark.parametrize("name", SPLIT_PATTERNS)
def test_every_pattern_of_ours_is_proved_in_every_format(tmp_path, name):
    """Trained with it, written as a folder (tiktoken and Hugging Face read it) and read again."""
    trained = train_bpe(word_counts(SPLIT_PATTERNS[name]), 800)
    tokenizer = Tokenizer(trained.mergeable_ranks, trained.special_tokens, name)
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path) == tokenizer
    assert Tokenizer.load(tmp_path / "tokenizer.json") == tokenizer


def word_counts(pattern) -> dict[bytes, int]:
    counts: dict[bytes, int] = {}
    for text in verify.check_texts():
        for word in split_words(text, pattern):
            counts[word] = counts.get(word, 0) + 1
    return counts


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (sequence({"type": "Whitespace"}, BYTE_LEVEL), "got the pre-tokenizer Whitespace"),
        (sequence(BYTE_LEVEL, split({"Regex": "a"})), r"and then map bytes \(ByteLevel\)"),
        (BYTE_LEVEL | {"add_prefix_space": True}, "must have add_prefix_space off"),
        (sequence(split({"Regex": "a"}, "MergedWithNext"), BYTE_LEVEL), "got MergedWithNext, invert False"),
        (sequence(split({"Regex": "a"}, "Removed", True), BYTE_LEVEL), "got Removed, invert True"),
        ({"type": "Metaspace", "replacement": "▁"}, "converted from SentencePiece"),
        (sequence(split({"Regex": r"(?=a)\1"}), WITHOUT), "split_pattern"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_pre_tokenizers_are_refused(content, tmp_path, step, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content | {"pre_tokenizer": step}))
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(path)


@pytest.mark.parametrize("name", ["NFC", "NFKC", "Lowercase"])
def test_normalizers_are_refused_or_left_to_the_caller(content, trained, tmp_path, name):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content | {"normalizer": {"type": "Sequence", "normalizers": [{"type": name}]}}))
    with pytest.raises(ValueError, match=f"must have no normalizer, got {name}; pass ignore_normalizer=True"):
        Tokenizer.load(path)
    assert Tokenizer.load(path, ignore_normalizer=True) == trained
    assert huggingface.read(path, ignore_normalizer=True).normalizer == name


def test_further_merges_of_a_token_change_nothing(trained, content, tmp_path):
    """All splits of every token listed, as converters write them: the same tokenizer, and the same ids there."""
    ranks = trained.mergeable_ranks
    merges = []
    for token in ranks:
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        names = [[huggingface.to_byte_level(part) for part in pair] for pair in splits if all(p in ranks for p in pair)]
        merges += names
    assert len(merges) > 1.2 * len(content["model"]["merges"])
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content | {"model": content["model"] | {"merges": merges}}))
    assert Tokenizer.load(path) == trained
    theirs = tokenizers.Tokenizer.from_file(str(path))
    texts = verify.texts_for(ranks)
    texts = [text for text in texts if not any(name in text for name in trained.special_tokens)]
    batch = theirs.encode_batch(texts, add_special_tokens=False)
    assert [encoding.ids for encoding in batch] == trained.encode_ordinary_batch(texts)


def test_a_merge_of_other_parts_is_refused(tmp_path):
    """Its ids would differ: 'abc' is a + bc there, ab + c by rank."""
    ranks = BYTES | {b"ab": 256, b"bc": 257, b"abc": 258}
    content = huggingface.huggingface_json(ranks, {}, LLAMA3, [(97, 98), (98, 99), (97, 257)], False)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"token b'abc' must be made by a merge of b'ab' and b'c'"):
        Tokenizer.load(path)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    assert theirs.encode("abc").ids != Tokenizer(ranks, {}).encode("abc")


def test_whole_words_alone_are_refused(tmp_path):
    """ignore_merges with a token that two others could make and no merge does: by rank it would be merged."""
    ranks = BYTES | {b"ab": 256, b"abab": 257}
    content = huggingface.huggingface_json(ranks, {}, LLAMA3, [(97, 98)], True)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="token b'abab' must be made by a merge"):
        Tokenizer.load(path)


def test_special_tokens_keep_ids_behind_a_gap(tmp_path):
    """An added token outside the vocabulary would get the next free id there."""
    tokenizer = Tokenizer(BYTES | {b"ab": 300}, {"<a>": 256, "<b>": 1000, "<c>": 299})
    tokenizer.save(tmp_path / "t.json", format="huggingface")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert theirs.encode("x<b>ab<c><a>").ids == [120, 1000, 300, 299, 256]
    assert Tokenizer.load(tmp_path / "t.json") == tokenizer


@pytest.mark.parametrize("seed", range(10))
def test_random_vocabularies_are_proved_or_refused(tmp_path, seed):
    """Vocabularies of any tokens, made by merges or not: what is written gives the same ids, which the save proves."""
    rng = random.Random(seed)
    tokens = {"".join(rng.choices("ab c1", k=rng.randrange(2, 6))).encode() for _ in range(40)}
    ranks = BYTES | {token: 256 + i for i, token in enumerate(sorted(tokens, key=lambda t: (len(t), rng.random())))}
    tokenizer = Tokenizer(ranks, {"<s>": 1000 + seed})
    tokenizer.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = ["".join(rng.choices("ab c1", k=rng.randrange(1, 30))) for _ in range(500)]
    batch = theirs.encode_batch(texts, add_special_tokens=False)
    assert [encoding.ids for encoding in batch] == tokenizer.encode_ordinary_batch(texts)


def test_a_merge_of_nothing_is_refused(tmp_path):
    """Found by fuzzing: two empty halves make the empty token, which no vocabulary holds."""
    model = {"vocab": {"a": 6, "ab": 258}, "merges": ["a b", " "]}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": model}))
    with pytest.raises(ValueError, match="tokens of the vocabulary, got ''"):
        huggingface_characters.read_merges(path)
