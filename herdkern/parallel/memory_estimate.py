"""How much memory every pipeline rank of a layout needs at its highest moment, and for what. Needs no torch.

A rank's schedule is walked action by action; what an action makes, keeps and frees is said in memory_walk.py. Ranks of
the other axes hold as much as each other. Not counted: what a device, its libraries and the allocator take for
themselves (`Cluster.reserved_bytes`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from herdkern.model.config import ModelConfig
from herdkern.parallel.layout import Layout
from herdkern.parallel.memory_ledger import Ledger, Passage
from herdkern.parallel.memory_walk import GRADS, SCRATCH, SHARDS, WIDE, StageWalk
from herdkern.parallel.pipeline_schedule import layers_of_stages

PURPOSES = (
    "parameters",
    "parameter shards",
    "weight copies",
    "optimizer",
    "gradients",
    "gradient shards",
    "activations",
    "loss",
    "temporary",
    "batch and tables",
    "loss scratch",
)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """The highest moment of one pipeline rank. terms: bytes by purpose, all of PURPOSES."""

    pp_rank: int
    num_params: int
    terms: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.terms.values())

    @property
    def in_tensors(self) -> int:
        """Bytes of tensors alone: without the scratch memory of kernels, which is a bound and no tensor."""
        return self.total - self.terms["loss scratch"]


def estimate_memory(model: ModelConfig, layout: Layout, ranks: Sequence[int] | None = None) -> list[MemoryEstimate]:
    """The highest moment of a training step after the first, one for each of `ranks` (None: all pipeline ranks).

    Parameters, moments, the sum of the gradients: fp32; activations and what meets them: layout.dtype.
    Raises: ValueError if the pipeline has more stages than the model has layers, embedding and head together.
    """
    stages = layers_of_stages(model.num_layers, layout.pp, layout.num_chunks)
    schedule = layout.schedule()
    last = len(stages) - 1
    found = []
    for rank in range(layout.pp) if ranks is None else ranks:
        held = range(rank, len(stages), layout.pp)
        walks = {
            stage: StageWalk(model, layout, layers=len(stages[stage]), is_first=stage == 0, is_last=stage == last)
            for stage in held
        }
        num_params = sum(walk.weight for walk in walks.values())
        ledger = Ledger()
        for purpose, size in _static(model, layout, num_params, has_head=last in walks).items():
            ledger.add(purpose, size)
        passages = _Passages(walks, layout.num_microbatches)
        done = dict.fromkeys(held, 0)
        for kind, stage, _ in schedule.actions[rank]:
            ledger.run(passages.of(kind, stage, done[stage]))
            done[stage] += kind == "B"
        ledger.add(SHARDS if layout.fsdp else GRADS, 0)  # the optimizer's step needs nothing of its own
        terms = {purpose: ledger.at_peak.get(purpose, 0) for purpose in PURPOSES}
        assert sum(terms.values()) == ledger.peak, "a purpose is not listed"
        found.append(MemoryEstimate(pp_rank=rank, num_params=num_params, terms=terms))
    return found


def peak_rank(estimates: Sequence[MemoryEstimate]) -> MemoryEstimate:
    """The rank that needs most."""
    return max(estimates, key=lambda estimate: estimate.total)


def _static(model: ModelConfig, layout: Layout, num_params: int, *, has_head: bool) -> dict[str, int]:
    """What lives all step long."""
    tables = 2 * model.max_seq_len * (model.head_dim // 2) * WIDE  # cos and sin of the rotation
    ids = 3 * 8 * layout.rank_tokens * layout.num_microbatches  # tokens, targets, positions
    shard = -(-num_params // layout.shard_size)
    held = {"batch and tables": tables + ids, "optimizer": 2 * WIDE * shard}
    if layout.fsdp:
        held["parameters"] = num_params * (2 if layout.dtype == "bf16" else WIDE)
        held["parameter shards"] = shard * WIDE
    else:
        held["parameters"] = num_params * WIDE
    if has_head:
        held["loss scratch"] = min(SCRATCH, layout.rank_tokens * -(-model.vocab_size // layout.tp) * WIDE)
    return held


class _Passages:
    """The passages of a rank's stages; a backward pass differs where gradients begin and where they are reduced."""

    def __init__(self, walks: Mapping[int, StageWalk], num_microbatches: int) -> None:
        self.walks = walks
        self.num_microbatches = num_microbatches
        self._made: dict[tuple[str, int, bool, bool], Passage] = {}

    def of(self, kind: str, stage: int, done: int) -> Passage:
        """The forward ("F") or backward ("B") passage of a stage that has `done` backward passes behind it."""
        first, last = done == 0, done == self.num_microbatches - 1
        key = (kind, stage, kind == "B" and first, kind == "B" and last)
        if key not in self._made:
            walk = self.walks[stage]
            self._made[key] = walk.forward() if kind == "F" else walk.backward(first=first, last=last)
        return self._made[key]


def as_table(estimates: Sequence[MemoryEstimate], *, unit: int = 1 << 30, name: str = "GiB") -> str:
    """Purposes down, ranks across, in `unit` bytes; purposes that nobody needs are left out."""
    ranks = [f"pp {estimate.pp_rank}" for estimate in estimates]
    lines = [f"{name + ' at the peak':18}" + "".join(f"{rank:>9}" for rank in ranks)]
    for purpose in PURPOSES:
        sizes = [estimate.terms[purpose] for estimate in estimates]
        if any(sizes):
            lines.append(f"{purpose:18}" + "".join(f"{size / unit:9.2f}" for size in sizes))
    lines.append(f"{'total':18}" + "".join(f"{estimate.total / unit:9.2f}" for estimate in estimates))
    return "\n".join(lines)
