"""Where tokens begin and end in their text."""

import json

import numpy as np
import pytest

from herdkern.tokenizer import Tokenizer
from herdkern.tokenizer.export import huggingface_json, merge_list

BYTES = Tokenizer({bytes([b]): b for b in range(256)} | {"é".encode(): 300, "日本".encode()[:4]: 301}, {"<|end|>": 302})


def test_characters_and_bytes():
    ids, spans = BYTES.encode_with_offsets("aé日b<|end|>", allowed_special="all")
    assert ids == [97, 300, 0xE6, 0x97, 0xA5, 98, 302]
    assert spans == [(0, 1), (1, 2), (2, 3), (2, 3), (2, 3), (3, 4), (4, 11)]
    _, spans = BYTES.encode_with_offsets("aé日b<|end|>".encode(), allowed_special="all")
    assert spans == [(0, 1), (1, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 14)]


def test_tokens_across_characters():
    """A token of one character and a third of the next reaches over both."""
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)} | {"日".encode()[1:] + "本".encode()[:1]: 301}, {})
    ids, spans = tokenizer.encode_with_offsets("日本")
    assert ids == [0xE6, 0x97, 0xA5, 0xE6, 0x9C, 0xAC]  # no merge leads to it
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)} | {"日".encode()[2:] + "本".encode()[:1]: 301}, {})
    ids, spans = tokenizer.encode_with_offsets("日本")
    assert ids == [0xE6, 0x97, 301, 0x9C, 0xAC]
    assert spans == [(0, 1), (0, 1), (0, 2), (1, 2), (1, 2)]


def test_spans_of_bytes_give_the_tokens(trained, small_texts):
    texts = [text.encode() for text in small_texts[:30]] + [b"", b"\xff\xfe\x80"]
    ids, offsets, spans = trained.encode_to_numpy(texts, return_offsets=True)
    assert spans.shape == (len(ids), 2)
    assert spans.dtype == np.int64
    for i, text in enumerate(texts):
        begin, end = offsets[i : i + 2]
        assert [text[a:b] for a, b in spans[begin:end]] == [trained.token_bytes(t) for t in ids[begin:end]]


def test_same_offsets_as_hugging_face(trained, small_texts):
    tokenizers = pytest.importorskip("tokenizers")
    merges, has_others = merge_list(trained.mergeable_ranks, trained._encoder)
    content = huggingface_json(trained.mergeable_ranks, {}, trained.split_pattern, merges, has_others)
    content["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"] = False
    twin = tokenizers.Tokenizer.from_str(json.dumps(content))
    for text in small_texts[:40]:
        theirs = twin.encode(text, add_special_tokens=False)
        ids, spans = trained.encode_with_offsets(text, disallowed_special=())
        assert ids == theirs.ids
        assert spans == theirs.offsets
