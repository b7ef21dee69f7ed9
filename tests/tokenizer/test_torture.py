"""Two million torture strings against tiktoken and Hugging Face tokenizers; byte strings come back whole."""

import itertools
import json
from functools import cache

import numpy as np
import pytest
from torture import FAMILIES, LOOK_ALIKES, torture_bytes, torture_strings
from vocabularies import PRODUCTION, find, read_ranks

from herdkern.tokenizer import Tokenizer, WordCounts, train_bpe
from herdkern.tokenizer.export import merge_list, to_byte_level
from herdkern.tokenizer.pretokenize import SPLIT_PATTERNS

NUM_STRINGS = 2_000_000
CHUNK = 50_000
OWN = {"own": "llama3", "own-o200k": "o200k", "own-gpt2": "gpt2"}
NAMES = [*OWN, *PRODUCTION]


@cache
def own_vocabulary(pattern):
    """3,000 merges of torture strings themselves, so that their rare letters take part in merges."""
    counts = WordCounts(pattern).add(torture_strings(40_000, 1))
    return Tokenizer(train_bpe(counts, 3256, special_tokens=()).mergeable_ranks, {}, split_pattern=pattern)


def tokenizer_of(name):
    if name in OWN:
        return own_vocabulary(OWN[name])
    if find(name) is None:
        pytest.skip(f"needs the vocabulary {name}: python tools/fetch_tokenizers.py --to DIR, HERDKERN_TOKENIZERS=DIR")
    return Tokenizer(read_ranks(name), {}, split_pattern=pattern_of(name))


def pattern_of(name):
    return SPLIT_PATTERNS[OWN.get(name) or PRODUCTION[name].pattern]


def tiktoken_twin(name, tokenizer, specials):
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.Encoding(
        "twin", pat_str=pattern_of(name), mergeable_ranks=tokenizer.mergeable_ranks, special_tokens=specials
    )


def huggingface_twin(name, tokenizer, specials):
    """A tokenizers.Tokenizer made by its own classes; tokens that no two parts make are found whole alone."""
    tokenizers = pytest.importorskip("tokenizers")
    merges, left_over = merge_list(tokenizer.mergeable_ranks, tokenizer._encoder)
    text_of = {rank: to_byte_level(token) for token, rank in tokenizer.mergeable_ranks.items()}
    model = tokenizers.models.BPE(
        vocab={text: rank for rank, text in text_of.items()},
        merges=[(text_of[left], text_of[right]) for left, right in merges],
        ignore_merges=bool(left_over),
    )
    twin = tokenizers.Tokenizer(model)
    twin.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern_of(name)), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    twin.add_special_tokens([tokenizers.AddedToken(special, special=True, normalized=False) for special in specials])
    return twin


def assert_same_ids(where, texts, ids, offsets, theirs):
    """theirs: a list of ids for each text. Names the first text with other ids."""
    flat = np.fromiter(itertools.chain.from_iterable(theirs), np.uint32)
    if np.array_equal(np.diff(offsets), list(map(len, theirs))) and np.array_equal(ids, flat):
        return
    for i, text in enumerate(texts):
        ours = ids[offsets[i] : offsets[i + 1]].tolist()
        assert ours == theirs[i], f"{where}: {text!r}: ours {ours}, theirs {theirs[i]}"
    raise AssertionError(f"{where}: offsets do not fit")


def compare(name, tokenizer, count, seed):
    reference, twin = tiktoken_twin(name, tokenizer, {}), huggingface_twin(name, tokenizer, [])
    for begin in range(0, count, CHUNK):
        texts = torture_strings(min(CHUNK, count - begin), [seed, begin])
        ids, offsets = tokenizer.encode_to_numpy(texts)
        assert_same_ids(f"{name}, tiktoken", texts, ids, offsets, list(map(reference.encode_ordinary, texts)))
        encodings = twin.encode_batch_fast(texts, add_special_tokens=False)
        assert_same_ids(f"{name}, tokenizers", texts, ids, offsets, [encoding.ids for encoding in encodings])


def share(name, total):
    """Strings for one vocabulary, so that those at hand have `total` in all."""
    present = [other for other in PRODUCTION if find(other)]
    each = total // len(NAMES)
    return each if name in PRODUCTION else -(-(total - each * len(present)) // len(OWN))


@pytest.mark.parametrize("name", NAMES)
def test_two_million_strings(name):
    compare(name, tokenizer_of(name), share(name, NUM_STRINGS), NAMES.index(name))


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_ten_million_strings(name):
    compare(name, tokenizer_of(name), share(name, 5 * NUM_STRINGS), 100 + NAMES.index(name))


def test_a_wrong_rank_is_found():
    """Negative control: the comparison fails where one pair of ranks is exchanged."""
    tokenizer = own_vocabulary("llama3")
    tokens = sorted(tokenizer.mergeable_ranks, key=tokenizer.mergeable_ranks.__getitem__)
    tokens[300], tokens[2000] = tokens[2000], tokens[300]
    wrong = Tokenizer({token: rank for rank, token in enumerate(tokens)}, {})
    texts = torture_strings(5000, 3)
    ids, offsets = wrong.encode_to_numpy(texts)
    theirs = tiktoken_twin("own", tokenizer, {}).encode_ordinary_batch(texts)
    with pytest.raises(AssertionError, match="ours"):
        assert_same_ids("own", texts, ids, offsets, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens(name):
    """Special tokens that are allowed, in text that is full of their likes."""
    ordinary = tokenizer_of(name)
    first = max(ordinary.mergeable_ranks.values()) + 1
    specials = PRODUCTION[name].specials if name in PRODUCTION else {}
    specials = specials or {special: first + i for i, special in enumerate(LOOK_ALIKES[:8])}
    tokenizer = Tokenizer(ordinary.mergeable_ranks, specials, split_pattern=ordinary.split_pattern)
    rng = np.random.default_rng(11)
    texts = [text for family in ("look_alikes", "mixed") for text in FAMILIES[family](rng, 4000)]
    twin = tiktoken_twin(name, ordinary, specials)
    ours = tokenizer.encode_batch(texts, allowed_special="all")
    assert ours == [twin.encode(text, allowed_special="all") for text in texts]
    assert [special for special in specials.values() if special not in set(itertools.chain(*ours))] == []
    for text in texts[:500]:
        if any(special in text for special in specials):
            with pytest.raises(ValueError, match="special token"):
                tokenizer.encode(text)
        else:
            assert tokenizer.encode(text) == ordinary.encode_ordinary(text)


@pytest.mark.parametrize("name", NAMES)
def test_byte_strings_come_back(name):
    tokenizer = tokenizer_of(name)
    texts = torture_bytes(60_000, NAMES.index(name))
    ids, offsets = tokenizer.encode_to_numpy(texts)
    assert tokenizer.decode_bytes(ids) == b"".join(texts)
    borders = itertools.pairwise(offsets.tolist())
    assert [tokenizer.decode_bytes(ids[begin:end]) for begin, end in borders] == texts


def test_strings_are_what_they_claim():
    """Every family makes strings of its own, mostly different ones; one seed gives the same again."""
    for name, family in FAMILIES.items():
        texts = family(np.random.default_rng(5), 2000)
        assert len(texts) == 2000, name
        assert len(set(texts)) > 900, name
        assert texts == family(np.random.default_rng(5), 2000), name
        assert all(json.loads(json.dumps(text)) == text for text in texts), name
    broken = torture_bytes(3000, 5)
    assert sum(data.decode("utf-8", "replace").encode() != data for data in broken) > 1000


def test_claude_file_with_its_normalizer():
    """The published tokenizer.json itself, which changes text by NFKC before it cuts it: ids of the changed text."""
    tokenizers = pytest.importorskip("tokenizers")
    path = find("claude")
    if path is None:
        pytest.skip("needs the vocabulary claude: python tools/fetch_tokenizers.py --to DIR, HERDKERN_TOKENIZERS=DIR")
    with pytest.raises(ValueError, match="NFKC"):
        Tokenizer.load(path)
    ours, theirs = Tokenizer.load(path, ignore_normalizer=True), tokenizers.Tokenizer.from_file(str(path))
    texts = [text for text in torture_strings(30_000, 21) if not any(name in text for name in ours.special_tokens)]
    changed = [theirs.normalizer.normalize_str(text) for text in texts]
    assert changed != texts
    ids, offsets = ours.encode_to_numpy(changed)
    assert_same_ids("claude, NFKC", texts, ids, offsets, [e.ids for e in theirs.encode_batch_fast(texts)])
