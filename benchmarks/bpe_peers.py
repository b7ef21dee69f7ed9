"""The peers of the tokenizer's benchmarks: functions from texts to ids, from ids to text, from texts to a vocabulary.

Every peer is called in the fastest way that it has: those that can return arrays do.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from herdkern.tokenizer import Tokenizer, train_bpe
from herdkern.tokenizer.export import from_byte_level, huggingface_json, merge_list, read_tiktoken
from herdkern.tokenizer.pretokenize import SPLIT_PATTERNS

Encode = Callable[[list[str]], Any]
Flat = tuple[np.ndarray, np.ndarray]  # ids of all texts end to end, and the number of each text's


class Files(NamedTuple):
    """A vocabulary on disk. name: "own", "cl100k" or "o200k". pattern: name of the split pattern."""

    name: str
    pattern: str
    tiktoken: str
    huggingface: str


class Peer(NamedTuple):
    """encode(texts) -> anything; flat(that) -> ids and counts; decode(prepare(ids of each text)) -> texts."""

    encode: Encode
    flat: Callable[[Any], Flat]
    prepare: Callable[[list[np.ndarray]], Any]
    decode: Callable[[Any], Any]


def write_files(folder: Path, name: str, pattern: str, ranks: dict[bytes, int]) -> Files:
    """The vocabulary as a tiktoken file and as a tokenizer.json without special tokens."""
    import base64

    tokenizer = Tokenizer(ranks, {}, split_pattern=SPLIT_PATTERNS[pattern])
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in tokenizer.mergeable_ranks.items()]
    plain = folder / f"{name}.tiktoken"
    plain.write_bytes(b"".join(lines))
    merges, left_over = merge_list(ranks, tokenizer._encoder)
    content = huggingface_json(ranks, {}, SPLIT_PATTERNS[pattern], merges, bool(left_over))
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return Files(name, pattern, str(plain), str(folder / f"{name}.json"))


def lists(prepared: list[np.ndarray]) -> list[list[int]]:
    return [ids.tolist() for ids in prepared]


def flat_lists(found: Sequence[Sequence[int]]) -> Flat:
    counts = np.array([len(ids) for ids in found], np.int64)
    return np.concatenate([np.asarray(ids, np.uint32) for ids in found]) if len(found) else np.empty(0), counts


def flat_arrays(found: tuple[Any, Any]) -> Flat:
    return np.asarray(found[0], np.uint32), np.diff(np.asarray(found[1], np.int64))


def flat_buffers(found: tuple[bytes, bytes]) -> Flat:
    return np.frombuffer(found[0], np.uint32), np.diff(np.frombuffer(found[1], np.uint64)).astype(np.int64)


def flat_encodings(found: Sequence[Any]) -> Flat:
    return flat_lists([encoding.ids for encoding in found])


def herdkern(files: Files) -> Peer:
    ours = Tokenizer(read_tiktoken(files.tiktoken), {}, split_pattern=SPLIT_PATTERNS[files.pattern])
    return Peer(
        lambda texts: ours.encode_to_numpy(texts, num_threads=1),
        flat_arrays,
        lambda rows: rows,
        lambda rows: [ours.decode_bytes(ids) for ids in rows],
    )


def tiktoken(files: Files) -> Peer:
    import tiktoken

    ranks = read_tiktoken(files.tiktoken)
    encoding = tiktoken.Encoding(
        files.name, pat_str=SPLIT_PATTERNS[files.pattern], mergeable_ranks=ranks, special_tokens={}
    )
    encode = encoding._core_bpe.encode_ordinary  # without Python's copy of the text for lone surrogates
    return Peer(
        lambda texts: list(map(encode, texts)), flat_lists, lists, lambda rows: list(map(encoding.decode_bytes, rows))
    )


def gigatoken(files: Files) -> Peer:
    import gigatoken

    scheme = {"llama3": "cl100k", "o200k": "o200k", "gpt2": "gpt2"}[files.pattern]
    fast = gigatoken.Tokenizer.from_tiktoken(files.tiktoken, pretokenizer=scheme, special_tokens={})

    def flat(found: Any) -> Flat:
        import awkward

        return np.asarray(awkward.flatten(found), np.uint32), np.asarray(awkward.num(found), np.int64)

    return Peer(
        lambda texts: fast.encode_batch(texts, parallel=False),
        flat,
        lambda rows: rows,
        lambda rows: [fast.decode(ids) for ids in rows],
    )


def snaptokens(files: Files) -> Peer:
    import snaptokens

    fast = snaptokens.Tokenizer.from_file(files.huggingface)
    return Peer(fast.encode_batch_flat, flat_buffers, lists, fast.decode_batch)


def fastokens(files: Files) -> Peer:
    import fastokens

    fast = fastokens.Tokenizer.from_file(files.huggingface)
    return Peer(fast.encode_batch_flat, flat_buffers, lists, fast.decode_batch)


def tokie(files: Files) -> Peer:
    import tokie

    fast = tokie.Tokenizer.from_json(files.huggingface)
    return Peer(lambda texts: fast.encode_batch(texts, False), flat_encodings, lists, fast.decode_batch)


def kitoken(files: Files) -> Peer:
    import kitoken

    fast = kitoken.Kitoken.from_tokenizers_file(files.huggingface)
    return Peer(fast.encode_all, flat_lists, lists, fast.decode_all)


def quicktok(files: Files) -> Peer:
    import quicktok

    if files.name == "own":
        raise ImportError("quicktok reads its own files alone")
    fast = quicktok.get_encoding(f"{files.name}_base")
    return Peer(lambda texts: fast.encode_batch(texts, 1), flat_arrays, lists, fast.decode_batch)


def rs_bpe(files: Files) -> Peer:
    from rs_bpe import openai

    if files.name == "own":
        raise ImportError("rs_bpe has the vocabularies of OpenAI alone")
    fast = getattr(openai, f"{files.name}_base")()
    return Peer(lambda texts: fast.encode_batch(texts)[0], flat_lists, lists, fast.decode_batch)


def tokenizers(files: Files) -> Peer:
    import tokenizers

    slow = tokenizers.Tokenizer.from_file(files.huggingface)
    return Peer(
        lambda texts: slow.encode_batch_fast(texts, add_special_tokens=False),
        flat_encodings,
        lists,
        lambda rows: slow.decode_batch(rows, skip_special_tokens=False),
    )


ENCODERS: dict[str, Callable[[Files], Peer]] = {
    "herdkern": herdkern,
    "tiktoken": tiktoken,
    "gigatoken": gigatoken,
    "snaptokens": snaptokens,
    "fastokens": fastokens,
    "tokie": tokie,
    "kitoken": kitoken,
    "quicktok-v1": quicktok,
    "rs-bpe": rs_bpe,
    "tokenizers": tokenizers,
}

Train = Callable[[list[str], int], dict[bytes, int]]
PATTERN = SPLIT_PATTERNS["llama3"]


def train_ours(texts: list[str], vocab_size: int, ties: Any = "huggingface") -> dict[bytes, int]:
    return train_bpe(texts, vocab_size, ties=ties, special_tokens=(), num_threads=1).mergeable_ranks


def train_ours_by_rank(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    return train_ours(texts, vocab_size, "tiktoken")


def train_tokenizers(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return {from_byte_level(token): rank for token, rank in json.loads(tokenizer.to_str())["model"]["vocab"].items()}


def train_rustbpe(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=PATTERN)
    return {bytes(token): rank for token, rank in tokenizer.get_mergeable_ranks()}


def train_bpeasy(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    import bpeasy

    return bpeasy.train_bpe(iter(texts), PATTERN, 1 << 20, vocab_size)


def train_gigatoken(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """It cuts words in its own way, so that its merges are others."""
    import gigatoken

    tokens, _ = gigatoken.train_bpe("\0".join(texts).encode(), vocab_size, [], separator=b"\0")
    return {token: rank for rank, token in tokens.items()}


def train_sentencepiece(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """Another task: code points, words cut at spaces, nothing of lines over 4192 bytes."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines()),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return {processor.id_to_piece(i).encode(): i for i in range(processor.get_piece_size())}


TRAINERS: dict[str, Train] = {
    "herdkern": train_ours,
    "herdkern-tiktoken-ties": train_ours_by_rank,
    "rustbpe": train_rustbpe,
    "tokenizers": train_tokenizers,
    "bpeasy": train_bpeasy,
    "gigatoken": train_gigatoken,
    "sentencepiece": train_sentencepiece,
}
SAME_MERGES = {"tokenizers": "herdkern", "rustbpe": "herdkern-tiktoken-ties", "bpeasy": "herdkern-tiktoken-ties"}
OTHER_TASK = {
    "herdkern-tiktoken-ties": "the same work with the other rule for ties, for the comparison of merges",
    "sentencepiece": "another task: code points, words cut at spaces, lines over 4192 bytes left out",
}
