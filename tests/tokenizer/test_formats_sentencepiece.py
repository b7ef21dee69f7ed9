"""SentencePiece models: read, written and encoded as the `sentencepiece` package does, which also trains them here."""

import io
import random
import struct
from itertools import pairwise

import pytest

import herdkern.tokenizer
from herdkern import _text
from herdkern.tokenizer import Tokenizer
from herdkern.tokenizer.formats import charsmap, files, sentencepiece_file, verify
from herdkern.tokenizer.formats.sentencepiece import SentencePieceTokenizer
from herdkern.tokenizer.formats.sentencepiece_file import ModelFile, Piece, PieceType, Settings

sentencepiece = pytest.importorskip("sentencepiece")

KINDS = {
    "llama": {"normalization_rule_name": "identity", "byte_fallback": True, "remove_extra_whitespaces": False},
    "default": {"normalization_rule_name": "nmt_nfkc", "byte_fallback": False},
    "folded": {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": True, "add_dummy_prefix": False},
    "digits": {
        "normalization_rule_name": "identity",
        "split_digits": True,
        "user_defined_symbols": ["<tool>", "▁▁", "😀", "<to"],
        "allow_whitespace_only_pieces": True,
        "remove_extra_whitespaces": False,
    },
}


@pytest.fixture(scope="module")
def models(small_texts):
    """kind -> the bytes of a small model."""
    lines = [line[:400] for text in small_texts[:40] for line in text.splitlines() if line.strip()][:4000]
    found = {}
    for kind, options in KINDS.items():
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            model_type="bpe",
            vocab_size=1500,
            character_coverage=0.995,
            num_threads=1,
            minloglevel=2,
            **options,
        )
        found[kind] = out.getvalue()
    return found


@pytest.fixture(params=list(KINDS))
def model(request, models, tmp_path):
    """(their processor, our tokenizer, the file)"""
    path = tmp_path / "a.model"
    path.write_bytes(models[request.param])
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), SentencePieceTokenizer.load(path), path


def hostile_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    parts = [*verify.KINDS, "the ", " the", "▁", "<tool>", "<s>", "<0x41>", "😀", "  ", "ing", "１２", "ﬁ", "é", "Ⅷ"]
    return ["".join(rng.choice(parts) for _ in range(rng.randrange(1, 12))) for _ in range(count)]


def test_same_ids_and_texts(model, small_texts):
    theirs, ours, _ = model
    texts = [
        *verify.check_texts(),
        *hostile_texts(3, 800),
        *(text[:3000] for text in small_texts[40:60]),
        "",
        " ",
        "   ",
    ]
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text


def naive_ids(ours, text):
    """Merges over the whole text one after the other, as the package's description says."""
    ids = {piece.text: i for i, piece in enumerate(ours.pieces)}
    scores = {p.text: p.score for p in ours.pieces if p.type == PieceType.NORMAL}
    symbols = list(ours.normalize(text))
    while found := [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]:
        i = min(found)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    unknown = next(i for i, piece in enumerate(ours.pieces) if piece.type == PieceType.UNKNOWN)
    out = []
    for symbol in symbols:
        if symbol not in ids and ours.settings.byte_fallback:
            out += [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        elif symbol in ids or out[-1:] != [unknown]:
            out.append(ids.get(symbol, unknown))
    return out


def test_the_kernel_is_the_naive_algorithm(models):
    """Words of every length: the search of short parts and the queue of long ones, and cuts that change nothing."""
    for kind in ("llama", "default", "folded"):
        ours = SentencePieceTokenizer(sentencepiece_file.read_bytes(models[kind]))
        rng = random.Random(5)
        letters = "eeeettaainnosrhld" + "日本語のéß😀"
        texts = ["".join(rng.choices(letters, k=rng.choice([1, 5, 30, 60, 300]))) for _ in range(60)]
        texts += ["e" * 200, "thethethe" * 40, "in" * 99 + "\u0378" * 3 + "in" * 30, "a b" * 60]
        for text in texts:
            assert ours.encode(text) == naive_ids(ours, text), text


def test_a_long_text_without_spaces_takes_linear_time(models):
    """Not a clock but the count of ids: a megabyte of one letter would take hours if every merge searched it."""
    ours = SentencePieceTokenizer(sentencepiece_file.read_bytes(models["llama"]))
    text = "e" * 1_000_000
    assert ours.decode(ours.encode(text)) == text


def test_any_ids_decode_alike(model):
    theirs, ours, _ = model
    rng = random.Random(8)
    for _ in range(500):
        ids = [rng.randrange(ours.n_vocab) for _ in range(rng.randrange(1, 9))]
        assert ours.decode(ids) == theirs.decode(ids), ids


def test_pieces_and_settings_are_read(model):
    theirs, ours, _ = model
    assert [piece.text for piece in ours.pieces] == [theirs.id_to_piece(i) for i in range(theirs.vocab_size())]
    assert [piece.score for piece in ours.pieces] == [theirs.get_score(i) for i in range(theirs.vocab_size())]
    is_byte = [piece.type == PieceType.BYTE for piece in ours.pieces]
    assert is_byte == [theirs.is_byte(i) for i in range(theirs.vocab_size())]


def test_round_trip_is_byte_for_byte(model, tmp_path):
    _, ours, path = model
    ours.save(tmp_path / "b.model")
    assert (tmp_path / "b.model").read_bytes() == path.read_bytes()
    assert files.format_of(path) == "sentencepiece"


def test_written_from_settings_gives_the_same_ids(model, tmp_path):
    """Without the messages that were read: what we write of them ourselves is enough."""
    theirs, ours, _ = model
    rewritten = SentencePieceTokenizer(sentencepiece_file.with_settings(ours.model, ours.settings))
    rewritten.save(tmp_path / "c.model")
    again = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "c.model"))
    for text in [*verify.check_texts(), *hostile_texts(4, 200)]:
        assert again.encode(text) == theirs.encode(text)
    assert again.unk_id() == theirs.unk_id()
    assert again.bos_id() == theirs.bos_id()


def test_merges_are_those_of_the_trainer(model):
    """Pieces of more than one character are merges, in the order of their scores, each of two that exist."""
    _, ours, _ = model
    merges = ours.merges
    longer = [i for i, p in enumerate(ours.pieces) if p.type == PieceType.NORMAL and len(p.text) > 1]
    assert [s.reason for s in merges.skipped if "parts" not in s.reason] == []
    assert sorted([*merges.made.tolist(), *(s.token_id for s in merges.skipped)]) == longer
    assert len(merges.skipped) <= 0.01 * len(longer)
    for (left, right), made in zip(merges.pairs(), merges.made.tolist()):
        assert ours.pieces[left].text + ours.pieces[right].text == ours.pieces[made].text


def test_a_damaged_model_gets_no_name(model, tmp_path, monkeypatch):
    _, ours, _ = model
    real = sentencepiece_file.to_bytes

    def damaged(content):
        pieces = list(content.pieces)
        a, b = [i for i, p in enumerate(pieces) if p.type == PieceType.NORMAL][3:5]
        pieces[a], pieces[b] = pieces[b], pieces[a]
        return real(ModelFile(pieces=tuple(pieces), settings=content.settings, raw=content.raw))

    monkeypatch.setattr(sentencepiece_file, "to_bytes", damaged)
    with pytest.raises(ValueError, match=r"sentencepiece .* must give our ids, got others on .* among them"):
        ours.save(tmp_path / "x.model")
    assert not (tmp_path / "x.model").exists()
    ours.save(tmp_path / "x.model", verify=False)
    assert (tmp_path / "x.model").exists()


def test_another_kind_of_tokenizer_is_named(model):
    _, _, path = model
    with pytest.raises(ValueError, match=r"another kind of tokenizer.*herdkern.tokenizer.SentencePieceTokenizer.load"):
        Tokenizer.load(path)
    assert herdkern.tokenizer.SentencePieceTokenizer is SentencePieceTokenizer


@pytest.mark.parametrize("kind", ["unigram", "word", "char"])
def test_models_without_merges_are_refused(small_texts, tmp_path, kind):
    path = tmp_path / "u.model"
    with open(path, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(
                text for text in small_texts[0].splitlines() + small_texts[20].splitlines() if text.isascii()
            ),
            model_writer=f,
            model_type=kind,
            vocab_size=200,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    for load in (SentencePieceTokenizer.load, Tokenizer.load):
        with pytest.raises(ValueError, match=f"must be a BPE model, got a {kind} model, which has no merges"):
            load(path)


UNKNOWN = Piece("<unk>", 0.0, PieceType.UNKNOWN)


def small(*pieces: Piece, **settings) -> ModelFile:
    defaults = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    return ModelFile(pieces=(UNKNOWN, *pieces), settings=Settings(**defaults | settings))


def both(content: ModelFile, tmp_path):
    ours = SentencePieceTokenizer(content)
    path = tmp_path / "small.model"
    ours.save(path)
    return ours, sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_unused_pieces_are_cut_again(tmp_path):
    pieces = [Piece(t, -float(i)) for i, t in enumerate(("ab", "abc", "a", "b", "c"))]
    pieces[0] = Piece("ab", -0.5, PieceType.UNUSED)
    pieces[1] = Piece("abc", -1.0, PieceType.UNUSED)
    ours, theirs = both(small(*pieces), tmp_path)
    for text in ("abc", "ab", "ababc", "cab", "abx", "xx", "axxb"):
        assert ours.encode(text) == theirs.encode(text), text


def test_pieces_put_in_by_hand_are_skipped(tmp_path):
    pieces = [Piece("▁▁", -1e9), Piece("ab", -0.0), Piece("a", -2.0), Piece("b", -3.0), Piece("▁", -4.0)]
    ours, theirs = both(small(*pieces), tmp_path)
    assert [(s.token, s.reason) for s in ours.merges.skipped] == [
        ("▁▁".encode(), "has the score -1e+09: put in by hand")
    ]
    assert ours.merges.pairs() == [(3, 4)]
    for text in ("   a", "ab  b", "    "):
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            ModelFile(pieces=(UNKNOWN, Piece("a"), Piece("a")), settings=Settings()),
            "piece 2 must have a text of its own",
        ),
        (small(Piece("")), "piece 1 must have a text of its own"),
        (ModelFile(pieces=(Piece("a"),), settings=Settings()), "one piece for what is unknown, got 0"),
        (small(byte_fallback=True), "must have the piece <0x00> of type byte"),
        (small(treat_whitespace_as_suffix=True), "must put spaces before words"),
    ],
)
def test_impossible_models_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        SentencePieceTokenizer(content)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a\x05\x0a\x01a", "must be a protocol buffer, got field 1"),
        (b"\x0b", "got the wire type 3"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "a number without an end"),
        (b"\x08\x01", "got a number as field 1"),
        (b"\x0a\x03\x18\x09\x00", "must be a protocol buffer|must have a score"),
        (b"\x0a\x05\x0a\x03\xff\xff\xff", "must hold UTF-8 text"),
        (b"\x0a\x07\x15" + struct.pack("<f", float("nan")) + b"\x18\x01", "got NaN"),
        (b"\x0a\x00" * 9, "piece 0 must have a text of its own, got none"),
        (b"", "got a unigram model"),
    ],
    ids=repr,
)
def test_damaged_models_are_refused(tmp_path, data, message):
    path = tmp_path / "x.model"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        SentencePieceTokenizer.load(path)
    assert str(path) in str(error.value)


def test_charsmap_of_ours(tmp_path):
    """One- and two-byte keys, single bytes among them, as the package reads them."""
    mapping = {b"a": b"x", b"\xc3": b"1", "é".encode(): b"E", b"\x01": b"", b"z": "日本".encode()}
    mapping.pop(b"\xc3")
    blob = charsmap.build(mapping)
    found = _text.CharsMap(blob)
    assert found.map("zaéè\x01b".encode()) == "日本xEèb".encode()
    assert found.map(b"a\xffz\xc3") == "x\ufffd日本\ufffd".encode()  # bytes that are no text
    pieces = [Piece(c, -float(i)) for i, c in enumerate("xE1日本èb")]
    ours, theirs = both(small(*pieces, charsmap=blob, normalizer="own"), tmp_path)
    for text in ("aé", "zzb", "\x01a\x01", "è", "z\x01z"):
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("blob", [b"\1", struct.pack("<I", 4000), struct.pack("<I", 0)], ids=repr)
def test_damaged_charsmaps_are_refused(blob):
    with pytest.raises(ValueError, match="must have a charsmap that holds its trie"):
        _text.CharsMap(blob)
