"""Where batches come from, and which of their sequences a step and a rank take: pure functions of the data position."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from herdkern.train.batch import Batch, build_batch
from herdkern.train.config import TrainConfig
from herdkern.train.ramp import RampPhase, TokenStream


class BatchSource(Protocol):
    """Where batches come from: a pure function of the numbers of their sequences."""

    def batch(self, first: int, count: int) -> Batch:
        """Sequences first .. first + count - 1 as one packed batch."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the sequences depend on, as JSON values; compared when a run is resumed."""
        ...


class SequenceSampler(Protocol):
    """herdkern.data.mix.TokenSampler, or anything else that numbers its sequences."""

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence, the last target not counted."""
        ...

    def sequence(self, t: int) -> tuple[Any, Any]:
        """Tokens (length + 1,) and document borders of sequence t."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the sequences depend on, as JSON values."""
        ...


class PackedBatches:
    """Batches of next-token prediction from a sampler, masked as `config` says."""

    def __init__(self, sampler: SequenceSampler, config: TrainConfig, *, device: torch.device | str = "cpu") -> None:
        self.sampler = sampler
        self.config = config
        self.device = device
        self._stream = TokenStream(sampler)

    def batch(self, first: int, count: int) -> Batch:
        """Sequences first .. first + count - 1 as one packed batch."""
        return self._build([self.sampler.sequence(t) for t in range(first, first + count)])

    def batch_at(self, token: int, count: int, seq_len: int) -> Batch:
        """`count` sequences of `seq_len` tokens from that token of the stream on, as one packed batch."""
        return self._build([self._stream.cut(token + i * seq_len, seq_len) for i in range(count)])

    def _build(self, sequences: list[tuple[Any, Any]]) -> Batch:
        return build_batch(
            sequences,
            document_mask=self.config.document_mask,
            mask_border_targets=self.config.mask_border_targets,
            reset_positions=self.config.reset_positions,
            device=self.device,
        )

    def fingerprint(self) -> dict[str, Any]:
        """What the sampler's sequences depend on."""
        return self.sampler.fingerprint()


@dataclass(frozen=True, kw_only=True)
class StepData:
    """The sequences of one step: `phase.batch_size` of `phase.seq_len` tokens from token `position` of the data on.

    micro_batch_size: sequences of a micro-batch; 0: all that a rank has.  by_token: cut from the stream of tokens (the
    length changes in the run), else taken by their numbers.
    """

    position: int
    phase: RampPhase
    micro_batch_size: int
    by_token: bool

    def micro_batches(self, source: BatchSource, rank: int = 0, num_ranks: int = 1) -> list[Batch]:
        """Those of data-parallel rank `rank`: the sequences of a step are dealt out in order, as many to each."""
        share = self.phase.batch_size // num_ranks
        size = self.micro_batch_size or share
        seq_len = self.phase.seq_len
        numbers = range(rank * share, (rank + 1) * share, size)
        if not self.by_token:
            return [source.batch(self.position // seq_len + i, size) for i in numbers]
        stream: Any = source  # has batch_at: Trainer has looked for it
        return [stream.batch_at(self.position + i * seq_len, size, seq_len) for i in numbers]


class DataPosition:
    """Where in the data a run is, in tokens, and which stretches it has learned to leave out."""

    def __init__(self) -> None:
        self.token = 0
        self.left_out: list[tuple[int, int]] = []  # (first token, how many)

    def next(self) -> int:
        """The first token of the next step; stretches to leave out are passed over."""
        while lengths := [length for first, length in self.left_out if first == self.token]:
            self.token += lengths[0]
        return self.token

    def skip_to(self, token: int) -> None:
        """Go on at `token`, if that lies ahead."""
        self.token = max(self.token, token)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {"token": self.token, "left_out": [list(one) for one in self.left_out]}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.token = state["token"]
        self.left_out = [(first, length) for first, length in state["left_out"]]
