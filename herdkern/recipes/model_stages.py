"""From token shards to a trained model: training itself, and the stages after it (export, evaluation, samples).

Training resumes from its own checkpoints; what follows are stages of the engine whose input is the last checkpoint.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from herdkern.data.mix import MixPhase, TokenSampler
from herdkern.data.pack import TokenDataset
from herdkern.engine import config_sha256, read_json, write_json_atomic
from herdkern.engine.shards import remove_folder
from herdkern.model.config import ModelConfig
from herdkern.model.generate import GenerateConfig, generate
from herdkern.model.hf_weights import hf_state, load_hf, save_hf
from herdkern.model.transformer import Transformer
from herdkern.recipes.config import Recipe, SampleConfig
from herdkern.recipes.console import changes
from herdkern.recipes.probe import HeldOutProbe
from herdkern.tokenizer import Tokenizer
from herdkern.train.average import WeightAverage
from herdkern.train.checkpoint import latest_checkpoint, load_checkpoint
from herdkern.train.config import TrainConfig
from herdkern.train.evaluate import evaluate, token_counts, unigram_baseline
from herdkern.train.trainer import TORCH_DTYPES, PackedBatches, Trainer, TrainResult

EVAL_TOKENS_WHILE_TRAINING = 32_768


@dataclass(frozen=True, kw_only=True)
class TokenFolders:
    """Where the shards are: RUN/tokens/train/<source> and RUN/tokens/heldout/<source>."""

    train: dict[str, Path]
    heldout: dict[str, Path]


def token_folders(run_dir: Path) -> TokenFolders:
    """The folders of shards in a run, by source; a source without a document has none."""

    def found(split: str) -> dict[str, Path]:
        folders = sorted((run_dir / "tokens" / split).iterdir())
        return {folder.name: folder for folder in folders if list(folder.glob("shard-*"))}

    return TokenFolders(train=found("train"), heldout=found("heldout"))


@dataclass(frozen=True, kw_only=True)
class FinalConfig:
    """What the stages after training depend on, besides their inputs."""

    model: ModelConfig
    train: TrainConfig
    samples: SampleConfig


def open_shards(folder: Path) -> TokenDataset:
    """The dataset of all shards below a folder."""
    return TokenDataset(sorted(folder.glob("shard-*")))


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """(n_vocab,) int64: the bytes of text that each token stands for; 0 for special tokens."""
    sizes = np.zeros(tokenizer.n_vocab, np.int64)
    for token, rank in tokenizer.mergeable_ranks.items():
        sizes[rank] = len(token)
    return sizes


def resolve_model(recipe: Recipe, tokenizer: Tokenizer) -> ModelConfig:
    """The recipe's model with the vocabulary that was learned."""
    return dataclasses.replace(
        recipe.model, vocab_size=tokenizer.n_vocab, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id
    )


def make_sampler(recipe: Recipe, datasets: Mapping[str, TokenDataset]) -> TokenSampler:
    """Sources in proportion to their size times their factor; the factors change where annealing starts.

    Raises: ValueError if no source is as long as one sequence.
    """
    train = recipe.train
    long_enough = {name: data for name, data in datasets.items() if data.num_tokens > train.longest_seq_len}
    if not long_enough:
        total = sum(data.num_tokens for data in datasets.values())
        raise ValueError(
            "run_recipe: the training text must have a source of at least seq_len + 1 = "
            f"{train.longest_seq_len + 1} tokens, "
            f"got {total} tokens in {len(datasets)} sources; give more text or lower --train.seq-len"
        )

    def weights(factors: tuple[tuple[str, float], ...]) -> dict[str, float]:
        by_name = dict(factors)
        return {name: data.num_tokens * by_name.get(name, 1.0) for name, data in long_enough.items()}

    later = []
    if train.schedule.anneal_steps and train.anneal_start_sequence > 0:
        later = [MixPhase(start=train.anneal_start_sequence, weights=weights(recipe.mix.anneal_weights))]
    return TokenSampler(long_enough, weights(recipe.mix.weights), train.longest_seq_len, train.seed, later=later)


def train_model(
    recipe: Recipe, run_dir: Path, tokenizer: Tokenizer, note: Callable[[str], None]
) -> tuple[bool, TrainResult]:
    """(whether there was anything to do, where training ended): train to the last step in `run_dir`.

    Goes on from the latest checkpoint. Checkpoints of another configuration or other data are set aside first, and
    `note` is told why.
    """
    tokens = token_folders(run_dir)
    batches = ShardBatches(recipe, tokens)
    model_config = resolve_model(recipe, tokenizer)
    _set_aside_other_run(run_dir, recipe.train, model_config, batches, note)
    heldout = [open_shards(folder) for folder in tokens.heldout.values()]
    torch.manual_seed(recipe.train.seed)  # the state of the generator is part of a checkpoint
    model = Transformer(model_config, seed=recipe.train.seed)
    loss = heldout_loss(heldout, recipe.train.seq_len, token_bytes(tokenizer))
    trainer = Trainer(model, recipe.train, batches, run_dir, evaluate=loss)
    trainer.probe = make_probe(recipe.train, heldout, tokenizer)
    last = run_dir / "checkpoints" / f"step-{recipe.train.steps}"
    if latest_checkpoint(run_dir / "checkpoints") == last:
        tokens_seen = read_json(last / "state.json")["tokens"]
        return False, TrainResult(step=recipe.train.steps, tokens=tokens_seen, interrupted=False, checkpoint=last)
    result = trainer.fit()
    if result.interrupted:
        raise KeyboardInterrupt  # SIGTERM: a checkpoint was written, the same command goes on from it
    return True, result


def heldout_loss(
    datasets: Sequence[TokenDataset], seq_len: int, sizes: NDArray[np.int64]
) -> Callable[[Transformer], dict[str, float]]:
    """What the loop calls from time to time: the loss on the beginnings of all `datasets`.

    sizes: (n_vocab,), the bytes of text each token stands for.
    """

    def loss(model: Transformer) -> dict[str, float]:
        share = max(EVAL_TOKENS_WHILE_TRAINING // len(datasets), seq_len)
        found = [evaluate(model, d, seq_len, token_bytes=sizes, max_tokens=share) for d in datasets]
        nats = sum(f.nats_per_token * f.num_tokens for f in found)
        num_tokens, num_bytes = sum(f.num_tokens for f in found), sum(f.num_bytes for f in found)
        return {"heldout_loss": nats / num_tokens, "heldout_bits_per_byte": nats / math.log(2.0) / num_bytes}

    return loss


def make_probe(train: TrainConfig, heldout: Sequence[TokenDataset], tokenizer: Tokenizer) -> HeldOutProbe | None:
    """What stages of long context are judged by; None where there are none."""
    lengths = train.long_context.lengths
    return HeldOutProbe(heldout, tokenizer, lengths[0], train.seed) if lengths else None


class ShardBatches(PackedBatches):
    """Batches from the run's shards, whose fingerprint holds the checksums of those shards too."""

    def __init__(self, recipe: Recipe, tokens: TokenFolders) -> None:
        super().__init__(
            make_sampler(recipe, {name: open_shards(folder) for name, folder in tokens.train.items()}), recipe.train
        )
        shards = [shard for folder in tokens.train.values() for shard in sorted(folder.glob("shard-*"))]
        self._sha256 = config_sha256([read_json(shard / "manifest.json")["files"] for shard in shards])

    def fingerprint(self) -> dict[str, Any]:
        """What the batches depend on."""
        return {**super().fingerprint(), "shards_sha256": self._sha256}


def _set_aside_other_run(
    run_dir: Path, train: TrainConfig, model: ModelConfig, batches: ShardBatches, note: Callable[[str], None]
) -> None:
    """Rename checkpoints and metrics that were made from something else to *.old; what was there before goes."""
    before_path, checkpoints = run_dir / "training.json", run_dir / "checkpoints"
    if not before_path.is_file() or not checkpoints.is_dir():
        return
    before = read_json(before_path)
    wanted = {"identity": train.identity(), "model": dataclasses.asdict(model), "data": batches.fingerprint()}
    changed = changes({key: before.get(key) for key in wanted}, wanted)
    if not changed:
        return
    note(f"training starts again ({'; '.join(changed[:4])}); the former checkpoints are in {checkpoints}.old")
    for old in (checkpoints, run_dir / "metrics.jsonl"):
        aside = old.with_name(old.name + ".old")
        remove_folder(aside)
        if old.exists():
            old.rename(aside)


def _averaged(checkpoint: Path, config: FinalConfig) -> dict[str, Transformer]:
    """The models of a checkpoint, by what they are: its last weights, and their average where there is one."""
    saved = load_checkpoint(checkpoint)  # of any number of ranks
    models = {"last step": Transformer(config.model, compute_dtype=TORCH_DTYPES[config.train.dtype])}
    with torch.no_grad():
        for name, param in hf_state(models["last step"]).items():
            param.copy_(saved.tensors["model"][name])
    if saved.state["average_count"]:
        average = WeightAverage()
        average.load(saved.tensors["average"], saved.state["average_count"])
        models["averaged"] = Transformer(config.model, compute_dtype=TORCH_DTYPES[config.train.dtype])
        average.copy_to(models["averaged"])
    return {name: model.eval() for name, model in models.items()}


def export_stage(inputs: list[Path], out: Path, config: FinalConfig) -> dict[str, Any]:
    """Stage: the final model (averaged if it was) with its tokenizer as a Hugging Face folder out/hf.

    inputs: the last checkpoint and the tokenizer folder.
    """
    *_, model = _averaged(inputs[0], config).values()
    model.config = config.model
    save_hf(model, out / "hf", tokenizer=Tokenizer.load(inputs[1]))
    return {"num_parameters": config.model.num_params}


def evaluate_stage(inputs: list[Path], out: Path, config: FinalConfig) -> dict[str, Any]:
    """Stage: held-out bits per byte of each model and of the unigram baseline, in out/evaluation.json.

    inputs: checkpoint, tokenizer, the folder of training shards, the folder of held-out shards (by source).
    """
    checkpoint, tokenizer_dir, train_dir, heldout_dir = inputs
    tokenizer = Tokenizer.load(tokenizer_dir)
    sizes = token_bytes(tokenizer)
    leave_out = (tokenizer.bos_id,)
    train_counts = sum(
        token_counts(open_shards(folder), tokenizer.n_vocab, leave_out=leave_out)
        for folder in sorted(train_dir.iterdir())
    )
    sources = {folder.name: open_shards(folder) for folder in sorted(heldout_dir.iterdir())}
    counts = {name: token_counts(data, tokenizer.n_vocab, leave_out=leave_out) for name, data in sources.items()}
    unigram = unigram_baseline(np.asarray(train_counts), sum(counts.values()), token_bytes=sizes)  # type: ignore[arg-type]
    by_source: dict[str, dict[str, float]] = {}
    rows: list[tuple[str, float]] = []
    for name, model in _averaged(checkpoint, config).items():
        nats = num_bytes = 0.0
        for source, data in sources.items():
            found = evaluate(model, data, config.train.seq_len, token_bytes=sizes)
            nats += found.nats_per_token * found.num_tokens
            num_bytes += found.num_bytes
            baseline = unigram_baseline(np.asarray(train_counts), counts[source], token_bytes=sizes)
            by_source[source] = {
                "bits_per_byte": found.bits_per_byte,
                "unigram_bits_per_byte": baseline.bits_per_byte,
                "num_tokens": found.num_tokens,
            }
        rows.append((name, nats / math.log(2.0) / num_bytes))
    result = {
        "bits_per_byte": rows[-1][1],
        "unigram_bits_per_byte": unigram.bits_per_byte,
        "unigram_loss": unigram.nats_per_token,
        "models": rows,
        "by_source": by_source,
        "num_parameters": config.model.num_params,
    }
    write_json_atomic(out / "evaluation.json", result)
    return {"bits_per_byte": rows[-1][1], "unigram_bits_per_byte": unigram.bits_per_byte}


def samples_stage(inputs: list[Path], out: Path, config: FinalConfig) -> dict[str, Any]:
    """Stage: continuations of the prompts by the exported model, in out/samples.jsonl. inputs: its folder."""
    model = load_hf(inputs[0], compute_dtype=TORCH_DTYPES[config.train.dtype]).eval()
    tokenizer = Tokenizer.load(inputs[0])
    told = config.samples
    settings = _generate_config(told, tokenizer)
    prompts = [[tokenizer.bos_id, *tokenizer.encode_ordinary(prompt)] for prompt in told.prompts]
    started = time.perf_counter()
    answers = generate(model, prompts, settings) if prompts else []
    seconds = time.perf_counter() - started
    with (out / "samples.jsonl").open("w", encoding="utf-8") as file:
        for prompt, answer in zip(told.prompts, answers):
            sample = {"prompt": prompt, "text": tokenizer.decode(answer), "temperature": told.temperature}
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    num_tokens = sum(map(len, answers))
    return {"num_tokens": num_tokens, "tokens_per_s": num_tokens / seconds if num_tokens else 0.0}


def final_config(recipe: Recipe, tokenizer: Tokenizer) -> FinalConfig:
    """The configuration of the stages after training."""
    return FinalConfig(model=resolve_model(recipe, tokenizer), train=recipe.train, samples=recipe.samples)


def continue_text(folder: Path, prompt: str, config: SampleConfig) -> str:
    """What the model in a Hugging Face folder writes after `prompt`."""
    model, tokenizer = load_hf(folder).eval(), Tokenizer.load(folder)
    prompt_ids = [tokenizer.bos_id, *tokenizer.encode_ordinary(prompt)]
    [answer] = generate(model, [prompt_ids], _generate_config(config, tokenizer))
    return tokenizer.decode(answer)


def _generate_config(config: SampleConfig, tokenizer: Tokenizer) -> GenerateConfig:
    return GenerateConfig(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        stop_tokens=(tokenizer.eos_id,),
    )
