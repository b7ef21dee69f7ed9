"""Encoding documents with a 32k vocabulary: herdkern, tiktoken, Hugging Face tokenizers (encode_batch_fast).

All use every core. herdkern returns two arrays, tiktoken lists, tokenizers Encoding objects: what their callers get.
Before any time is taken all ids must be equal. "warm" encodes the same text again and again, which flatters every
cache; "new-text" encodes a text that was not seen before in every call.
"""

import itertools
import sys
from collections.abc import Callable
from functools import cache

import numpy as np
from corpus import installed_texts
from harness import Bench, Case, pytest_cases

from herdkern.tokenizer import LLAMA3_SPLIT_PATTERN, Tokenizer, train_bpe
from herdkern.tokenizer.export import huggingface_json, merge_list

NUM_SLICES = 24  # texts of 1 MB for "new-text"; they come round again only after that many calls


@cache
def tokenizer() -> Tokenizer:
    return train_bpe(installed_texts(10_000_000), 32_768, special_tokens=())


def encoders() -> dict[str, Callable[[list[str]], object]]:
    ours = tokenizer()
    fns: dict[str, Callable[[list[str]], object]] = {"herdkern": ours.encode_to_numpy}
    try:
        import tiktoken

        encoding = tiktoken.Encoding(
            "bench", pat_str=LLAMA3_SPLIT_PATTERN, mergeable_ranks=ours.mergeable_ranks, special_tokens={}
        )
        fns["tiktoken"] = encoding.encode_ordinary_batch
    except ImportError as e:
        print(f"without tiktoken: {e}", file=sys.stderr)
    try:
        import json

        import tokenizers

        merges, _ = merge_list(ours.mergeable_ranks, ours._encoder)
        content = huggingface_json(ours.mergeable_ranks, {}, LLAMA3_SPLIT_PATTERN, merges, False)
        fns["tokenizers"] = tokenizers.Tokenizer.from_str(json.dumps(content)).encode_batch_fast
    except ImportError as e:
        print(f"without tokenizers: {e}", file=sys.stderr)
    return fns


def case(name: str, slices: Callable[[], list[list[str]]], num_bytes: int) -> Case:
    """One call encodes one slice; calls go round the slices."""

    def setup() -> dict[str, Callable[[], object]]:
        texts = slices()

        def go_round(encode: Callable[[list[str]], object]) -> Callable[[], object]:
            turns = itertools.cycle(texts)
            return lambda: encode(next(turns))

        return {peer: go_round(encode) for peer, encode in encoders().items()}

    def check(fns: dict[str, Callable[[], object]]) -> None:
        ids, offsets = fns["herdkern"]()  # type: ignore[misc]
        lists = np.split(ids, offsets[1:-1])
        for peer, fn in fns.items():
            if peer == "herdkern":
                continue
            theirs = fn()
            assert len(theirs) == len(lists)  # type: ignore[arg-type]
            for ours, their in zip(lists, theirs):  # type: ignore[call-overload]
                assert ours.tolist() == (their if isinstance(their, list) else their.ids), peer

    return Case(name=name, setup=setup, check=check, bytes=num_bytes)


def warm() -> list[list[str]]:
    return [installed_texts(4_000_000)]


def new_text() -> list[list[str]]:
    """Slices of about 1 MB behind the text that the vocabulary was trained on."""
    texts = installed_texts(11_000_000 + NUM_SLICES * 1_000_000)
    slices: list[list[str]] = []
    size = begin = 0
    for i, text in enumerate(texts):
        size += len(text)
        if size < 10_000_000:
            begin = i + 1
        elif size >= 10_000_000 + (len(slices) + 1) * 1_000_000:
            slices.append(texts[begin : i + 1])
            begin = i + 1
    return slices[:NUM_SLICES]


BENCH = Bench("bpe_encode", [case("warm-4MB", warm, 4_000_000), case("new-text-1MB", new_text, 1_000_000)])
test_bpe_encode = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
