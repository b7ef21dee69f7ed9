"""The engine of a run on many ranks: the loop of `Trainer` over a `ParallelModel`, all ranks in step.

Parameters lie in parts (DTensors); AdamW and the average work on the part of a rank as on plain tensors, with nothing
sent but the global norm. Checkpoints hold whole tensors by their names and can be read onto another layout.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from herdkern.engine import read_json
from herdkern.model.hf_weights import config_to_hf
from herdkern.model.transformer import Transformer
from herdkern.parallel.compose import ParallelModel
from herdkern.parallel.config import ParallelConfig
from herdkern.parallel.data import local
from herdkern.train.average import WeightAverage
from herdkern.train.batch import Batch
from herdkern.train.checkpoint import read_manifest
from herdkern.train.config import TrainConfig
from herdkern.train.guard import first_bad_of_ranks
from herdkern.train.metrics import measured_peak_flops
from herdkern.train.one_process import TORCH_DTYPES
from herdkern.train.optimizer import adamw_of
from herdkern.train.recompute import recompute_activations
from herdkern.train.sharded_checkpoint import Saver
from herdkern.train.sharded_files import index_of
from herdkern.train.sharded_load import latest_sharded, load_sharded
from herdkern.train.source import BatchSource, StepData

T = TypeVar("T")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ParallelEngine:
    """The engine of a run on the ranks of `layout`; every rank makes it, with the whole model, at the same time.

    Raises: ValueError if the model, the batch or the number of ranks does not fit the layout.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, layout: ParallelConfig) -> None:
        if not isinstance(model, Transformer):
            raise ValueError(f"Trainer: model must be a Transformer with parallel, got {type(model).__name__}")
        _check_batches(config, layout)
        self.config, self.layout = config, layout
        self.num_ranks, self.is_first = dist.get_world_size(), dist.get_rank() == 0
        self.config_json = config_to_hf(model.config)
        model.compute_dtype = TORCH_DTYPES[config.dtype]
        recompute_activations(model, config.recompute)
        self.module = ParallelModel(model, layout)
        self.average = WeightAverage()
        self.params = {_name_on_disk(name, model): param for name, param in self.module.named_parameters().items()}
        self.parts = {name: nn.Parameter(local(param.detach())) for name, param in self.params.items()}
        for part in self.parts.values():
            if part.dtype in (torch.bfloat16, torch.float16):
                part.grad_dtype = torch.float32
        # the norm is that of all ranks, so the clip is not the optimizer's
        self.optimizer = adamw_of(list(self.parts.values()), config.optimizer, max_grad_norm=0.0)
        self._saver: Saver | None = None

    def micro_batches(self, source: BatchSource, data: StepData) -> list[Batch]:
        """Those of this data-parallel rank."""
        return data.micro_batches(source, self.module.mesh["dp"].get_local_rank(), self.layout.dp)

    def accumulate(self, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        """Gradients of the mean loss over all targets of all ranks; that loss, and no further metrics."""
        return float(self.module.step(batches)), {}

    def replicas(self) -> tuple[int, int]:
        """This rank's place among the data-parallel ranks, and their number."""
        return self.module.mesh["dp"].get_local_rank(), self.layout.dp

    def traced(self) -> Sequence[tuple[int, nn.Module]]:
        """The stages of this rank."""
        return [(stage.index, stage) for stage in self.module.stages]

    def replay(self, batch: Batch, batches: Sequence[Batch]) -> None:
        """Compute gradients of one micro-batch as in a step of `batches`, and let them go."""
        self.module.replay(batch, batches)
        self.zero_grad()

    def copies(self, *, gradients: bool) -> Mapping[str, Mapping[str, Tensor]]:
        """Gradients, or weights, states of the optimizer and averages, that other ranks hold, too."""
        held: dict[str, dict[str, Tensor]] = {}
        for axis in ("dp_replicate", "tp", "pp"):
            mesh = self.module.state_mesh[axis]
            names = [name for name in self.parts if self.module.has_copies(name, axis)]
            if mesh.size() > 1 and names:
                ranks = dist.get_process_group_ranks(mesh.get_group())
                found = [self._gradient(name) if gradients else self._held(name) for name in names]
                held[f"{axis} {ranks}"] = {key: tensor for some in found for key, tensor in some.items()}
        return held

    def gather(self, value: Any) -> list[Any]:
        """What all ranks gave, in their order."""
        gathered: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(gathered, value)
        return gathered

    def update(self, lr: float) -> float:
        """One step of the optimizer, clip included; the norm before the clip. Nothing changes if it is not finite."""
        norm = float(self.module.clip_gradients(self.config.optimizer.max_grad_norm))
        if math.isfinite(norm):
            for name, part in self.parts.items():
                gradient = self.params[name].grad
                part.grad = None if gradient is None else local(gradient)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        return norm

    def grad_norm(self) -> float:
        """The global norm of all gradients."""
        return float(self.module.clip_gradients(0.0))

    def zero_grad(self) -> None:
        """Let the gradients go."""
        for tensor in (*self.params.values(), *self.parts.values()):
            tensor.grad = None

    def first_bad(self, batches: Sequence[Batch]) -> str:
        """The first tensor of any rank that is not finite, by name and rank."""
        return first_bad_of_ranks(self.module, batches)

    def update_average(self) -> None:
        """Take the present weights into the average, each rank its parts."""
        self.average.update(self.parts)

    def loss(self, batch: Batch) -> float:
        """The mean loss of one batch, which all ranks have."""
        return float(self.module.evaluate([batch]))

    def num_wrong(self, batch: Batch) -> int:
        """How many targets of one batch, which all ranks have, are not the most likely token."""
        return self.module.num_wrong(batch)

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks that have other micro-batches."""
        summed = torch.tensor(values, dtype=torch.float64, device=self.module.device)
        dist.all_reduce(summed, group=self.module.mesh["dp"].get_group())
        return list(summed.tolist())

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, whether any rank has raised it."""
        raised = torch.tensor(flags, dtype=torch.int32, device=self.module.device)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return tuple(bool(one) for one in raised.tolist())

    def first_alone(self, function: Callable[[], T]) -> T | None:
        """What `function` returns on the first rank, None on the others; what it raises there is raised on all."""
        result, error = None, None
        if self.is_first:
            try:
                result = function()
            except (RuntimeError, OSError, ValueError) as e:
                error = e
        said: list[Any] = [None if error is None else (type(error).__name__, str(error))]
        dist.broadcast_object_list(said, src=0)
        if error is not None:
            raise error
        if said[0] is not None:
            raise RuntimeError(f"rank 0: {said[0][0]}: {said[0][1]}")
        return result

    def peak_flops(self) -> float:
        """FLOP/s that all ranks reach together in a matrix product, measured at the same time."""
        mine = measured_peak_flops(TORCH_DTYPES[self.config.dtype], device=self.module.device.type)
        summed = torch.tensor(mine, dtype=torch.float64, device=self.module.device)
        dist.all_reduce(summed)
        return float(summed)

    def save(self, root: Path, step: int, state: Mapping[str, Any], keep_last: int) -> Path:
        """Begin to write root/step-N; training goes on when its tensors are copied."""
        if self._saver is None:
            self._saver = Saver(root, keep_last=keep_last)
        kept = {**state, "average_count": self.average.count, "parallel": dataclasses.asdict(self.layout)}
        rank_state = {"rng": {"torch": bytes(torch.get_rng_state().tolist()).hex()}}
        return self._saver.save(step, self._tensors(), kept, rank_state, {"config.json": self.config_json})

    def wait(self) -> None:
        """Until the last checkpoint is written. Raises: OSError if it was not."""
        if self._saver is not None:
            self._saver.wait()

    def latest(self, root: Path) -> Path | None:
        """The newest checkpoint that passes its checksums, the same on all ranks."""
        self.wait()
        return latest_sharded(root)

    def load(self, folder: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Put weights, optimizer, average and, on as many ranks, generators back; returns the loop's state."""
        state = read_json(folder / "state.json")
        check(state)
        zeros = {name: torch.zeros_like(part, dtype=torch.float64) for name, part in self.parts.items()}
        self.average.load(zeros if state["average_count"] else {}, state["average_count"])
        tensors = self._tensors()
        stored = index_of(folder, read_manifest(folder)["files"])
        if not any(stem == "optimizer" for stem, _ in stored):  # of one process that had made no update
            del tensors["optimizer"]
            self.optimizer.state.clear()
        _, rank_state = load_sharded(folder, tensors)
        if rank_state is not None:
            rng = bytes.fromhex(rank_state["rng"]["torch"])
            torch.set_rng_state(torch.tensor(list(rng), dtype=torch.uint8))
        return state

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by file stem and name: whole tensors, of which this rank has its parts."""
        tensors = {"model": {name: self._whole(name, part) for name, part in self.parts.items()}}
        tensors["optimizer"] = {}
        for name, part in self.parts.items():
            kept = self._optimizer_state(part)
            for key, value in kept.items():
                tensors["optimizer"][f"{key}.{name}"] = value if key == "step" else self._whole(name, value)
        if self.average.count:
            tensors["average"] = {name: self._whole(name, mean) for name, mean in self.average.mean.items()}
        return tensors

    def _gradient(self, name: str) -> dict[str, Tensor]:
        gradient = self.params[name].grad
        return {} if gradient is None else {f"reduced gradient of {name}": gradient}

    def _held(self, name: str) -> dict[str, Tensor]:
        """What this rank keeps of one parameter, by what it is."""
        part = self.parts[name]
        held: dict[str, Tensor] = {f"weight {name}": part}
        if part in self.optimizer.state:
            held |= {f"{key} of {name}": value for key, value in self.optimizer.state[part].items() if key != "step"}
        if self.average.count:
            held[f"average of {name}"] = self.average.mean[name]
        return held

    def _optimizer_state(self, part: Tensor) -> dict[str, Tensor]:
        """The state of one part, made if there was no update yet."""
        state: dict[str, Tensor] = self.optimizer.state[part]
        if not state:
            wide = torch.promote_types(part.dtype, torch.float32)
            state |= {key: torch.zeros_like(part, dtype=wide) for key in _MOMENTS}
            state["step"] = torch.zeros((), dtype=torch.float32)
            if wide != part.dtype:
                state["master"] = part.detach().to(wide)
        return state

    def _whole(self, name: str, part: Tensor) -> Tensor:
        """`part` as the DTensor that it is a part of, laid as the parameter of that name; shares its memory."""
        param, part = self.params[name], part.detach()
        if not isinstance(param, DTensor):
            return part
        return DTensor.from_local(
            part, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )


def _name_on_disk(name: str, model: Transformer) -> str:
    """A tied head is the embedding, also where it lies on another rank."""
    return "embed_tokens.weight" if model.config.tied_embeddings and name == "lm_head.weight" else name


def _check_batches(config: TrainConfig, layout: ParallelConfig) -> None:
    long = config.long_context
    sizes = [phase.batch_size for phase in config.ramp_plan().phases]
    tokens = config.ramp_plan().at(long.from_tokens).tokens_per_step
    stages = [long.phase(length, tokens).batch_size for length in long.lengths[1:]]
    for size in (*sizes, *stages):
        if size % layout.dp:
            remedy = "change batch_size or, in stages of long context, batch_multiple"
            raise ValueError(f"Trainer: batch_size must be a multiple of dp={layout.dp}, got {size}; {remedy}")
    for size in sizes:
        if config.micro_batch_size and size // layout.dp % config.micro_batch_size:
            raise ValueError(
                f"Trainer: micro_batch_size must divide the {size // layout.dp} sequences of a data-parallel rank, "
                f"got {config.micro_batch_size}"
            )
