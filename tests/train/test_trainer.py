"""The loop: it learns, cuts steps as told, guards, averages, resumes and says what is wrong."""

import dataclasses
import json
import os
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

from herdkern import memory
from herdkern.model.transformer import Transformer
from herdkern.train.checkpoint import checkpoint_folders
from herdkern.train.config import CheckpointConfig, OptimizerConfig, TrainConfig
from herdkern.train.guard import NonFiniteError
from herdkern.train.objective import next_token_loss
from herdkern.train.trainer import PackedBatches, Trainer

TIMING = ("time", "seconds", "tokens_per_s", "mfu", "mfu_convention")


def run(model_config, config, sampler, folder, **kwargs):
    trainer = Trainer(Transformer(model_config, seed=3), config, PackedBatches(sampler, config), folder, **kwargs)
    return trainer, trainer.fit()


def facts(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMING} for record in records]


def test_the_loss_falls_and_every_step_is_logged(tiny_model_config, tiny_train_config, sampler, tmp_path):
    config = dataclasses.replace(tiny_train_config, steps=60)
    _, result = run(tiny_model_config, config, sampler, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, 61))
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    assert records[-1]["tokens"] == result.tokens == 60 * 4 * 32
    assert all(r["tokens_per_s"] > 0 and r["mfu"] > 0 and "causal" in r["mfu_convention"] for r in records)
    assert not result.interrupted
    assert result.checkpoint.name == "step-60"


def test_same_seed_gives_the_same_bits(tiny_model_config, tiny_train_config, sampler, tmp_path):
    weights = []
    for name in ("one", "two"):
        _, result = run(tiny_model_config, tiny_train_config, sampler, tmp_path / name)
        weights.append((result.checkpoint / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert facts(tmp_path / "one") == facts(tmp_path / "two")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_micro_batches_add_up_to_the_whole_batch(tiny_model_config, tiny_train_config, sampler, tmp_path, dtype):
    """The gradient of a step does not depend on how it is cut, although micro-batches have different target counts."""
    config = dataclasses.replace(tiny_train_config, dtype=dtype)
    grads = []
    for size in (0, 1):
        cut = dataclasses.replace(config, micro_batch_size=size)
        trainer = Trainer(Transformer(tiny_model_config, seed=3), cut, PackedBatches(sampler, cut), tmp_path)
        batches = [trainer.source.batch(i, size or 4) for i in range(0, 4, size or 4)]
        loss, _ = trainer.engine.accumulate(batches)
        grads.append((loss, {n: p.grad.double() for n, p in trainer.model.named_parameters()}))
    eps = torch.finfo(torch.float32 if dtype == "fp32" else torch.bfloat16).eps
    assert grads[0][0] == pytest.approx(grads[1][0], rel=8 * eps)
    for name, whole in grads[0][1].items():
        assert (whole - grads[1][1][name]).norm() <= 8 * eps * whole.norm(), name


def test_bf16_keeps_fp32_parameters_and_gradients(tiny_model_config, tiny_train_config, sampler, tmp_path):
    config = dataclasses.replace(tiny_train_config, dtype="bf16")
    trainer, _ = run(tiny_model_config, config, sampler, tmp_path)
    trainer.engine.accumulate([trainer.source.batch(0, 4)])
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in trainer.model.parameters()} == {torch.float32}
    state = load_file(tmp_path / "checkpoints" / "step-12" / "optimizer.safetensors")
    assert {t.dtype for t in state.values()} == {torch.float32}


@pytest.mark.parametrize("stops", [(3,), (2, 5, 9), (1, 2, 3, 4)], ids=str)
def test_resumed_runs_equal_the_undisturbed_one(tiny_model_config, tiny_train_config, sampler, tmp_path, stops):
    _, whole = run(tiny_model_config, tiny_train_config, sampler, tmp_path / "whole")
    config = dataclasses.replace(tiny_train_config, checkpoint=CheckpointConfig(every_steps=1))

    def sigterm_at(step):
        trainers = []

        def objective(model, batch):
            if trainers[0].step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return next_token_loss(model, batch)

        model = Transformer(tiny_model_config, seed=3)
        trainers.append(Trainer(model, config, PackedBatches(sampler, config), tmp_path / "cut", objective=objective))
        return trainers[0].fit()

    for stop in stops:
        result = sigterm_at(stop)
        assert result.interrupted
        assert result.step == stop + 1
    _, resumed = run(tiny_model_config, config, sampler, tmp_path / "cut")
    for name in ("model", "optimizer", "average"):
        one, two = (load_file(r.checkpoint / f"{name}.safetensors") for r in (whole, resumed))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one)
    assert facts(tmp_path / "whole") == facts(tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_leaves_a_checkpoint_and_the_old_handlers(
    tiny_model_config, tiny_train_config, sampler, tmp_path, number
):
    before = signal.getsignal(number)

    def objective(model, batch):
        os.kill(os.getpid(), number)
        return next_token_loss(model, batch)

    _, result = run(tiny_model_config, tiny_train_config, sampler, tmp_path, objective=objective)
    assert (result.step, result.interrupted, result.checkpoint.name) == (1, True, "step-1")
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait(tiny_model_config, tiny_train_config, sampler, tmp_path):
    def objective(model, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return next_token_loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        run(tiny_model_config, tiny_train_config, sampler, tmp_path, objective=objective)


def test_a_finished_run_does_nothing_more(tiny_model_config, tiny_train_config, sampler, tmp_path):
    _, first = run(tiny_model_config, tiny_train_config, sampler, tmp_path)
    stamp = (first.checkpoint / "manifest.json").stat().st_mtime_ns
    _, second = run(tiny_model_config, tiny_train_config, sampler, tmp_path)
    assert (second.step, second.tokens, second.interrupted) == (first.step, first.tokens, False)
    assert (second.checkpoint / "manifest.json").stat().st_mtime_ns == stamp
    assert len(facts(tmp_path)) == tiny_train_config.steps


def test_only_the_newest_checkpoints_stay(tiny_model_config, tiny_train_config, sampler, tmp_path):
    run(tiny_model_config, tiny_train_config, sampler, tmp_path)
    assert [p.name for p in checkpoint_folders(tmp_path / "checkpoints")] == ["step-9", "step-12"]


def test_another_configuration_is_refused_by_name(tiny_model_config, tiny_train_config, sampler, tmp_path):
    run(tiny_model_config, tiny_train_config, sampler, tmp_path)
    other = dataclasses.replace(tiny_train_config, optimizer=OptimizerConfig(weight_decay=0.2))
    with pytest.raises(ValueError, match=r"optimizer\.weight_decay was 0\.1 and is 0\.2"):
        run(tiny_model_config, other, sampler, tmp_path)


def test_other_data_is_refused_by_name(tiny_model_config, tiny_train_config, sampler, tmp_path):
    run(tiny_model_config, tiny_train_config, sampler, tmp_path)
    sampler.seed = 6
    with pytest.raises(ValueError, match=r"data must be that of .* seed was 5 and is 6"):
        run(tiny_model_config, tiny_train_config, sampler, tmp_path)


def test_what_has_no_effect_or_another_meaning_warns(tiny_model_config, tiny_train_config, sampler, tmp_path):
    config = dataclasses.replace(tiny_train_config, eval_every_steps=5)
    with pytest.warns(UserWarning, match="eval_every_steps has no effect without evaluate"):
        run(tiny_model_config, config, sampler, tmp_path)
    torch.set_num_threads(2)
    with pytest.warns(UserWarning, match="bits may differ .*: 1 threads before, 2 now"):
        run(tiny_model_config, tiny_train_config, sampler, tmp_path)


def test_two_trainers_in_one_folder_are_refused(tiny_model_config, tiny_train_config, sampler, tmp_path):
    started, release = threading.Event(), threading.Event()

    def wait(model, batch):
        started.set()
        release.wait(30)
        return next_token_loss(model, batch)

    thread = threading.Thread(
        target=run, args=(tiny_model_config, tiny_train_config, sampler, tmp_path), kwargs={"objective": wait}
    )
    thread.start()
    started.wait(30)
    try:
        with pytest.raises(RuntimeError, match="one process"):
            run(tiny_model_config, tiny_train_config, sampler, tmp_path)
    finally:
        release.set()
        thread.join()


def poison(kind, at_step, trainer_of):
    """An objective that makes one thing NaN at one step."""

    def objective(model, batch):
        now = trainer_of[0].step == at_step
        if kind == "activation" and now:
            hook = model.layers[1].mlp.up_proj.register_forward_hook(lambda m, i, out: out * float("nan"))
            loss, metrics = next_token_loss(model, batch)
            hook.remove()
            return loss, metrics
        loss, metrics = next_token_loss(model, batch)
        if kind == "gradient" and now and loss.requires_grad:
            param = model.layers[0].self_attn.v_proj.weight
            return loss + (param * 0).sqrt().sum(), metrics  # value 0, gradient 0 * inf
        if kind == "loss" and now:
            return loss * float("inf"), metrics
        return loss, metrics

    return objective


@pytest.mark.parametrize(
    ("kind", "name"),
    [("gradient", "gradient of layers.0.self_attn.v_proj.weight"), ("loss", "loss")],
)
def test_nan_guard_stops_before_the_update(tiny_model_config, tiny_train_config, sampler, tmp_path, kind, name):
    trainer_of = []
    trainer = Trainer(
        Transformer(tiny_model_config, seed=3),
        tiny_train_config,
        PackedBatches(sampler, tiny_train_config),
        tmp_path,
        objective=poison(kind, 7, trainer_of),
    )
    trainer_of.append(trainer)
    with pytest.raises(NonFiniteError, match=rf"step 8 .* first bad tensor: {name};.*step-6"):
        trainer.fit()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert [p.name for p in checkpoint_folders(tmp_path / "checkpoints")] == ["step-3", "step-6"]
    assert len(facts(tmp_path)) == 7
    _, result = run(tiny_model_config, tiny_train_config, sampler, tmp_path)  # the cause is gone: the run goes on
    assert result.step == 12


def test_nan_guard_names_a_bad_parameter_and_a_bad_activation(tiny_model_config, tiny_train_config, sampler, tmp_path):
    from herdkern.train.guard import first_bad_tensor

    model = Transformer(tiny_model_config, seed=3)
    batch = PackedBatches(sampler, tiny_train_config).batch(0, 2)
    hook = model.layers[1].mlp.up_proj.register_forward_hook(lambda m, i, out: out * float("nan"))
    assert first_bad_tensor(model, next_token_loss, [batch]) == "output of layers.1.mlp.up_proj"
    hook.remove()
    assert "second run" in first_bad_tensor(model, next_token_loss, [batch])
    model.layers[0].mlp.down_proj.weight.data[0, 0] = float("inf")
    assert first_bad_tensor(model, next_token_loss, [batch]) == "parameter layers.0.mlp.down_proj.weight"


def test_nan_guard_skips_without_an_update(tiny_model_config, tiny_train_config, sampler, tmp_path):
    config = dataclasses.replace(tiny_train_config, on_nonfinite="skip", max_skipped_steps=1)
    trainer_of = []
    trainer = Trainer(
        Transformer(tiny_model_config, seed=3),
        config,
        PackedBatches(sampler, config),
        tmp_path,
        objective=poison("loss", 4, trainer_of),
    )
    trainer_of.append(trainer)
    assert trainer.fit().step == 12
    record = facts(tmp_path)[4]
    assert record["loss"] is None
    assert record["skipped"] == "loss"
    steps = load_file(tmp_path / "checkpoints" / "step-12" / "optimizer.safetensors")
    assert {float(v) for k, v in steps.items() if k.startswith("step.")} == {11.0}


def test_skipping_has_an_end(tiny_model_config, tiny_train_config, sampler, tmp_path):
    config = dataclasses.replace(tiny_train_config, on_nonfinite="skip", max_skipped_steps=2)

    def always(model, batch):
        loss, metrics = next_token_loss(model, batch)
        return loss * float("nan"), metrics

    with pytest.raises(NonFiniteError, match="step 3 "):
        run(tiny_model_config, config, sampler, tmp_path, objective=always)


@pytest.mark.parametrize(("last", "steps"), [(0, (8, 10, 12)), (4, (10, 12)), (1, (12,)), (99, (8, 10, 12))])
def test_average_is_the_mean_of_the_annealing_checkpoints(
    tiny_model_config, tiny_train_config, sampler, tmp_path, last, steps
):
    config = dataclasses.replace(
        tiny_train_config, checkpoint=CheckpointConfig(every_steps=1, keep_last=12), average_last_steps=last
    )
    trainer, _ = run(tiny_model_config, config, sampler, tmp_path)
    saved = [load_file(tmp_path / "checkpoints" / f"step-{s}" / "model.safetensors") for s in steps]
    assert trainer.average.count == len(steps)
    averaged = Transformer(tiny_model_config)
    trainer.average.copy_to(averaged)
    for name, param in averaged.named_parameters():
        key = name if name.startswith("lm_head") else f"model.{name}"
        mean = sum(s[key].double() for s in saved) / len(steps)
        assert (trainer.average.mean[name] - mean).abs().max() <= 1e-7
        assert (param.double() - mean).abs().max() <= 1e-7 * max(1.0, float(mean.abs().max()))


def test_evaluation_joins_the_metrics(tiny_model_config, tiny_train_config, sampler, tmp_path):
    config = dataclasses.replace(tiny_train_config, eval_every_steps=5)
    run(tiny_model_config, config, sampler, tmp_path, evaluate=lambda model: {"heldout_nats": 1.5})
    assert [r["step"] for r in facts(tmp_path) if "heldout_nats" in r] == [5, 10]


def test_a_checkpoint_opens_in_transformers(tiny_model_config, tiny_train_config, sampler, tmp_path):
    transformers = pytest.importorskip("transformers")
    trainer, result = run(tiny_model_config, tiny_train_config, sampler, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(result.checkpoint)
    tokens = torch.arange(20)
    with torch.no_grad():
        ours = trainer.model.logits(trainer.model(tokens, torch.tensor([0, 20], dtype=torch.int32)))
        assert (model(tokens[None]).logits[0] - ours).abs().max() <= 1e-4


def test_an_unwritable_folder_is_named(tiny_model_config, tiny_train_config, sampler, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="checkpoints"):
        run(tiny_model_config, tiny_train_config, sampler, tmp_path)


def test_the_progress_bar_is_quiet_off_a_terminal(tiny_model_config, tiny_train_config, sampler, tmp_path, capfd):
    run(tiny_model_config, tiny_train_config, sampler, tmp_path / "quiet")
    assert capfd.readouterr().err == ""
    run(tiny_model_config, TrainConfig(**vars(tiny_train_config)), sampler, tmp_path / "loud", progress=True)
    assert "loss" in capfd.readouterr().err


@pytest.mark.skipif(memory.why_not() is not None, reason=str(memory.why_not()))
def test_memory_is_reused_while_it_trains_and_changes_no_bit(tiny_model_config, tiny_train_config, sampler, tmp_path):
    weights, seen = [], []

    def objective(model, batch):
        seen.append(memory.is_reused())
        return next_token_loss(model, batch)

    for reused in (True, False):
        config = dataclasses.replace(tiny_train_config, reuse_memory=reused)
        seen.clear()
        _, result = run(tiny_model_config, config, sampler, tmp_path / str(reused), objective=objective)
        assert set(seen) == {reused}
        assert not memory.is_reused()
        state = json.loads((tmp_path / str(reused) / "training.json").read_text())
        assert state["memory"] == ("reused" if reused else "fresh")
        weights.append((result.checkpoint / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
