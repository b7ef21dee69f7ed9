"""The dry run: everything that a recipe would do, resolved, with its cost. Needs no torch and touches no file."""

import dataclasses
from pathlib import Path
from typing import Any

from herdkern.recipes.config import Recipe

GPU_FLOPS = 400e12  # a second, for the estimate of device time; the Llama 3 paper reports 380 to 430 TFLOP/s a GPU


def describe(recipe: Recipe, out: Path) -> str:
    """The plan of `recipe` as text: stages, parameters, tokens, FLOPs, memory, then every setting."""
    lines = [f"recipe {recipe.name}: {first_line(recipe)}", f"run folder {out}", "", "stages"]
    lines += [f"  {number:2}. {text}" for number, text in enumerate(stages(recipe), start=1)]
    lines += ["", "cost", *(f"  {name:32} {text}" for name, text in cost(recipe))]
    lines += ["", "settings", *(f"  --{name} {text}" for name, text in settings(dataclasses.asdict(recipe)))]
    return "\n".join(lines)


def first_line(recipe: Recipe) -> str:
    """What the recipe says of itself."""
    model = recipe.model
    return f"{model.num_layers} layers, dim {model.dim}, {model.num_heads} heads over {model.num_kv_heads} KV heads"


def stages(recipe: Recipe) -> list[str]:
    """One line for each stage, in order."""
    data, train = recipe.data, recipe.train
    source = ", ".join(data.inputs) or f"the documentation site of this Python, at most {data.crawl.max_pages} pages"
    anneal = train.schedule.anneal_steps
    return [
        f"read {source}",
        "extract the main text of pages; keep code and formulas",
        f"language ({', '.join(data.language.languages) or 'all'}) and quality rules, with the reason for each drop",
        "URL dedup: the newest version of each page",
        "document dedup: MinHash over all documents",
        "line dedup: lines that repeat across documents",
        f"hold out {100 * data.heldout_share:g} % of the documents, but none that the others contain",
        f"learn a byte-level BPE vocabulary of {recipe.tokenizer.vocab_size:,} entries",
        "pack token shards for each source",
        f"pretrain {train.steps - anneal:,} steps, then anneal {anneal:,} steps with the mix for annealing",
        "average the weights along the annealing steps" if train.average_every_steps else "keep the last weights",
        "held-out bits per byte against a unigram baseline, samples with a KV cache",
        "Hugging Face folder and report.html",
    ]


def cost(recipe: Recipe) -> list[tuple[str, str]]:
    """(what, how much) of the training."""
    model, train = recipe.model, recipe.train
    micro_batch = train.micro_batch_size or train.batch_size
    tokens = train.total_tokens
    flops = tokens * model.flops_per_token(train.seq_len)
    memory = model.memory_bytes(micro_batch * train.seq_len, compute_bytes=2 if train.dtype == "bf16" else 4)
    rows = [
        ("parameters", f"{amount(model.num_params)} ({model.num_params:,})"),
        ("tokens a step", f"{train.tokens_per_step:,} ({train.batch_size:,} sequences of {train.seq_len:,})"),
        ("tokens in all", f"{amount(tokens)} in {train.steps:,} steps"),
        ("FLOPs", f"{flops:.3g} (6 N + causal attention, forward and backward)"),
        (f"device time at {GPU_FLOPS / 1e12:.0f} TFLOP/s", device_time(flops)),
    ]
    rows += [
        (f"memory unsharded: {name.replace('_', ' ')}", f"{count / 2**30:,.2f} GiB") for name, count in memory.items()
    ]
    return [*rows, ("KV cache a token", f"{model.kv_cache_bytes_per_token / 1024:,.1f} KiB in bf16")]


def amount(number: float) -> str:
    """5.01M, 8.03B, 15.6T."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:g}"


def device_time(flops: float) -> str:
    """The time that one device of GPU_FLOPS needs, in a fitting unit."""
    seconds = flops / GPU_FLOPS
    for limit, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= limit:
            return f"{seconds / limit:,.1f} {unit} of one device"
    return f"{seconds:.3g} seconds of one device"


def settings(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, value) of every setting, as the command line takes them."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        dotted = f"{prefix}{name}".replace("_", "-")
        if isinstance(value, dict):
            rows += settings(value, f"{prefix}{name}.")
        elif dotted != "name":
            rows.append((dotted, _words(value)))
    return rows


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(_words(item) for item in value) or "(none)"
    return str(value)
