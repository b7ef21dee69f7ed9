"""The engine of a run in one process: what the loop of `Trainer` asks for, done by this process alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from herdkern.model.hf_weights import config_to_hf, hf_state
from herdkern.model.transformer import Transformer
from herdkern.train.average import WeightAverage
from herdkern.train.batch import IGNORE, Batch
from herdkern.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from herdkern.train.config import TrainConfig
from herdkern.train.guard import first_bad_tensor
from herdkern.train.metrics import measured_peak_flops
from herdkern.train.objective import Objective
from herdkern.train.optimizer import build_adamw, load_optimizer_tensors, optimizer_tensors, total_norm
from herdkern.train.recompute import recompute_activations
from herdkern.train.source import BatchSource, StepData

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
T = TypeVar("T")


class Engine(Protocol):
    """What computes the steps of a run: one process, or all ranks together (`herdkern.train.parallel_engine`).

    All ranks make the same calls in the same order and get the same answers, micro-batches apart.
    num_ranks: of the run.  is_first: of this process; it alone writes metrics and shows a bar.  module: what `evaluate`
    of Trainer is given.  average: of the weights.
    """

    num_ranks: int
    is_first: bool
    module: Any
    average: WeightAverage

    def micro_batches(self, source: BatchSource, data: StepData) -> list[Batch]:
        """Those of this process."""

    def accumulate(self, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        """Gradients of the mean loss over all targets of a step, summed in fp32; that loss and the mean metrics."""

    def replicas(self) -> tuple[int, int]:
        """This rank's place among the data-parallel ranks, and their number."""

    def traced(self) -> Sequence[tuple[int, nn.Module]]:
        """The modules that compute here, with the number of their stage."""

    def replay(self, batch: Batch, batches: Sequence[Batch]) -> None:
        """Compute gradients of one micro-batch as in a step of `batches`, and let them go."""

    def copies(self, *, gradients: bool) -> Mapping[str, Mapping[str, Tensor]]:
        """Group of ranks -> name -> a tensor whose bits are the same on all ranks of the group: gradients, or what
        stays from step to step."""

    def gather(self, value: Any) -> list[Any]:
        """What all ranks gave, in their order."""

    def update(self, lr: float) -> float:
        """One step of the optimizer, clip included; the norm before the clip. Nothing changes if it is not finite."""

    def grad_norm(self) -> float:
        """The global norm of all gradients."""

    def zero_grad(self) -> None:
        """Let the gradients go."""

    def first_bad(self, batches: Sequence[Batch]) -> str:
        """The first tensor that is not finite, by name."""

    def update_average(self) -> None:
        """Take the present weights into the average."""

    def loss(self, batch: Batch) -> float:
        """The mean loss of one batch, which all ranks have, without gradients."""

    def num_wrong(self, batch: Batch) -> int:
        """How many targets of one batch, which all ranks have, are not the most likely token."""

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks that have other micro-batches."""

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, whether any rank has raised it."""

    def first_alone(self, function: Callable[[], T]) -> T | None:
        """What `function` returns on the first rank, None on the others; what it raises there is raised on all."""

    def peak_flops(self) -> float:
        """FLOP/s that all ranks reach together in a matrix product, measured."""

    def save(self, root: Path, step: int, state: Mapping[str, Any], keep_last: int) -> Path:
        """Write root/step-N, or begin to; `state` is the loop's."""

    def wait(self) -> None:
        """Until what was begun is written. Raises: OSError if it was not."""

    def latest(self, root: Path) -> Path | None:
        """The newest checkpoint that passes its checksums."""

    def load(self, folder: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Put weights, optimizer, average and generators back; returns the loop's state, which `check` may refuse."""


class OneProcess:
    """The engine of a run in one process. Arguments: as those of `Trainer`."""

    num_ranks = 1
    is_first = True

    def __init__(self, model: nn.Module, config: TrainConfig, objective: Objective) -> None:
        self.module = model
        self.config = config
        self.objective = objective
        self.average = WeightAverage()
        self.optimizer = build_adamw(model, config.optimizer)
        if isinstance(model, Transformer):
            model.compute_dtype = TORCH_DTYPES[config.dtype]
            recompute_activations(model, config.recompute)

    def micro_batches(self, source: BatchSource, data: StepData) -> list[Batch]:
        """The micro-batches of a step."""
        return data.micro_batches(source)

    def accumulate(self, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        """Gradients of the mean loss over all targets of `batches`, summed in fp32; that loss and the mean metrics."""
        num_targets = max(1, sum(batch.num_targets for batch in batches))
        loss = 0.0
        extra: dict[str, float] = {}
        for batch in batches:
            loss_sum, metrics = self.objective(self.module, batch)
            (loss_sum / num_targets).backward()
            loss += float(loss_sum.detach()) / num_targets
            for name, value in metrics.items():
                extra[name] = extra.get(name, 0.0) + value / len(batches)
        return loss, extra

    def replicas(self) -> tuple[int, int]:
        """The only one."""
        return 0, 1

    def traced(self) -> Sequence[tuple[int, nn.Module]]:
        """The model."""
        return [(0, self.module)]

    def replay(self, batch: Batch, batches: Sequence[Batch]) -> None:
        """Compute gradients of one micro-batch as in a step of `batches`, and let them go."""
        loss_sum, _ = self.objective(self.module, batch)
        (loss_sum / max(1, sum(one.num_targets for one in batches))).backward()
        self.zero_grad()

    def copies(self, *, gradients: bool) -> Mapping[str, Mapping[str, Tensor]]:
        """None."""
        return {}

    def gather(self, value: Any) -> list[Any]:
        """The value: there are no other ranks."""
        return [value]

    def update(self, lr: float) -> float:
        """One step of the optimizer, clip included; the norm before the clip. Nothing changes if it is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return float("nan") if self.optimizer.grad_norm is None else self.optimizer.grad_norm

    def grad_norm(self) -> float:
        """The global norm of all gradients."""
        return total_norm(self.module)

    def zero_grad(self) -> None:
        """Let the gradients go."""
        self.optimizer.zero_grad(set_to_none=True)

    def first_bad(self, batches: Sequence[Batch]) -> str:
        """The first tensor that is not finite, by name."""
        return first_bad_tensor(self.module, self.objective, batches)

    def update_average(self) -> None:
        """Take the present weights into the average."""
        self.average.update(self.module)

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """The mean loss of one batch, without gradients."""
        return float(self.objective(self.module, batch)[0]) / max(1, batch.num_targets)

    @torch.no_grad()
    def num_wrong(self, batch: Batch) -> int:
        """How many targets of one batch are not the most likely token."""
        counts = batch.targets != IGNORE
        hidden = self.module(batch.tokens, batch.cu_seqlens, batch.positions)[counts]
        model: Any = self.module  # has a head: a run with stages of long context trains a language model
        return int((model.logits(hidden).argmax(-1) != batch.targets[counts]).sum())

    def total(self, values: Sequence[float]) -> list[float]:
        """The values: there are no other ranks."""
        return list(values)

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """The flags: there are no other ranks."""
        return flags

    def first_alone(self, function: Callable[[], T]) -> T:
        """What `function` returns."""
        return function()

    def peak_flops(self) -> float:
        """FLOP/s of a matrix product, measured."""
        device = next(self.module.parameters()).device.type
        return measured_peak_flops(TORCH_DTYPES[self.config.dtype], device=device)

    def save(self, root: Path, step: int, state: Mapping[str, Any], keep_last: int) -> Path:
        """Write root/step-N; on return it is durable."""
        tensors: dict[str, dict[str, Tensor]] = {
            "model": dict(self._named_weights()),
            "optimizer": optimizer_tensors(self.optimizer, self.module),
        }
        if self.average.count:
            tensors["average"] = self.average.mean
        files = {"config.json": config_to_hf(self.module.config)} if isinstance(self.module, Transformer) else {}
        rng = {"torch": bytes(torch.get_rng_state().tolist()).hex()}
        kept = {**state, "average_count": self.average.count, "rng": rng}
        return save_checkpoint(root, step, tensors=tensors, state=kept, files=files, keep_last=keep_last)

    def wait(self) -> None:
        """Nothing is left to write."""

    def latest(self, root: Path) -> Path | None:
        """The newest checkpoint that passes its checksums."""
        return latest_checkpoint(root)

    def load(self, folder: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Put weights, optimizer, average and generator back; returns the loop's state."""
        checkpoint = load_checkpoint(folder)
        state = checkpoint.state
        check(state)
        weights = self._named_weights()
        if set(weights) != set(checkpoint.tensors["model"]):
            odd = min(set(weights) ^ set(checkpoint.tensors["model"]))
            raise ValueError(f"Trainer: {folder} must hold the parameters of this model, they differ in {odd!r}")
        with torch.no_grad():
            for name, param in weights.items():
                saved = checkpoint.tensors["model"][name]
                if saved.shape != param.shape:
                    raise ValueError(
                        f"Trainer: {name} in {folder} must be {tuple(param.shape)}, got {tuple(saved.shape)}"
                    )
                param.copy_(saved)
        self.optimizer.state.clear()
        load_optimizer_tensors(self.optimizer, self.module, checkpoint.tensors.get("optimizer", {}))
        self.average.load(checkpoint.tensors.get("average", {}), state["average_count"])
        if "rng" in state:  # many ranks have one each
            torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["rng"]["torch"])), dtype=torch.uint8))
        return state

    def _named_weights(self) -> dict[str, Tensor]:
        """The parameters by their names on disk: Hugging Face's for a Transformer, so that checkpoints open there."""
        return hf_state(self.module) if isinstance(self.module, Transformer) else dict(self.module.named_parameters())
