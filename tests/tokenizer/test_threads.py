"""What other threads do to an argument while a kernel works on it."""

import threading

import numpy as np
import pytest

from herdkern.tokenizer import train_bpe


def test_ids_that_change_while_they_are_decoded_do_no_harm():
    """A short token becomes a long one, or no token at all, between the measuring of the bytes and the writing."""
    tokenizer = train_bpe(["x" * 4096 + " a"], 256 + 12, special_tokens=())
    long = max(tokenizer.mergeable_ranks, key=len)
    assert len(long) > 1000
    values = [tokenizer.mergeable_ranks[b"a"], tokenizer.mergeable_ranks[long], 99_999]
    ids = np.full(200_000, values[0], np.uint32)
    stop = threading.Event()

    def change():
        while not stop.is_set():
            for value in values:
                ids[-1000:] = value

    thread = threading.Thread(target=change)
    thread.start()
    told = []
    try:
        for _ in range(300):
            try:
                assert len(tokenizer.decode_bytes(ids)) >= 199_000
            except (RuntimeError, ValueError) as error:
                told.append(str(error))
    finally:
        stop.set()
        thread.join()
    assert told
    assert [what for what in told if "ids must not change" not in what and "must be a token id" not in what] == []
    ids[:] = values[0]
    assert tokenizer.decode_bytes(ids) == b"a" * 200_000
    with pytest.raises(ValueError, match="must be a token id"):
        tokenizer.decode_bytes([99_999])
