"""Batch size and sequence length that change at given tokens, and the stream that sequences are cut from.

Source: Llama 3 (arXiv:2407.21783) section 3.4.1: 4 M tokens a batch in sequences of 4,096, after 252 M tokens 8 M in
sequences of 8,192, after 2.87 T tokens 16 M. A change takes effect at the first step that begins at or behind its
token; the learning rate stays a function of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Cut = tuple[NDArray[np.int64], NDArray[np.int32]]  # tokens (length + 1,) and document borders from 0 to length + 1


@dataclass(frozen=True, kw_only=True)
class RampPhase:
    """From token `from_tokens` on, a step sees batch_size sequences of seq_len tokens."""

    from_tokens: int
    batch_size: int
    seq_len: int

    def __post_init__(self) -> None:
        if self.from_tokens < 0 or self.batch_size < 1 or self.seq_len < 1:
            raise ValueError(
                "RampPhase: from_tokens must not be negative, batch_size and seq_len at least 1, "
                f"got {self.from_tokens}, {self.batch_size}, {self.seq_len}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one update sees."""
        return self.batch_size * self.seq_len


LLAMA3_RAMP = (
    RampPhase(from_tokens=0, batch_size=1024, seq_len=4096),
    RampPhase(from_tokens=252_000_000, batch_size=1024, seq_len=8192),
    RampPhase(from_tokens=2_870_000_000_000, batch_size=2048, seq_len=8192),
)


class Ramp:
    """Phases in the order of their tokens, the first from token 0: which is in force, and how steps and tokens relate.

    Raises: ValueError if there is no phase, the first does not begin at 0, or they do not rise.
    """

    def __init__(self, phases: Sequence[RampPhase]) -> None:
        starts = [phase.from_tokens for phase in phases]
        if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(f"Ramp: phases must begin at token 0 and rise, got {starts}")
        self.phases = tuple(phases)
        # (step, token) at which each phase begins; one that is jumped over by a long step begins where the next does
        self._begins = [(0, 0)]
        for before, phase in pairwise(self.phases):
            step, token = self._begins[-1]
            more = max(0, -(-(phase.from_tokens - token) // before.tokens_per_step))
            self._begins.append((step + more, token + more * before.tokens_per_step))

    def at(self, tokens: int) -> RampPhase:
        """The phase of a step that begins with `tokens` seen."""
        return next(phase for phase in reversed(self.phases) if phase.from_tokens <= tokens)

    def tokens_before(self, step: int) -> int:
        """Tokens seen before update number step + 1."""
        begin, token, phase = self._of_step(step)
        return token + (step - begin) * phase.tokens_per_step

    def steps_for(self, tokens: int) -> int:
        """The fewest steps that see `tokens` tokens."""
        for (step, token), phase, following in zip(
            self._begins, self.phases, [*self._begins[1:], (None, None)], strict=True
        ):
            if following[1] is None or tokens <= following[1]:
                return step + max(0, -(-(tokens - token) // phase.tokens_per_step))
        raise AssertionError("the last phase has no end")

    def _of_step(self, step: int) -> tuple[int, int, RampPhase]:
        begins = zip(self._begins, self.phases, strict=True)
        return next((begin, token, phase) for (begin, token), phase in reversed(list(begins)) if begin <= step)


class LongSequences(Protocol):
    """herdkern.data.mix.TokenSampler, or anything else that numbers sequences of one length."""

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence, the last target not counted."""
        ...

    def sequence(self, t: int) -> tuple[Any, Any]:
        """Tokens (seq_len + 1,) and document borders of sequence t."""
        ...


class TokenStream:
    """The sequences of a sampler end to end, to be cut at any token into any length.

    Sampler sequences are as long as the longest cut, so that a long context has long documents; a shorter cut is a
    piece of one. A cut over the end of one begins the next as another document.
    """

    def __init__(self, sampler: LongSequences) -> None:
        self.sampler = sampler
        self._last: tuple[int, Cut] | None = None  # pieces of one sequence follow one another

    def cut(self, cursor: int, length: int) -> Cut:
        """Tokens [cursor, cursor + length), the last target behind them, and their document borders."""
        tokens: list[NDArray[np.int64]] = []
        borders: list[int] = [0]
        done = 0
        while done < length:
            t, offset = divmod(cursor + done, self.sampler.seq_len)
            ids, ends = self._sequence(t)
            size = min(length - done, self.sampler.seq_len - offset)
            is_last = done + size == length
            tokens.append(ids[offset : offset + size + is_last])
            inside = ends[(ends > offset) & (ends < offset + size + is_last)] - offset
            borders += (inside + done).tolist()
            done += size
            borders.append(done + is_last)
        return np.concatenate(tokens), np.array(borders, np.int32)

    def _sequence(self, t: int) -> Cut:
        if self._last is None or self._last[0] != t:
            self._last = t, self.sampler.sequence(t)
        return self._last[1]
