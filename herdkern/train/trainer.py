"""The training loop: step, accumulate, guard, clip, update, average, log, save; resumed bit for bit after any kill.

All runs use it; what differs is the objective (objective.py), where batches come from (source.py), and whether one
process (one_process.py) or many ranks (parallel_engine.py) compute a step.
"""

import math
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from herdkern.engine import write_json_atomic
from herdkern.model.transformer import Transformer
from herdkern.parallel.config import ParallelConfig
from herdkern.parallel.heartbeat import Heartbeat
from herdkern.train.batch import Batch
from herdkern.train.config import TrainConfig
from herdkern.train.corruption import CorruptionChecks
from herdkern.train.guard import NonFiniteError
from herdkern.train.left_out import LeftOut
from herdkern.train.long_stages import LongContextProbe, LongStages
from herdkern.train.metrics import MFU_CONVENTION, MetricsLog
from herdkern.train.objective import Objective, next_token_loss
from herdkern.train.one_process import TORCH_DTYPES, Engine, OneProcess
from herdkern.train.save_clock import SaveClock
from herdkern.train.schedule import learning_rate
from herdkern.train.source import BatchSource, DataPosition, PackedBatches, StepData
from herdkern.train.surroundings import STOP_SIGNALS, StopSignals, deterministic, memory_reuse, take_lock

__all__ = ["STOP_SIGNALS", "TORCH_DTYPES", "BatchSource", "PackedBatches", "TrainResult", "Trainer"]


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

    parallel: the layout over the ranks of the default process group, all of which make a Trainer with the same
        arguments and call `fit`; `model` is the whole one, and cut where it lies. None: one process. A run may go on
        in another layout, from the same data; on the same one it goes on bit for bit.
    evaluate: called every config.eval_every_steps with the model (with parallel: the ParallelModel, on all ranks); its
        numbers join that step's metrics.
    progress: a bar on standard error; by default only on a terminal.
    probe: an attribute to set before `fit`: the examples that judge stages of long context (config.long_context).
    settings: an attribute to set before `fit`: what config.json in run_dir is to hold, written when the run is this
        process's and its configuration has been checked; None: no such file.
    on_beat: an attribute to set before `fit`: called as on_beat(step=, phase=) with phase "data", "step", "evaluate" or
        "save" when that begins, on every rank. By default a Heartbeat in run_dir takes it.
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
        parallel: ParallelConfig | None = None,
    ) -> None:
        self.model_config = model.config if isinstance(model, Transformer) else None
        self.config = config
        self.source = source
        self.run_dir = Path(run_dir)
        self.evaluate = evaluate
        self.progress = progress
        self.probe: LongContextProbe | None = None
        self.settings: dict[str, Any] | None = None
        self.on_beat: Callable[..., None] | None = None
        self.step = 0
        self.tokens = 0
        self.position = DataPosition()
        self.left_out = LeftOut(self.run_dir / "left_out.json")
        self.metrics = MetricsLog(self.run_dir / "metrics.jsonl")
        self._skipped_in_a_row = 0
        self._rollbacks = 0
        self._rolled_back = ""  # why, until the next step has told it
        self._peak_flops = 0.0
        if config.eval_every_steps and evaluate is None:
            warnings.warn("Trainer: eval_every_steps has no effect without evaluate", stacklevel=2)
        self._ramp = config.ramp_plan()
        self._check(model, objective, parallel)
        self.engine: Engine
        if parallel is None:
            self.engine = OneProcess(model, config, objective)
        else:
            from herdkern.train.parallel_engine import ParallelEngine

            self.engine = ParallelEngine(model, config, parallel)
        self.average = self.engine.average
        self._corruption = CorruptionChecks(self.engine, self.run_dir, config.corruption_check_every_steps)
        self._clock = SaveClock(config.checkpoint, self.engine.num_ranks)
        self._stages: LongStages | None = None

    def _check(self, model: nn.Module, objective: Objective, parallel: ParallelConfig | None) -> None:
        config = self.config
        if config.changes_length and not hasattr(self.source, "batch_at"):
            what = "train.ramp" if config.ramp else "train.long_context"
            raise ValueError(
                f"Trainer: source must have batch_at where {what} is set, got {type(self.source).__name__}; "
                "take PackedBatches"
            )
        if parallel is not None and objective is not next_token_loss:
            raise ValueError(f"Trainer: objective must be next_token_loss with parallel, got {objective}")
        longest = config.longest_seq_len
        if config.long_context.lengths and isinstance(model, Transformer) and model.config.max_seq_len < longest:
            raise ValueError(
                f"Trainer: model.config.max_seq_len must be at least {longest} for long_context.lengths, got "
                f"{model.config.max_seq_len}"
            )

    @property
    def model(self) -> Any:
        """What is trained: the model, with parallel the ParallelModel made of it."""
        return self.engine.module

    @property
    def checkpoints(self) -> Path:
        """The folder that holds step-N/."""
        return self.run_dir / "checkpoints"

    def fit(self) -> TrainResult:
        """Train to the last step, or to SIGTERM, SIGINT or SIGUSR1 on any rank, and leave a checkpoint of that step.

        Raises: NonFiniteError as config.on_nonfinite says; ValueError if the run in run_dir had another
        configuration or other data; RuntimeError if another process trains in run_dir; OSError if a checkpoint
        cannot be written; LongContextStalledError; SilentCorruptionError. With parallel, on all ranks.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        heartbeat = None
        if self.config.long_context.lengths:
            if self.probe is None:
                raise ValueError("Trainer: probe must be set where train.long_context has lengths, got none")
            self._stages = LongStages(self.config, self.probe, self.engine)
        with ExitStack() as stack:
            lock = self.engine.first_alone(lambda: take_lock(self.run_dir / "train.lock"))
            if lock is not None:
                stack.enter_context(lock)
            if self.on_beat is None:  # not before: its files may be those of a run that goes on here
                rank = 0 if self.engine.is_first else torch.distributed.get_rank()
                heartbeat = Heartbeat(self.run_dir, rank)
                self.on_beat = heartbeat.beat
            stack.enter_context(deterministic())
            self._signals = stack.enter_context(StopSignals())
            how = stack.enter_context(memory_reuse(self.config.reuse_memory))
            saved = self._loop(self.resume(), how)
            self.engine.wait()
        if heartbeat is not None:
            heartbeat.close()
            self.on_beat = None
        return TrainResult(
            step=self.step, tokens=self.tokens, interrupted=self.step < self.config.steps, checkpoint=saved
        )

    def _loop(self, saved: Path | None, memory: str) -> Path:
        """All steps; returns the last checkpoint."""
        about = {"training.json": {**self._resolved_config(), "memory": memory}}
        if self.settings is not None:
            about["config.json"] = self.settings
        for name, values in about.items():
            self.engine.first_alone(partial(write_json_atomic, self.run_dir / name, values))
        self._measure_peak()
        self._to_train(True)
        if saved is None and self.config.on_nonfinite == "rollback":
            saved = self.save()  # where a run goes back to
        (stopping,) = self.engine.agree(self._signals.came)
        disable = True if not self.engine.is_first else None if self.progress is None else not self.progress
        with tqdm(
            total=self.config.total_tokens,
            initial=self.tokens,
            unit="tok",
            unit_scale=True,
            disable=disable,
            desc="train",
        ) as bar:
            while self.step < self.config.steps and not stopping:
                before = self.tokens
                record = self._run_step()
                bar.update(self.tokens - before)
                bar.set_postfix(loss=record.get("loss"), lr=record.get("lr"), refresh=False)
                stopping, is_due = self.engine.agree(self._signals.came, bool(record) and self._clock.is_due(self.step))
                if is_due:
                    saved = self.save()
        if saved is None or saved.name != f"step-{self.step}":
            saved = self.save()
        return saved

    def _run_step(self) -> dict[str, Any]:
        """One update, its line in metrics.jsonl included; nothing, if the run has gone back instead."""
        begin = time.perf_counter()
        config, update = self.config, self.step + 1
        self._beat("data")
        data = self._next_data()
        batches = self.engine.micro_batches(self.source, data)
        self._beat("step")
        loss, extra = self._corruption.accumulate(update, self.source, data, batches)
        lr = learning_rate(update, config.schedule, steps=config.steps)
        grad_norm = self.engine.update(lr) if math.isfinite(loss) else self.engine.grad_norm()
        skipped = self._guard(loss, grad_norm, batches)
        self.engine.zero_grad()
        if skipped and config.on_nonfinite == "rollback":
            self._roll_back(data, skipped)
            return {}
        self.step = update
        num_tokens, flops = self.engine.total([sum(b.tokens.numel() for b in batches), self._flops(batches)])
        self.tokens += int(num_tokens)
        self.position.token += data.phase.tokens_per_step
        if self._averages_now():
            self.engine.update_average()
        record = {
            "step": update,
            "tokens": self.tokens,
            "loss": loss if math.isfinite(loss) else None,
            "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            **extra,
            **({"skipped": skipped} if skipped else {}),
            **({"rolled_back": self._rolled_back} if self._rolled_back else {}),
            **self._speed(num_tokens, flops, time.perf_counter() - begin),
        }
        self._rolled_back = ""
        record.update(self._look())
        record["time"] = time.time()
        if self.engine.is_first:
            self.metrics.append(record)
        return record

    def _look(self) -> dict[str, Any]:
        """What evaluations after a step add to its metrics."""
        found: dict[str, Any] = {}
        if self._stages is not None:
            if self._stages.gate is not None and self._stages.measures_next(self.tokens):
                self._beat("evaluate")
            found.update(self._stages.after_step(self.tokens))
        if self.evaluate and self.config.eval_every_steps and self.step % self.config.eval_every_steps == 0:
            self._beat("evaluate")
            self._to_train(False)
            found.update(self.evaluate(self.model))
            self._to_train(True)
            self._measure_peak()
        return found

    def _to_train(self, mode: bool) -> None:
        if isinstance(self.model, nn.Module):
            self.model.train(mode)

    def _next_data(self) -> StepData:
        """The sequences of the next step."""
        phase = None
        if self._stages is not None:
            if self._stages.gate is None and self._stages.measures_next(self.tokens):
                self._beat("evaluate")
            phase = self._stages.phase(self.tokens)
            if self.step >= self.config.steps - self.config.schedule.anneal_steps:
                # the stages may have seen fewer tokens than the sampler's plan of the annealing mix
                self.position.skip_to(self.config.anneal_start_sequence * self.config.longest_seq_len)
        return StepData(
            position=self.position.next(),
            phase=phase or self._ramp.at(self.tokens),
            micro_batch_size=1 if phase else self.config.micro_batch_size,
            by_token=self.config.changes_length,
        )

    def _measure_peak(self) -> None:
        """The best matrix product rate seen so far: once is not enough on a machine that others use too."""
        self._peak_flops = max(self._peak_flops, self.engine.peak_flops())

    def _guard(self, loss: float, grad_norm: float, batches: list[Batch]) -> str:
        """ "" when all is finite, else the bad tensor's name; raises instead when the run is to stop."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._skipped_in_a_row = 0
            return ""
        name = self.engine.first_bad(batches)
        policy = self.config.on_nonfinite
        self._skipped_in_a_row += 1
        if policy == "skip" and self._skipped_in_a_row <= self.config.max_skipped_steps:
            return name
        if policy == "rollback" and self._rollbacks < self.config.max_rollbacks:
            return name
        last = self.engine.latest(self.checkpoints)
        self.engine.zero_grad()
        raise NonFiniteError(
            f"train: step {self.step + 1} must have a finite loss and gradient, got {loss} and norm {grad_norm}; "
            f"first bad tensor: {name}; no update was made, the last good checkpoint is {last}"
        )

    def _roll_back(self, data: StepData, name: str) -> None:
        """Go back to the last verified checkpoint; the sequences of `data` are left out from now on."""
        step, why = self.step + 1, f"from step {self.step + 1}: {name}"
        self._beat("save")  # reading one takes as long as writing it
        self.engine.wait()
        # before anything else: a run that is killed now must not meet them again
        self.engine.first_alone(lambda: self.left_out.add(data.position, data.phase.tokens_per_step, why))
        if self.resume() is None:
            raise NonFiniteError(f"train: step {step} is not finite ({name}) and no checkpoint is left to go back to")

    def _averages_now(self) -> bool:
        every, anneal_steps = self.config.average_every_steps, self.config.schedule.anneal_steps
        counted = min(self.config.average_last_steps or anneal_steps, anneal_steps)
        left = self.config.steps - self.step
        return every > 0 and left < counted and left % every == 0  # the last step always takes part

    def _flops(self, batches: list[Batch]) -> float:
        if self.model_config is None:
            return 0.0
        return float(sum(self.model_config.train_flops(batch.document_lengths) for batch in batches))

    def _speed(self, num_tokens: float, flops: float, seconds: float) -> dict[str, Any]:
        speed: dict[str, Any] = {"seconds": seconds, "tokens_per_s": num_tokens / seconds}
        if self.model_config is not None:
            speed["mfu"] = flops / seconds / self._peak_flops
            speed["mfu_convention"] = MFU_CONVENTION.format(dtype=self.config.dtype, peak=self._peak_flops / 1e9)
        return speed

    def save(self) -> Path:
        """Write a checkpoint of this step and return its folder; with parallel it is there when the next one begins, or
        `fit` ends."""
        begin = time.monotonic()
        self._beat("save")
        self._corruption.before_save(self.step)
        if self.engine.is_first:
            self.metrics.sync()
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "position": self.position.state(),
            "next_sequence": self.position.token // self.config.longest_seq_len,
            "skipped_in_a_row": self._skipped_in_a_row,
            "rollbacks": self._rollbacks,
            "long_context": None if self._stages is None else self._stages.state(),
            "num_threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **self._resolved_config(),
        }
        folder = self.engine.save(self.checkpoints, self.step, state, self.config.checkpoint.keep_last)
        self._clock.saved(time.monotonic() - begin)
        return folder

    def resume(self) -> Path | None:
        """Continue from the newest intact checkpoint, if any, metrics.jsonl cut to its step; returns its folder."""
        folder = self.engine.latest(self.checkpoints)
        if folder is None:
            self.engine.first_alone(self._forget)
            return None
        state = self.engine.load(folder, lambda state: self._check_state(state, folder))
        self.step, self.tokens = state["step"], state["tokens"]
        # checkpoints from before there were positions: no step was left out
        planned = self.tokens if self.config.changes_length else self.step * self.config.tokens_per_step
        self.position.load(state.get("position", {"token": planned, "left_out": []}))
        self._skipped_in_a_row, self._rollbacks = state["skipped_in_a_row"], state.get("rollbacks", 0)
        self._leave_out()
        if self._stages is not None:
            self._stages.load(state.get("long_context"))
        self.engine.first_alone(lambda: self.metrics.keep_until(self.step))
        return folder

    def _forget(self) -> None:
        """The run begins at step 0, whatever was in its folder."""
        self.metrics.keep_until(0)
        self.left_out.clear()

    def _leave_out(self) -> None:
        """Pass over what the run has learned to leave out since the checkpoint that it goes on from."""
        for one in self.left_out.read():
            stretch = (one["token"], one["tokens"])
            if stretch not in self.position.left_out:
                self.position.left_out.append(stretch)
                self._rollbacks += 1
                self._rolled_back = one["why"]

    def _check_state(self, state: dict[str, Any], folder: Path) -> None:
        saved, present = dict(state["identity"]), dict(self.config.identity())
        if self.engine.num_ranks > 1 or state.get("parallel"):  # how a step is cut is the layout's
            saved["micro_batch_size"] = present["micro_batch_size"]
        _check_same("configuration", saved, present, folder)
        _check_same("data", state["data"], self.source.fingerprint(), folder)
        if state["num_threads"] != torch.get_num_threads() and self.engine.is_first:
            threads = f"{state['num_threads']} threads before, {torch.get_num_threads()} now"
            warnings.warn(f"Trainer: bits may differ from an undisturbed run: {threads}", stacklevel=3)

    def _resolved_config(self) -> dict[str, Any]:
        return {
            "train": asdict(self.config),
            "model": {} if self.model_config is None else asdict(self.model_config),
            "identity": self.config.identity(),
            "data": self.source.fingerprint(),
        }

    def _beat(self, phase: str) -> None:
        if self.on_beat is not None:
            self.on_beat(step=self.step + 1, phase=phase)


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
