"""How many ranks along each axis, and which rank sits where. Needs no torch before `mesh` is called.

Source: The Llama 3 Herd of Models, section 3.3.2 (arXiv:2407.21783): the order is [TP, CP, PP, DP], the innermost axis
has the most to send. rank = tp + TP * (cp + CP * (pp + PP * dp)), with small letters for the place along an axis.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("dp", "pp", "cp", "tp")  # outermost first: that of DeviceMesh


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The layout of a run: tp * cp * pp * dp ranks.

    dp_shard: over how many data-parallel ranks parameters, gradients and optimizer states are cut, the rest of dp holds
    copies (HSDP); 0: all of dp, 1: none are cut.  num_chunks: stages on each rank of a pipeline (V).
    microbatches_in_flight: consecutive micro-batches of a stage (N); 0: `best_group_size`.
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    dp_shard: int = 0
    num_chunks: int = 1
    microbatches_in_flight: int = 0

    def __post_init__(self) -> None:
        for name in ("tp", "cp", "pp", "dp", "num_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"ParallelConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.dp_shard < 0 or self.dp % (self.dp_shard or 1):
            raise ValueError(
                f"ParallelConfig: dp_shard must be 0 (all) or divide dp={self.dp}, got {self.dp_shard}; "
                "the ranks of dp form groups of dp_shard"
            )
        if self.num_chunks > 1 and self.pp == 1:
            raise ValueError(f"ParallelConfig: num_chunks must be 1 without a pipeline (pp=1), got {self.num_chunks}")
        if self.microbatches_in_flight < 0:
            raise ValueError(
                f"ParallelConfig: microbatches_in_flight must be 0 (chosen) or more, got {self.microbatches_in_flight}"
            )

    @property
    def world_size(self) -> int:
        """The ranks of the whole run."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def num_shards(self) -> int:
        """Into how many parts a parameter is cut by the data-parallel ranks: dp_shard, or dp where that is 0."""
        return self.dp_shard or self.dp

    def place(self, rank: int) -> dict[str, int]:
        """Where `rank` sits along each axis. Raises: ValueError if there is no such rank."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"ParallelConfig.place: rank must lie in [0, {self.world_size}), got {rank}")
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return {axis: found[axis] for axis in AXES}

    def rank(self, *, dp: int = 0, pp: int = 0, cp: int = 0, tp: int = 0) -> int:
        """The rank that sits there. Raises: ValueError if a place lies outside of its axis."""
        rank = 0
        for axis, at in zip(AXES, (dp, pp, cp, tp), strict=True):
            size = getattr(self, axis)
            if not 0 <= at < size:
                raise ValueError(f"ParallelConfig.rank: {axis} must lie in [0, {size}), got {at}")
            rank = rank * size + at
        return rank

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """The ranks that differ along `axes` only, every such group, in order of its first rank.

        groups("dp", "cp") are those whose gradients are summed. Raises: ValueError for an unknown axis.
        """
        if not axes or not set(axes) <= set(AXES):
            raise ValueError(f"ParallelConfig.groups: axes must be some of {', '.join(AXES)}, got {', '.join(axes)}")
        ranks = np.arange(self.world_size).reshape([getattr(self, axis) for axis in AXES])
        order = sorted(range(len(AXES)), key=lambda i: AXES[i] in axes)  # those that differ last
        rows = ranks.transpose(order).reshape(-1, math.prod(getattr(self, axis) for axis in set(axes)))
        return [tuple(row) for row in rows.tolist()]

    def mesh(self, device_type: str = "cpu") -> "DeviceMesh":
        """The DeviceMesh (dp, pp, cp, tp) of all ranks of the default process group, which must be there.

        Its groups wait as long as that one does.
        Raises: ValueError if the run has another number of ranks.
        """
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        from herdkern.parallel.group_timeout import as_long_as_the_run

        self.check_world_size(dist.get_world_size())
        with as_long_as_the_run():
            return init_device_mesh(device_type, (self.dp, self.pp, self.cp, self.tp), mesh_dim_names=AXES)

    def state_mesh(self, device_type: str = "cpu") -> "DeviceMesh":
        """The DeviceMesh (pp, dp_replicate, dp_shard, tp) by which parameters lie; dp_shard has the context ranks, too.

        Its groups wait as long as the default one does.
        Raises: ValueError if the run has another number of ranks.
        """
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        from herdkern.parallel.group_timeout import as_long_as_the_run

        self.check_world_size(dist.get_world_size())
        ranks = torch.arange(self.world_size).view(-1, self.num_shards, self.pp, self.cp, self.tp)
        ranks = ranks.permute(2, 0, 1, 3, 4).flatten(2, 3)
        with as_long_as_the_run():
            return DeviceMesh(device_type, ranks, mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp"))

    def check_world_size(self, world_size: int) -> None:
        """Raises: ValueError, with the factors, if that is not the number of ranks of this layout."""
        if world_size != self.world_size:
            raise ValueError(
                f"ParallelConfig: tp={self.tp} * cp={self.cp} * pp={self.pp} * dp={self.dp} = {self.world_size} must "
                f"be the number of ranks, got {world_size}; change one of the four or start other processes"
            )
