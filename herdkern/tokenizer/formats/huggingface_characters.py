"""tokenizer.json files that were converted from SentencePiece: their merges, each token once.

The converter writes every split of every piece as a merge. Only one of them ever happens: the one that greedy merging
of the piece's own characters ends with.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from herdkern.tokenizer.formats.huggingface import merges_as_text, vocabulary_of
from herdkern.tokenizer.formats.json_file import integer, mapping, read_json, text
from herdkern.tokenizer.formats.merge_recovery import Merges, Skipped, recover_merges

WHITESPACE = "\n\t\r \u2581"


def read_merges(path: Path | str) -> tuple[Merges, int]:
    """The merges of a BPE tokenizer.json over characters, in order, and how many the file lists.

    Tokens that are runs of one whitespace character are skipped where the file lists them before all else: they were
    put in by hand. Raises: OSError; ValueError saying what is no such file.
    """
    content = read_json(path)
    try:
        return _merges_of(mapping(mapping(content, "the file").get("model"), "model"))
    except ValueError as e:
        raise ValueError(f"read_merges: {path}: {e}") from e


def _merges_of(model: Mapping[str, Any]) -> tuple[Merges, int]:
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"must be BPE, got {str(model['type'])[:80]}; other models have no merges to read")
    ids = {text(name, "a token"): integer(i, f"the id of {name!r}") for name, i in vocabulary_of(model).items()}
    listed = merges_as_text(model)
    order: dict[str, None] = {}  # what the merges make, in the order in which it is first made
    for left, right in listed:
        order.setdefault(left + right)
    unknown = next((made for made in order if made not in ids), None)
    if unknown is not None:  # it may be ""
        raise ValueError(f"merges must make tokens of the vocabulary, got {unknown!r:.80}")
    by_hand: list[str] = []
    learnt: list[str] = []
    for made in order:
        is_run = len(made) > 1 and made[0] in WHITESPACE and set(made) == {made[0]}
        (by_hand if is_run and not learnt else learnt).append(made)
    singles = [name for name in ids if len(name) == 1]
    tokens = [*singles, *learnt]
    merges = recover_merges([token.encode() for token in tokens], [ids[token] for token in tokens], characters=True)
    reason = "a run of one whitespace character, put in by hand"
    skipped = [Skipped(token=token.encode(), token_id=ids[token], reason=reason) for token in by_hand]
    return Merges(left=merges.left, right=merges.right, made=merges.made, skipped=(*merges.skipped, *skipped)), len(
        listed
    )
