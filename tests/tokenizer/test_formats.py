"""Every format: what is written is proved by the library it is for and read again equal; damage is refused."""

import base64
import json
import random
from collections import Counter

import pytest
from torture import torture_strings

from herdkern.tokenizer import Tokenizer, WordCounts, split_words, train_bpe
from herdkern.tokenizer.formats import files, tekken, tiktoken, verify
from herdkern.tokenizer.formats.sentencepiece_export import SENTENCEPIECE_PATTERN

BYTES = {bytes([b]): b for b in range(256)}
SPECIAL = ("<s>", "</s>", "[INST]")


@pytest.fixture(scope="module")
def renumbered(trained):
    """The trained vocabulary with the ids that tekken wants."""
    return Tokenizer(*tekken.renumbered(trained.mergeable_ranks, SPECIAL, num_special=24))


@pytest.mark.parametrize("format", ["tiktoken", "huggingface", "tekken"])
def test_round_trip(renumbered, trained, tmp_path, format):
    tokenizer = renumbered if format == "tekken" else trained
    path = tmp_path / "deep" / "file"
    tokenizer.save(path, format=format)
    assert files.format_of(path) == format
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    kwargs = {"special_tokens": tokenizer.special_tokens, "split_pattern": "llama3"} if format == "tiktoken" else {}
    assert Tokenizer.load(path, **kwargs) == tokenizer
    tokenizer.save(tmp_path / "again", format=format, verify=False)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_mistral_common_reads_our_tekken(trained, tmp_path):
    """With the special tokens that it names itself, and as many as it wants."""
    module = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    names = [*tekken.DEFAULT_NAMES, "<mine>"]
    tokenizer = Tokenizer(*tekken.renumbered(trained.mergeable_ranks, names, num_special=40))
    assert tokenizer.special_tokens["<SPECIAL_21>"] == 21
    tokenizer.save(tmp_path / "tekken.json", format="tekken")
    theirs = module.Tekkenizer.from_file(tmp_path / "tekken.json")
    for text in verify.check_texts():
        assert theirs.encode(text, bos=False, eos=False) == tokenizer.encode_ordinary(text)


def test_renumbering_for_tekken_cuts_texts_alike(renumbered, trained, small_texts):
    for text in small_texts[:20]:
        ours = [trained.token_bytes(i) for i in trained.encode_ordinary(text)]
        assert [renumbered.token_bytes(i) for i in renumbered.encode_ordinary(text)] == ours


def test_ranks_alone_name_no_pattern(trained, tmp_path):
    trained.save(tmp_path / "ranks", format="tiktoken")
    with pytest.raises(ValueError, match=r"has ranks and no split pattern.*pass split_pattern"):
        Tokenizer.load(tmp_path / "ranks")


def test_published_ranks_are_known(cl100k_ranks, tmp_path):
    tokenizer = Tokenizer(cl100k_ranks, {})
    tokenizer.save(tmp_path / "ranks", format="tiktoken", verify=False)
    loaded = Tokenizer.load(tmp_path / "ranks")
    assert loaded.special_tokens["<|endofprompt|>"] == 100276
    assert loaded.split_pattern == tokenizer.split_pattern
    longer = cl100k_ranks | {b"no such token": 100256}
    assert tiktoken.known_vocabulary(longer) == ("", None, {})
    assert tiktoken.known_beginning(longer) == ("cl100k_base", 100256)
    changed = cl100k_ranks | {b"!": 1, b'"': 0}
    assert tiktoken.known_beginning(changed | {b"no such token": 100256}) == ("", 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b"1 '\\x00' 1\n2 '\\x01' 1\n", "a trie vocabulary"),
        (b"\x1f\x8b\x08\x00", "a gzip file; unpack it first"),
        (b"herdkern word counts 1", "a file of word counts; train a tokenizer from it"),
        (b"#version: 0.2\na b\n", "a list of merges without ids"),
        (b'{"a": 1}', "must describe a tokenizer, got JSON with the keys"),
        (b'{"model": {"type": "Unigram", "vocab": []}}', "must be BPE, got Unigram"),
        (b'{"model": {"type": "WordPiece", "vocab": {}}}', "must be BPE, got WordPiece"),
        (b"[" * 100_000, "must be a folder"),
        (b'{"a":' + b"[" * 100_000, "must be JSON of a sane depth"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_no_tokenizer_is_named(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("number", ["Infinity", "[" * 100_000])
def test_impossible_headers_of_counts_are_refused(tmp_path, number):
    path = tmp_path / "counts"
    path.write_bytes(b'herdkern word counts 1\n{"num_words": ' + number.encode() + b', "num_bytes": 1}\n')
    with pytest.raises(ValueError, match="must be the header of a counts file"):
        WordCounts.load(path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold herdkern_tokenizer.json, tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_the_empty_token_is_ignored(tmp_path):
    """One published file has it; tiktoken reads it as well."""
    path = tmp_path / "ranks"
    path.write_bytes(tiktoken.tiktoken_bytes(BYTES) + b"= 256\nYWI= 257\n")
    contents = tiktoken.read(path)
    assert contents.mergeable_ranks == BYTES | {b"ab": 257}
    assert contents.ignored == ("line 257: the empty token of rank 256, which no text has",)


@pytest.mark.parametrize("format", ["nothing", "json"])
def test_unknown_formats_are_refused(trained, tmp_path, format):
    with pytest.raises(ValueError, match="format must be one of herdkern, tiktoken"):
        trained.save(tmp_path / "x", format=format)


# Negative controls: each damages the file that was written before the library reads it.


def lose_a_merge(content):
    content["model"]["merges"].pop(100)


def change_a_merge(content):
    merges = content["model"]["merges"]
    longest = max(range(len(merges)), key=lambda i: len("".join(merges[i])))
    word = "".join(merges[longest])
    merges[longest] = [word[:1], word[1:]] if merges[longest][0] != word[:1] else [word[:-1], word[-1:]]


def swap_two_ids(content):
    vocabulary = content["model"]["vocab"]
    a, b = [token for token in vocabulary if len(token) == 2][:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def change_the_pattern(content):
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+|\S+"


def lose_a_special_token(content):
    content["added_tokens"].pop()


@pytest.mark.parametrize(
    "damage", [lose_a_merge, change_a_merge, swap_two_ids, change_the_pattern, lose_a_special_token]
)
@pytest.mark.parametrize("reader", ["ours", "theirs"])
def test_a_damaged_tokenizer_json_gets_no_name(trained, tmp_path, monkeypatch, damage, reader):
    """Found by our own reader, and by the library alone where ours is made blind."""
    pytest.importorskip("tokenizers")
    real = files._huggingface

    def damaged(tokenizer):
        content = json.loads(real(tokenizer))
        damage(content)
        return files._json(content)

    monkeypatch.setitem(files._PARTS, "huggingface", (damaged, files._prove_huggingface))
    if reader == "theirs":
        monkeypatch.setattr(files, "_same_as_read", lambda *_, **__: None)
        monkeypatch.setattr(files.huggingface, "read", lambda *_, **__: None)
    path = tmp_path / "tokenizer.json"
    path.write_text("older")
    with pytest.raises(ValueError, match=r"tokenizer|token") as error:
        trained.save(path, format="huggingface")
    if reader == "theirs":
        assert "tokenizers" in str(error.value)
    assert path.read_text() == "older"
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    trained.save(path, format="huggingface", verify=False)
    assert path.read_text() != "older"


@pytest.mark.parametrize("damage", ["swap", "lose", "cut"])
def test_damaged_ranks_get_no_name(trained, tmp_path, monkeypatch, damage):
    pytest.importorskip("tiktoken")

    def damaged(tokenizer):
        lines = files.tiktoken.tiktoken_bytes(tokenizer.mergeable_ranks).splitlines()
        if damage == "swap":
            (a, m), (b, n) = lines[300].split(), lines[3000].split()
            lines[300], lines[3000] = a + b" " + n, b + b" " + m
        elif damage == "lose":
            lines.pop(2000)
        return b"\n".join(lines)[: -5 if damage == "cut" else None] + b"\n"

    monkeypatch.setitem(files._PARTS, "tiktoken", (damaged, files._prove_tiktoken))
    monkeypatch.setattr(files, "_same_as_read", lambda *_, **__: None)
    monkeypatch.setattr(files.tiktoken, "read", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"tiktoken .* must read"):
        trained.save(tmp_path / "ranks", format="tiktoken")
    assert not list(tmp_path.iterdir())


def test_other_ids_of_tiktoken_are_shown(trained):
    """The comparison of ids itself: tiktoken with two ranks swapped."""
    pytest.importorskip("tiktoken")
    ranks = dict(trained.mergeable_ranks)
    a, b = (token for token in list(ranks)[300:302])
    ranks[a], ranks[b] = ranks[b], ranks[a]
    with pytest.raises(ValueError, match=r"must give our ids, got others on .* texts, among them"):
        verify.check_ranks("tiktoken", ranks, trained, verify.texts_for(ranks))


def test_a_folder_is_written_whole_or_not_at_all(trained, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(files, "_huggingface", lambda tokenizer: b'{"model": {}}')
    with pytest.raises(ValueError, match="tokenizer"):
        trained.save(tmp_path / "folder")
    assert not list((tmp_path / "folder").iterdir())


def test_texts_of_the_check_reach_every_token(trained):
    """A token that no text of the check has would go out unproved."""
    ids = set()
    for encoded in trained.encode_ordinary_batch(verify.texts_for(trained.mergeable_ranks)):
        ids.update(encoded)
    texts = {rank for token, rank in trained.mergeable_ranks.items() if token.isascii()}
    assert len(texts - ids) < 0.03 * len(texts)


def test_older_folders_still_load(trained, tmp_path):
    """The manifest of the first version has one pattern as a text, and files in this order."""
    trained.save(tmp_path)
    manifest = json.loads((tmp_path / "herdkern_tokenizer.json").read_text())
    assert isinstance(manifest["split_pattern"], str)
    assert list(manifest["files"]) == ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"]
    del manifest["sha256"]
    (tmp_path / "herdkern_tokenizer.json").write_text(json.dumps(manifest))
    assert Tokenizer.load(tmp_path) == trained


def test_tekken_has_no_place_for_some(trained, renumbered, tmp_path):
    cases = [
        (trained, "must begin with the single bytes in their order"),
        (Tokenizer(BYTES, {"<s>": 300}), "must have special tokens with the ids below all others"),
        (Tokenizer({t: i + (i > 255) + 1 for t, i in (BYTES | {b"ab": 256}).items()}, {"<s>": 0}), "got a gap"),
    ]
    for tokenizer, message in cases:
        with pytest.raises(ValueError, match=message):
            tokenizer.save(tmp_path / "tekken.json", format="tekken")
    assert not list(tmp_path.iterdir())


def test_tekken_as_published(tmp_path):
    """Ranks beyond the default size are left out; special tokens without a list have the library's names."""
    entries = [{"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate([*BYTES, b"ab", b"cd"])]
    config = {"pattern": r"\w+|\W+", "default_vocab_size": 261, "default_num_special_tokens": 4, "version": "v3"}
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps({"config": config, "vocab": entries}))
    contents = tekken.read(path)
    assert contents.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3}
    assert contents.mergeable_ranks[b"ab"] == 260
    assert b"cd" not in contents.mergeable_ranks
    assert contents.ignored == ("1 ranks beyond default_vocab_size 261",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {}}, "default_num_special_tokens must be a whole number"),
        ({"vocab": []}, "must list the 3 ranks"),
        ({"vocab": [{"rank": 1, "token_bytes": "YQ=="}] * 3}, "entry 0 of vocab must have rank 0"),
        ({"vocab": [{"rank": 0, "token_bytes": "?"}] * 3}, "must have base64 token_bytes"),
        ({"special_tokens": [{"rank": 9, "token_str": "x"}]}, "must have a rank of its own below 2"),
    ],
)
def test_damaged_tekken_is_refused(tmp_path, change, message):
    config = {"pattern": ".", "default_vocab_size": 5, "default_num_special_tokens": 2}
    vocabulary = [{"rank": i, "token_bytes": code} for i, code in enumerate(("YQ==", "Yg==", "YWI="))]
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps({"config": config, "vocab": vocabulary}))
    tekken.read(path)
    path.write_text(json.dumps({"config": config, "vocab": vocabulary} | change))
    with pytest.raises(ValueError, match=message):
        tekken.read(path)


def words_without_borders(seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(["ab", "c", " ", "  ", "é", "日本", "\n", "9"], k=30)) for _ in range(300)]


@pytest.fixture(scope="module")
def spaced():
    """A vocabulary that SentencePiece can hold: its words end where a space follows something else."""
    texts = [*words_without_borders(1), *verify.check_texts()]
    counts = Counter(word for text in texts for word in split_words(text, SENTENCEPIECE_PATTERN))
    trained = train_bpe(counts, 900)
    return Tokenizer(trained.mergeable_ranks, trained.special_tokens, SENTENCEPIECE_PATTERN)


def test_sentencepiece_export_is_exact(spaced, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path / "byte_level.model"
    spaced.save(path, format="sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in words_without_borders(2):
        ids = theirs.encode(text)
        assert ids == spaced.encode_ordinary(text)
        assert theirs.decode(ids) == text
    assert files.format_of(path) == "sentencepiece"
    assert Tokenizer.load(path) == spaced
    assert theirs.vocab_size() == spaced.n_vocab + 1
    assert theirs.id_to_piece(spaced.bos_id) == "<|begin_of_text|>"


def test_sentencepiece_has_no_place_for_words(trained, spaced, tmp_path):
    across = Tokenizer(BYTES | {b"a b": 256, b"a ": 257}, {}, SENTENCEPIECE_PATTERN)
    unmade = Tokenizer(BYTES | {b"abc": 256}, {}, SENTENCEPIECE_PATTERN)
    cases = [(trained, "has no split pattern"), (across, "across two words, got b'a b'"), (unmade, "by merges alone")]
    for tokenizer, message in cases:
        with pytest.raises(ValueError, match=message):
            tokenizer.save(tmp_path / "x.model", format="sentencepiece")
    assert not list(tmp_path.iterdir())


def test_a_damaged_sentencepiece_export_gets_no_name(spaced, tmp_path, monkeypatch):
    pytest.importorskip("sentencepiece")
    real = files.sentencepiece_export.model_of

    def damaged(tokenizer):
        model = real(tokenizer)
        pieces = list(model.pieces)
        a, b = 300, 500
        pieces[a], pieces[b] = pieces[b], pieces[a]
        return type(model)(pieces=tuple(pieces), settings=model.settings)

    monkeypatch.setattr(files.sentencepiece_export, "model_of", damaged)
    monkeypatch.setattr(files, "_same_as_read", lambda *_, **__: None)
    monkeypatch.setattr(files.sentencepiece_export, "read", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"sentencepiece .* must give our ids, got others"):
        spaced.save(tmp_path / "x.model", format="sentencepiece")
    assert not list(tmp_path.iterdir())


@pytest.fixture(
    scope="module",
    params=[20_000, pytest.param(500_000, marks=pytest.mark.full)],
    ids=["20 thousand", "half a million"],
)
def hostile(request):
    return torture_strings(request.param, seed=7)


def test_hugging_face_on_the_torture_corpus(trained, tmp_path, hostile):
    tokenizers = pytest.importorskip("tokenizers")
    trained.save(tmp_path / "t.json", format="huggingface")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    texts = [text for text in hostile if not any(name in text for name in trained.special_tokens)]
    assert len(texts) > 0.9 * len(hostile)
    ids = [encoding.ids for encoding in theirs.encode_batch(texts, add_special_tokens=False)]
    verify.compare("tokenizers", texts, Tokenizer.load(tmp_path / "t.json").encode_ordinary_batch(texts), ids)
    assert theirs.decode_batch(ids, skip_special_tokens=False) == texts


def test_tiktoken_on_the_torture_corpus(trained, tmp_path, hostile):
    load = pytest.importorskip("tiktoken.load")
    trained.save(tmp_path / "ranks", format="tiktoken")
    with verify.without_cache():
        ranks = load.load_tiktoken_bpe(str(tmp_path / "ranks"))
    verify.check_ranks("tiktoken", ranks, trained, hostile)


def test_sentencepiece_on_the_torture_corpus(spaced, tmp_path, hostile):
    sentencepiece = pytest.importorskip("sentencepiece")
    spaced.save(tmp_path / "s.model", format="sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "s.model"))
    ids = theirs.encode(hostile)
    verify.compare("sentencepiece", hostile, Tokenizer.load(tmp_path / "s.model").encode_ordinary_batch(hostile), ids)
    # Their strings end at a zero byte when they are mapped back.
    kept = [i for i, text in enumerate(hostile) if "\0" not in text]
    assert theirs.decode([ids[i] for i in kept]) == [hostile[i] for i in kept]
