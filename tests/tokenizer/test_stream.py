"""Text from ids that come one by one."""

import random

import pytest

from herdkern.tokenizer import Tokenizer

BYTES = Tokenizer({bytes([b]): b for b in range(256)}, {"<|end|>": 256})


@pytest.mark.parametrize("seed", range(30))
def test_any_cuts_give_the_same_text(trained, seed):
    rng = random.Random(seed)
    pieces = ["Größe", "日本", "🙂", "a", b"\xff", b"\xe4\xb8", b"\xf0\x9f\x99", "<|end|>", b"\x80"]
    data = b"".join(piece if isinstance(piece, bytes) else piece.encode() for piece in rng.choices(pieces, k=12))
    for tokenizer in (BYTES, trained):
        ids = tokenizer.encode_ordinary(data)
        stream, text = tokenizer.stream_decoder(), ""
        while ids:
            n = rng.randrange(1, 4)
            text += stream.push(ids[:n] if n > 1 else ids[0])
            ids = ids[n:]
        assert text + stream.finish() == data.decode(errors="replace")


def test_characters_come_when_they_are_complete():
    stream = BYTES.stream_decoder()
    assert [stream.push(byte) for byte in "é日a".encode()] == ["", "é", "", "", "日", "a"]
    assert stream.push(256) == "<|end|>"
    assert stream.finish() == ""


def test_finish_starts_afresh():
    stream = BYTES.stream_decoder()
    assert stream.push([0xE4, 0xB8]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push([0xAD, 97]) == "\ufffda"
    strict = BYTES.stream_decoder(errors="strict")
    strict.push(0xE4)
    with pytest.raises(UnicodeDecodeError):
        strict.finish()
    assert strict.push(97) == "a"


def test_unknown_ids_are_refused():
    stream = BYTES.stream_decoder()
    with pytest.raises(ValueError, match=r"ids\[0\] must be a token id"):
        stream.push(257)
    assert stream.push(97) == "a"
