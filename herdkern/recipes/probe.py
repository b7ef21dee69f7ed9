"""What stages of long context are judged by: held-out text at the old length, and needles in it at the new one."""

from collections.abc import Mapping, Sequence

import numpy as np

from herdkern.data.mix import TokenSource
from herdkern.tokenizer import Tokenizer
from herdkern.train.batch import IGNORE, Batch, build_batch
from herdkern.train.long_context import FEWEST_EXAMPLES

EXAMPLES = 64  # of each source, if it is long enough
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CITIES = ("Oslo", "Lima", "Cairo", "Quito", "Hanoi")


class HeldOutProbe:
    """Examples of the sources `datasets`: windows of `short_length` tokens, and needles in the longest of them.

    Raises: ValueError if no source gives FEWEST_EXAMPLES windows of 2 tokens or more.
    """

    def __init__(self, datasets: Sequence[TokenSource], tokenizer: Tokenizer, short_length: int, seed: int = 0) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self._short: dict[str, list[Batch]] = {}
        for number, dataset in enumerate(datasets):
            length = min(short_length, dataset.num_tokens // FEWEST_EXAMPLES - 1)
            count = min(EXAMPLES, dataset.num_tokens // (length + 1)) if length > 1 else 0
            starts = np.linspace(0, dataset.num_tokens - length - 1, count).astype(int).tolist() if count else []
            windows = [build_batch([dataset.window(start, length + 1)]) for start in starts]
            kept = [batch for batch in windows if batch.num_targets]
            if len(kept) >= FEWEST_EXAMPLES:
                self._short[f"heldout {number}"] = kept
        if not self._short:
            raise ValueError(
                f"HeldOutProbe: held-out text must have a source of {FEWEST_EXAMPLES} windows, got "
                f"{[dataset.num_tokens for dataset in datasets]} tokens; hold out more"
            )
        self._haystack = max(datasets, key=lambda dataset: dataset.num_tokens)

    def short(self) -> Mapping[str, Sequence[Batch]]:
        """Source -> its windows."""
        return self._short

    def needles(self, length: int) -> Mapping[tuple[int, float], Batch]:
        """A needle at each of DEPTHS of a text of `length` tokens; the targets that count are the answer."""
        rng = np.random.default_rng([self.seed, length])
        numbers = rng.integers(1000, 10_000, len(DEPTHS))
        cases = zip(DEPTHS, CITIES, numbers, strict=True)
        return {(length, depth): self._needle(length, depth, city, int(number)) for depth, city, number in cases}

    def _needle(self, length: int, depth: float, city: str, number: int) -> Batch:
        encode = self.tokenizer.encode_ordinary
        question, answer = encode(f"\nThe magic number of {city} is"), encode(f" {number}")
        needle = encode(f"\nThe magic number of {city} is {number}.\n")
        room = length - len(needle) - len(question) - len(answer) + 1
        if room < 1:
            raise ValueError(f"HeldOutProbe: length must be above {length - room} for a needle, got {length}")
        source = self._haystack
        text, _ = source.window(0, min(room, source.num_tokens))
        hay = np.resize(text, room)  # a short source repeats
        at = round(depth * room)
        ids = np.concatenate([hay[:at], needle, hay[at:], question, answer]).astype(np.int64)
        made = build_batch([(ids, np.array([0, len(ids)], np.int32))])
        made.targets[: -len(answer)] = IGNORE
        return Batch(**{**vars(made), "num_targets": len(answer)})
