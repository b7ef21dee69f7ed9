"""Every way to cut a training step over so many devices: which fit, how fast they would be, why the others do not.

A layout is refused for the first of these reasons: heads or the feed-forward width do not divide by tp; more stages
than layers; sequences do not divide by the data ranks; its fullest pipeline rank needs more memory than a device has.
Of the layouts that differ only in chunks and recomputation one stands for all: the least recomputation, then the most
chunks (the smallest bubble) that fit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from herdkern.model.config import ModelConfig
from herdkern.parallel.clusters import GIB, Cluster
from herdkern.parallel.config import ParallelConfig
from herdkern.parallel.layout import Layout
from herdkern.parallel.memory_estimate import MemoryEstimate, estimate_memory, peak_rank
from herdkern.parallel.pipeline_schedule import layers_of_stages
from herdkern.parallel.projection import Projection, block_seconds, project

Reason = Literal["heads", "layers", "batch", "memory"]
RECOMPUTE: tuple[Literal["none", "swiglu", "block"], ...] = ("none", "swiglu", "block")
MOST_CHUNKS = 8
SIMULATED = 32  # layouts whose pipeline is simulated: the best by the formula of the bubble
SMALLEST_PIECE = 1024  # tokens of a context rank


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be planned. batch_tokens: of a step, on all devices.  document_tokens: 0: a document fills its
    sequence.  fixed: axes that are given: tp, cp, pp, dp, num_chunks; recompute: the only one to look at."""

    model: ModelConfig
    cluster: Cluster
    devices: int
    seq_len: int = 8192
    batch_tokens: int = 16_777_216
    document_tokens: int = 0
    fixed: tuple[tuple[str, int], ...] = ()
    recompute: Literal["any", "none", "swiglu", "block"] = "any"

    def __post_init__(self) -> None:
        for name in ("devices", "seq_len", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: {name} must be at least 1, got {getattr(self, name)}")
        if self.document_tokens < 0:
            raise ValueError(f"plan: document_tokens must not be negative, got {self.document_tokens}")
        if self.batch_tokens < self.seq_len:
            raise ValueError(f"plan: batch_tokens must be at least seq_len = {self.seq_len}, got {self.batch_tokens}")
        for name, value in self.fixed:
            if value < 1 or (name != "num_chunks" and self.devices % value):
                raise ValueError(f"plan: {name} must divide the {self.devices} devices, got {value}")

    @property
    def sequences(self) -> int:
        """Whole sequences of a step."""
        return self.batch_tokens // self.seq_len


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A layout that fits, with what its fullest rank holds and how fast it would be."""

    layout: Layout
    memory: MemoryEstimate
    projection: Projection
    is_simulated: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A layout that does not fit and why; layout has the least memory of all that share its axes, excess in bytes."""

    axes: tuple[int, int, int, int]  # tp, cp, pp, dp
    reason: Reason
    text: str
    layout: Layout | None = None
    memory: MemoryEstimate | None = None
    excess: int = 0


@dataclass(frozen=True, kw_only=True)
class Found:
    """Fits, fastest first, and refusals in the order of the search."""

    task: Task
    fits: tuple[Fit, ...]
    refusals: tuple[Refusal, ...]


def search(task: Task) -> Found:
    """All layouts of `task` that divide its devices, each as a fit or a refusal.

    Tensor ranks are tried up to two nodes, context ranks in powers of two.
    """
    fits, refusals = [], []
    for axes in _axes(task):
        judged = judge(task, *axes)
        if isinstance(judged, Fit):
            fits.append(judged)
        else:
            refusals.append(judged)
    fits.sort(key=_speed)
    fits[:SIMULATED] = sorted((simulated(task, fit) for fit in fits[:SIMULATED]), key=_speed)
    return Found(task=task, fits=tuple(fits), refusals=tuple(refusals))


def simulated(task: Task, fit: Fit) -> Fit:
    """The same layout, its pipeline simulated."""
    return fit if fit.is_simulated else _fit(task, fit.layout, fit.memory, roughly=False)


def _speed(fit: Fit) -> tuple[float, int]:
    return fit.projection.step_s, fit.memory.total


def judge(task: Task, tp: int, cp: int, pp: int, dp: int) -> Fit | Refusal:
    """The layout of these axes with the least recomputation and the most chunks that fits, or why there is none.

    Its projection has no simulated pipeline yet.
    """
    model, axes = task.model, (tp, cp, pp, dp)
    for name, size in (("KV heads", model.num_kv_heads), ("heads", model.num_heads), ("ffn_dim", model.ffn_dim)):
        if size % tp:
            text = f"{size} {name} do not divide by tp {tp}"
            return Refusal(axes=axes, reason="heads", text=text + _outside_the_node(task, tp))
    if pp > model.num_layers + 2:
        most = f"{model.num_layers} layers, embedding and head"
        return Refusal(axes=axes, reason="layers", text=f"{pp} stages are more than {most}")
    if task.sequences % dp:
        short = "fewer than one" if task.sequences < dp else f"{task.sequences / dp:.2f}"
        text = f"{task.sequences} sequences a step on {dp} data ranks: {short} each"
        return Refusal(axes=axes, reason="batch", text=text)
    if task.seq_len < cp * SMALLEST_PIECE and cp > 1:
        text = f"{task.seq_len} tokens on {cp} context ranks: fewer than {SMALLEST_PIECE} each"
        return Refusal(axes=axes, reason="batch", text=text)
    cut = ParallelConfig(tp=tp, cp=cp, pp=pp, dp=dp)
    base = Layout(cut, micro_batch_tokens=task.seq_len, num_microbatches=task.sequences // dp)
    return _first_that_fits(task, base)


def _outside_the_node(task: Task, tp: int) -> str:
    """What tensor parallelism over nodes would cost, where it would leave one."""
    if tp <= task.cluster.devices_per_node:
        return ""
    layout = Layout(ParallelConfig(tp=tp), micro_batch_tokens=task.seq_len)
    ahead, back = block_seconds(task.model, layout, task.cluster, task.seq_len)
    sent = ahead["tensor communication"] + back["tensor communication"]
    computed = sum(ahead.values()) + sum(back.values()) - sent
    return f", and {tp} leave the node: {sent / computed:.1f} s of communication for each s of computing"


def _first_that_fits(task: Task, base: Layout) -> Fit | Refusal:
    smallest: tuple[Layout, MemoryEstimate] | None = None
    for recompute in RECOMPUTE if task.recompute == "any" else (task.recompute,):
        for num_chunks in _chunks(task, base):
            layout = replace(base.cut(num_chunks=num_chunks), recompute=recompute)
            memory = fullest_rank(task.model, layout)
            if memory.total <= task.cluster.usable_bytes:
                return _fit(task, layout, memory, roughly=True)
            if smallest is None or memory.total < smallest[1].total:
                smallest = layout, memory
            if memory.total - memory.terms["activations"] > 1.5 * task.cluster.usable_bytes:
                break  # no way of computing again will do
    assert smallest is not None
    return _too_full(task, *smallest)


def _fit(task: Task, layout: Layout, memory: MemoryEstimate, *, roughly: bool) -> Fit:
    document = task.document_tokens
    projection = project(
        task.model, layout, task.cluster, seq_len=task.seq_len, document_tokens=document, roughly=roughly
    )
    notes = []
    if layout.tp > task.cluster.devices_per_node:
        share = projection.seconds["tensor communication"] / projection.step_s
        notes.append(f"tp {layout.tp} leaves the node: {share:.0%} of the step is its communication")
    if layout.pp > 1 and layout.num_microbatches < layout.pp:
        notes.append(f"{layout.num_microbatches} micro-batches for {layout.pp} stages: {projection.bubble:.0%} waiting")
    return Fit(layout=layout, memory=memory, projection=projection, is_simulated=not roughly, notes=tuple(notes))


def _too_full(task: Task, layout: Layout, memory: MemoryEstimate) -> Refusal:
    excess = memory.total - task.cluster.usable_bytes
    purpose, size = max(memory.terms.items(), key=lambda term: term[1])
    text = (
        f"{memory.total / GIB:.1f} GiB of {task.cluster.usable_bytes / GIB:.1f}, "
        f"{excess / GIB:.1f} too many; {purpose} alone {size / GIB:.1f}"
    )
    if layout.recompute != "none" and task.recompute == "any":
        text += f", though {layout.recompute} is computed again"
    axes = (layout.tp, layout.cp, layout.pp, layout.dp)
    return Refusal(axes=axes, reason="memory", text=text, layout=layout, memory=memory, excess=excess)


def fullest_rank(model: ModelConfig, layout: Layout) -> MemoryEstimate:
    """The pipeline rank that needs most. Ranks behind the second hold no more layers and fewer micro-batches, so only
    the ends and the first rank with the most layers are looked at; more micro-batches than fill the pipeline twice
    change nothing."""
    stages = layers_of_stages(model.num_layers, layout.pp, layout.num_chunks)
    layers = [sum(map(len, stages[rank :: layout.pp])) for rank in range(layout.pp)]
    ranks = sorted({0, min(1, layout.pp - 1), layers.index(max(layers)), layout.pp - 1})
    return peak_rank(estimate_memory(model, layout.shortened(), ranks))


def _chunks(task: Task, base: Layout) -> Sequence[int]:
    """Chunks to try: those that cut layers, embedding and head evenly, most first (the smallest bubble); then one."""
    given = dict(task.fixed).get("num_chunks")
    units = task.model.num_layers + 2
    if base.pp == 1:
        return (1,)
    if given is not None:
        return (given,) if base.pp * given <= units else (1,)
    even = [v for v in range(MOST_CHUNKS, 1, -1) if units % (base.pp * v) == 0]
    return (*even, 1)


def _axes(task: Task) -> Iterator[tuple[int, int, int, int]]:
    """(tp, cp, pp, dp) whose product is the number of devices."""
    given = dict(task.fixed)
    powers = [1 << i for i in range(task.devices.bit_length())]
    for tp in _divisors(task.devices, most=2 * task.cluster.devices_per_node):
        for cp in (
            c for c in powers if (task.devices // tp) % c == 0 and (c == 1 or c * SMALLEST_PIECE <= task.seq_len)
        ):
            rest = task.devices // tp // cp
            for pp in _divisors(rest, most=task.model.num_layers + 2):
                axes = {"tp": tp, "cp": cp, "pp": pp, "dp": rest // pp}
                if all(axes[name] == value for name, value in given.items() if name in axes):
                    yield tp, cp, pp, rest // pp


def _divisors(number: int, *, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]
