"""The training loop: step, accumulate, guard, clip, update, average, log, save; resumed bit for bit after any kill.

All runs use it; what differs is the objective (objective.py) and where batches come from.
"""

import contextlib
import fcntl
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from herdkern import memory
from herdkern.engine import write_json_atomic
from herdkern.model.hf_weights import config_to_hf, hf_state
from herdkern.model.transformer import Transformer
from herdkern.train.average import WeightAverage
from herdkern.train.batch import Batch, build_batch
from herdkern.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from herdkern.train.config import TrainConfig
from herdkern.train.guard import NonFiniteError, first_bad_tensor
from herdkern.train.metrics import MFU_CONVENTION, MetricsLog, measured_peak_flops
from herdkern.train.objective import Objective, next_token_loss
from herdkern.train.optimizer import build_adamw, load_optimizer_tensors, optimizer_tensors, total_norm
from herdkern.train.ramp import RampPhase, TokenStream
from herdkern.train.recompute import recompute_activations
from herdkern.train.schedule import learning_rate

_FILL: Any = torch.utils.deterministic  # a module class of torch that declares its setting at run time
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
)  # schedulers send the first or the last before a time limit
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
class TrainResult:
    """How a call of `Trainer.fit` ended. interrupted: a signal came, a checkpoint was written, more steps are left."""

    step: int
    tokens: int
    interrupted: bool
    checkpoint: Path


class Trainer:
    """Trains `model` in `run_dir`, from its latest complete checkpoint if there is one.

    Writes training.json (the resolved configuration), metrics.jsonl and checkpoints/ there.

    evaluate: called every config.eval_every_steps with the model; its numbers join that step's metrics.
    progress: a bar on standard error; by default only on a terminal.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        source: BatchSource,
        run_dir: Path | str,
        *,
        objective: Objective = next_token_loss,
        evaluate: Callable[[Any], dict[str, float]] | None = None,
        progress: bool | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.source = source
        self.run_dir = Path(run_dir)
        self.objective = objective
        self.evaluate = evaluate
        self.progress = progress
        self.step = 0
        self.tokens = 0
        self.average = WeightAverage()
        self.optimizer = build_adamw(model, config.optimizer)
        self.metrics = MetricsLog(self.run_dir / "metrics.jsonl")
        self._skipped_in_a_row = 0
        self._peak_flops = 0.0
        self._stopping = False
        if config.eval_every_steps and evaluate is None:
            warnings.warn("Trainer: eval_every_steps has no effect without evaluate", stacklevel=2)
        self._ramp = config.ramp_plan()
        if config.ramp and not hasattr(source, "batch_at"):
            raise ValueError(
                f"Trainer: source must have batch_at where train.ramp is set, got {type(source).__name__}; "
                "take PackedBatches"
            )
        if isinstance(model, Transformer):
            model.compute_dtype = TORCH_DTYPES[config.dtype]
            recompute_activations(model, config.recompute)

    @property
    def checkpoints(self) -> Path:
        """The folder that holds step-N/."""
        return self.run_dir / "checkpoints"

    def fit(self) -> TrainResult:
        """Train to the last step, or to SIGTERM, SIGINT or SIGUSR1, and leave a checkpoint of where it ended.

        Raises: NonFiniteError as config.on_nonfinite says; ValueError if the run in run_dir had another
        configuration or other data; RuntimeError if another process trains in run_dir; OSError if a checkpoint
        cannot be written.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with (
            _locked(self.run_dir / "train.lock"),
            _deterministic(),
            self._on_signals(),
            _memory(self.config.reuse_memory) as how,
        ):
            saved = self.resume()
            write_json_atomic(self.run_dir / "training.json", {**self._resolved_config(), "memory": how})
            self._measure_peak()
            self.model.train()
            total = self.config.total_tokens
            disable = None if self.progress is None else not self.progress
            with tqdm(
                total=total,
                initial=self.tokens,
                unit="tok",
                unit_scale=True,
                disable=disable,
                desc="train",
            ) as bar:
                while self.step < self.config.steps and not self._stopping:
                    before = self.tokens
                    record = self._run_step()
                    bar.update(self.tokens - before)
                    bar.set_postfix(loss=record["loss"], lr=record["lr"], refresh=False)
                    every = self.config.checkpoint.every_steps
                    if every and self.step % every == 0:
                        saved = self.save()
            if saved is None or saved.name != f"step-{self.step}":
                saved = self.save()
        interrupted = self.step < self.config.steps
        return TrainResult(step=self.step, tokens=self.tokens, interrupted=interrupted, checkpoint=saved)

    def _run_step(self) -> dict[str, Any]:
        """One update, its line in metrics.jsonl included."""
        begin = time.perf_counter()
        config, update = self.config, self.step + 1
        batches = self._batches(self._ramp.at(self.tokens))
        loss, extra = self._accumulate(batches)
        lr = learning_rate(update, config.schedule, steps=config.steps)
        grad_norm = self._update(lr) if math.isfinite(loss) else total_norm(self.model)
        skipped = self._guard(loss, grad_norm, batches)
        self.optimizer.zero_grad(set_to_none=True)
        self.step = update
        self.tokens += sum(batch.tokens.numel() for batch in batches)
        if self._averages_now():
            self.average.update(self.model)
        seconds = time.perf_counter() - begin
        record = {
            "step": update,
            "tokens": self.tokens,
            "loss": loss if math.isfinite(loss) else None,
            "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            **extra,
            **({"skipped": skipped} if skipped else {}),
            **self._speed(batches, seconds),
        }
        if self.evaluate and config.eval_every_steps and update % config.eval_every_steps == 0:
            self.model.eval()
            record.update(self.evaluate(self.model))
            self.model.train()
            self._measure_peak()
        self.metrics.append(record)
        return record

    def _batches(self, phase: RampPhase) -> list[Batch]:
        """The micro-batches of a step."""
        size = self.config.micro_batch_size or phase.batch_size
        pieces = range(0, phase.batch_size, size)
        if not self.config.ramp:
            return [self.source.batch(self.step * phase.batch_size + i, size) for i in pieces]
        source: Any = self.source  # has batch_at: looked for in __init__
        return [source.batch_at(self.tokens + i * phase.seq_len, size, phase.seq_len) for i in pieces]

    def _update(self, lr: float) -> float:
        """One step of the optimizer, clip included; the norm before the clip. Nothing changes if it is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return float("nan") if self.optimizer.grad_norm is None else self.optimizer.grad_norm

    def _measure_peak(self) -> None:
        """The best matrix product rate seen so far: once is not enough on a machine that others use too."""
        device = next(self.model.parameters()).device.type
        measured = measured_peak_flops(TORCH_DTYPES[self.config.dtype], device=device)
        self._peak_flops = max(self._peak_flops, measured)

    def _accumulate(self, batches: list[Batch]) -> tuple[float, dict[str, float]]:
        """Gradients of the mean loss over all targets of `batches`, summed in fp32; that loss and the mean metrics."""
        num_targets = max(1, sum(batch.num_targets for batch in batches))
        loss = 0.0
        extra: dict[str, float] = {}
        for batch in batches:
            loss_sum, metrics = self.objective(self.model, batch)
            (loss_sum / num_targets).backward()
            loss += float(loss_sum.detach()) / num_targets
            for name, value in metrics.items():
                extra[name] = extra.get(name, 0.0) + value / len(batches)
        return loss, extra

    def _guard(self, loss: float, grad_norm: float, batches: list[Batch]) -> str:
        """ "" when all is finite, else the bad tensor's name; raises instead when the run is to stop."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._skipped_in_a_row = 0
            return ""
        name = first_bad_tensor(self.model, self.objective, batches)
        self._skipped_in_a_row += 1
        if self.config.on_nonfinite == "skip" and self._skipped_in_a_row <= self.config.max_skipped_steps:
            return name
        last = latest_checkpoint(self.checkpoints)
        self.optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(
            f"train: step {self.step + 1} must have a finite loss and gradient, got {loss} and norm {grad_norm}; "
            f"first bad tensor: {name}; no update was made, the last good checkpoint is {last}"
        )

    def _averages_now(self) -> bool:
        every, anneal_steps = self.config.average_every_steps, self.config.schedule.anneal_steps
        counted = min(self.config.average_last_steps or anneal_steps, anneal_steps)
        left = self.config.steps - self.step
        return every > 0 and left < counted and left % every == 0  # the last step always takes part

    def _speed(self, batches: list[Batch], seconds: float) -> dict[str, Any]:
        speed: dict[str, Any] = {"seconds": seconds}
        speed["tokens_per_s"] = sum(batch.tokens.numel() for batch in batches) / seconds
        if isinstance(self.model, Transformer):
            flops = sum(self.model.config.train_flops(batch.document_lengths) for batch in batches)
            speed["mfu"] = flops / seconds / self._peak_flops
            speed["mfu_convention"] = MFU_CONVENTION.format(dtype=self.config.dtype, peak=self._peak_flops / 1e9)
        return speed

    def save(self) -> Path:
        """Write a checkpoint of this step and return its folder."""
        self.metrics.sync()
        tensors: dict[str, dict[str, Tensor]] = {
            "model": dict(self._named_weights()),
            "optimizer": optimizer_tensors(self.optimizer, self.model),
        }
        if self.average.count:
            tensors["average"] = self.average.mean
        files = {"config.json": config_to_hf(self.model.config)} if isinstance(self.model, Transformer) else {}
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "next_sequence": self.tokens // self.config.longest_seq_len,
            "skipped_in_a_row": self._skipped_in_a_row,
            "average_count": self.average.count,
            "rng": {"torch": bytes(torch.get_rng_state().tolist()).hex()},
            "num_threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **self._resolved_config(),
        }
        return save_checkpoint(
            self.checkpoints,
            self.step,
            tensors=tensors,
            state=state,
            files=files,
            keep_last=self.config.checkpoint.keep_last,
        )

    def resume(self) -> Path | None:
        """Continue from the newest intact checkpoint, if any, metrics.jsonl cut to its step; returns its folder."""
        folder = latest_checkpoint(self.checkpoints)
        if folder is None:
            self.metrics.keep_until(0)
            return None
        checkpoint = load_checkpoint(folder)
        state = checkpoint.state
        _check_same("configuration", state["identity"], self.config.identity(), folder)
        _check_same("data", state["data"], self.source.fingerprint(), folder)
        if state["num_threads"] != torch.get_num_threads():
            threads = f"{state['num_threads']} threads before, {torch.get_num_threads()} now"
            warnings.warn(f"Trainer: bits may differ from an undisturbed run: {threads}", stacklevel=3)
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
        load_optimizer_tensors(self.optimizer, self.model, checkpoint.tensors["optimizer"])
        self.average.load(checkpoint.tensors.get("average", {}), state["average_count"])
        torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["rng"]["torch"])), dtype=torch.uint8))
        self.step, self.tokens = state["step"], state["tokens"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self.metrics.keep_until(self.step)
        return folder

    def _named_weights(self) -> dict[str, Tensor]:
        """The parameters by their names on disk: Hugging Face's for a Transformer, so that checkpoints open there."""
        return hf_state(self.model) if isinstance(self.model, Transformer) else dict(self.model.named_parameters())

    def _resolved_config(self) -> dict[str, Any]:
        model_config = asdict(self.model.config) if isinstance(self.model, Transformer) else {}
        return {
            "train": asdict(self.config),
            "model": model_config,
            "identity": self.config.identity(),
            "data": self.source.fingerprint(),
        }

    @contextlib.contextmanager
    def _on_signals(self) -> Iterator[None]:
        """A signal of STOP_SIGNALS ends the loop after the running step; only the main thread may say so."""
        self._stopping = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, _frame: Any) -> None:
            if self._stopping and number == signal.SIGINT:
                raise KeyboardInterrupt  # asked twice: do not wait for the step
            self._stopping = True

        before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _check_same(what: str, saved: Any, present: Any, folder: Path, path: str = "") -> None:
    """Raise ValueError naming the first value that differs."""
    if isinstance(saved, dict) and isinstance(present, dict):
        for key in sorted({*saved, *present}):
            _check_same(what, saved.get(key), present.get(key), folder, f"{path}.{key}" if path else key)
    elif saved != present:
        raise ValueError(
            f"Trainer: {what} must be that of {folder}, but {path} was {saved!r} and is {present!r}; "
            "start in another run folder or change it back"
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise RuntimeError(
                f"Trainer: {path.parent} must have one process training in it, another holds {path}"
            ) from e
        yield


@contextlib.contextmanager
def _memory(reused: bool) -> Iterator[str]:
    """Freed memory is kept for the next step if wanted and possible, until the loop ends; yields what holds."""
    if not reused or memory.is_reused():
        yield "reused" if memory.is_reused() else "fresh"
        return
    reason = memory.why_not()
    if reason is not None:
        yield f"fresh: {reason}"
        return
    memory.reuse()
    try:
        yield "reused"
    finally:
        memory.stop_reuse()


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """torch refuses operations whose bits vary; new memory stays unfilled, which costs nothing here."""
    strict, fill = torch.are_deterministic_algorithms_enabled(), _FILL.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    _FILL.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)
        _FILL.fill_uninitialized_memory = fill
