"""How long a training step of a layout takes on a described cluster, and on what. Needs no torch.

Products of matrices and attention by their FLOPs at reached rates, the rest by the bytes it moves, collectives by
bandwidth and latency, the pipeline by the simulator; where ranks share the cores of one host, at least what these need
for the work of all. Nothing is fitted to a result. Not in it: slow devices, contention of the network, power limits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from herdkern.model.config import ModelConfig
from herdkern.parallel.clusters import Cluster, collective_seconds
from herdkern.parallel.layout import Layout
from herdkern.parallel.memory_walk import WIDE, Sizes
from herdkern.parallel.pipeline_schedule import layers_of_stages
from herdkern.parallel.pipeline_simulation import simulate

PARTS = (
    "matrix products",
    "attention",
    "memory-bound",
    "tensor communication",
    "context communication",
    "pipeline waits",
    "data communication",
    "optimizer",
    "host",
    "shared cores",
)
Seconds = dict[str, float]  # by part


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A step of a layout. seconds: of the pipeline rank that computes longest, by part, all of PARTS; communication is
    what is not hidden behind computing."""

    layout: Layout
    tokens: int
    seconds: Mapping[str, float]
    flops_causal: float = field(repr=False)
    flops_full: float = field(repr=False)
    peak_flops: float = field(repr=False)

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def flops_per_device(self) -> float:
        """FLOP/s of a device: 6 N + the pairs that a causal document mask lets through."""
        return self.flops_causal / self.step_s / self.layout.world_size

    @property
    def flops_per_device_full(self) -> float:
        """The same with every pair of the sequence counted, as PaLM does."""
        return self.flops_full / self.step_s / self.layout.world_size

    @property
    def mfu(self) -> float:
        """flops_per_device over the peak of the data sheet."""
        return self.flops_per_device / self.peak_flops

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second on all devices."""
        return self.tokens / self.step_s

    @property
    def bubble(self) -> float:
        """The share of the step in which the longest rank waits for others of its pipeline."""
        return self.seconds["pipeline waits"] / self.step_s


def project(
    model: ModelConfig,
    layout: Layout,
    cluster: Cluster,
    *,
    seq_len: int,
    document_tokens: int = 0,
    roughly: bool = False,
) -> Projection:
    """The projection of one step.

    seq_len: tokens of a sequence.  document_tokens: the length of its documents; 0: one fills the sequence.
    roughly: the pipeline waits as the formula of its bubble says; it is not simulated.
    Raises: ValueError if the pipeline has more stages than the model has layers, embedding and head together.
    """
    document = min(document_tokens or seq_len, seq_len)
    forward, backward = block_seconds(model, layout, cluster, document)
    head_f, head_b = head_seconds(model, layout, cluster)
    stages = layers_of_stages(model.num_layers, layout.pp, layout.num_chunks)
    last = len(stages) - 1
    parts = {
        stage: (_scaled(forward, len(held), head_f if stage == last else {}), _scaled(backward, len(held), {}))
        for stage, held in enumerate(stages)
    }
    parts[last] = (parts[last][0], _scaled(backward, len(stages[last]), head_b))
    span, waits, longest = _pipeline(layout, cluster, model, parts, roughly=roughly)
    shared = _core_seconds(layout, cluster, parts) - span if cluster.cores else 0.0
    seconds = dict.fromkeys(PARTS, 0.0)
    for stage in range(longest, len(stages), layout.pp):
        for given in parts[stage]:
            for part, time in given.items():
                seconds[part] += time * layout.num_microbatches
    seconds["pipeline waits"] = waits
    params = _params_of(model, layout, stages, longest)
    rank_backward = sum(sum(parts[stage][1].values()) for stage in range(longest, len(stages), layout.pp))
    seconds["data communication"] = _data_seconds(layout, cluster, params, model.num_layers // layout.pp, rank_backward)
    seconds["optimizer"] = 30 * params / layout.shard_size / cluster.memory_bytes_per_s
    step_end = seconds["data communication"] + seconds["optimizer"]
    assert abs(sum(seconds.values()) - span - step_end) <= 1e-6 * span
    if cluster.cores:
        crowd = max(1.0, layout.world_size / cluster.cores)
        seconds["shared cores"] = max(0.0, shared) + (crowd - 1) * step_end
    tokens = layout.dp * layout.num_microbatches * layout.micro_batch_tokens
    return Projection(
        layout=layout,
        tokens=tokens,
        seconds=seconds,
        flops_causal=tokens * model.flops_per_token(document),
        flops_full=tokens * model.flops_per_token(seq_len, convention="full"),
        peak_flops=cluster.peak_flops,
    )


def _scaled(times: Seconds, count: int, more: Seconds) -> Seconds:
    return {part: count * times.get(part, 0.0) + more.get(part, 0.0) for part in {**times, **more}}


def block_seconds(model: ModelConfig, layout: Layout, cluster: Cluster, document: int) -> tuple[Seconds, Seconds]:
    """Forward and backward pass of one micro-batch through one block on one rank, by part."""
    z, tokens = Sizes.of(model, layout), layout.rank_tokens
    q_dim, kv_dim, ffn_dim = (weight // model.dim for weight in (z.q_weight, z.kv_weight, z.ffn_weight))
    shapes = [(q_dim, model.dim), (kv_dim, model.dim), (kv_dim, model.dim), (model.dim, q_dim)]
    shapes += [(ffn_dim, model.dim), (ffn_dim, model.dim), (model.dim, ffn_dim)]
    forward = sum(cluster.gemm_seconds(tokens, n, k) for n, k in shapes)
    to_inputs = sum(cluster.gemm_seconds(tokens, k, n) for n, k in shapes)
    to_weights = sum(cluster.gemm_seconds(n, k, tokens) for n, k in shapes)
    attention = 4.0 * tokens * (document / 2) * q_dim  # q.k and p.v
    moved = 8 * z.residual + 2 * (z.q + z.kv) + 3 * z.ffn  # two norms with their sums, the rotation, swiglu
    moved_back = 8 * z.residual + 2 * (z.q + z.kv) + 5 * z.ffn + z.block_weight * (z.element + 2 * WIDE)
    tensor = cluster.link(layout.tp)
    gather, scatter = (collective_seconds(tensor, layout.tp, z.gathered, k) for k in ("all_gather", "reduce_scatter"))
    context = cluster.link(layout.tp * layout.cp)
    kv_bytes = 2 * z.kv * layout.cp * _needed_share(layout, document)
    gather_kv = collective_seconds(context, layout.cp, kv_bytes, "all_gather")
    scatter_kv = collective_seconds(
        context, layout.cp, kv_bytes * WIDE / z.element, "all_gather"
    )  # only what is needed
    ahead = {
        "matrix products": forward,
        "attention": attention / cluster.attention_forward_flops,
        "memory-bound": moved / cluster.memory_bytes_per_s,
        "tensor communication": 2 * (gather + scatter),
        "context communication": gather_kv,
        "host": cluster.host_block_s,
    }
    back = {
        "matrix products": to_inputs + to_weights,
        "attention": 2.5 * attention / cluster.attention_backward_flops,  # five products where forward has two
        "memory-bound": moved_back / cluster.memory_bytes_per_s,
        "tensor communication": 4 * gather + 2 * scatter,  # the norms' outputs are gathered again
        "context communication": gather_kv + scatter_kv,
        "host": 2 * cluster.host_block_s,
    }
    if layout.recompute == "block":
        back = _scaled(back, 1, ahead)
    elif layout.recompute == "swiglu":
        back["memory-bound"] += 3 * z.ffn / cluster.memory_bytes_per_s
    return ahead, back


def _needed_share(layout: Layout, document: int) -> float:
    """Of the keys that an all-gather moves, those that some query needs: none behind it in one document, and of several
    only those of the few that the 2 cp - 1 cuts divide, on average half of them."""
    if layout.cp == 1:
        return 0.0
    moved = layout.micro_batch_tokens * (layout.cp - 1)  # rows, by all ranks
    return min(0.75, (2 * layout.cp - 1) * document / 2 / moved)


def head_seconds(model: ModelConfig, layout: Layout, cluster: Cluster) -> tuple[Seconds, Seconds]:
    """Forward and backward pass of the head and the loss: alone both gradients are made in the forward pass; with the
    vocabulary split, in the backward pass from logits that are computed again."""
    z, tokens = Sizes.of(model, layout), layout.rank_tokens
    vocab = z.vocab_weight // model.dim
    logits = cluster.gemm_seconds(tokens, vocab, model.dim)
    both = cluster.gemm_seconds(tokens, model.dim, vocab) + cluster.gemm_seconds(vocab, model.dim, tokens)
    moved = 2 * tokens * vocab * WIDE / cluster.memory_bytes_per_s
    if layout.tp == 1:
        return {"matrix products": logits + both, "memory-bound": 2 * moved}, {}
    link = cluster.link(layout.tp)
    gather = collective_seconds(link, layout.tp, z.gathered, "all_gather")
    scatter = collective_seconds(link, layout.tp, z.gathered * WIDE / z.element, "reduce_scatter")
    return (
        {"matrix products": logits, "memory-bound": moved, "tensor communication": gather},
        {"matrix products": logits + both, "memory-bound": 2 * moved, "tensor communication": scatter},
    )


def _pipeline(
    layout: Layout,
    cluster: Cluster,
    model: ModelConfig,
    parts: Mapping[int, tuple[Seconds, Seconds]],
    *,
    roughly: bool,
) -> tuple[float, float, int]:
    """(seconds until the last rank ends, how much of them the longest rank waits, that rank)."""
    times = [tuple(sum(given.values()) for given in parts[stage]) for stage in sorted(parts)]
    each = [sum(map(sum, times[rank :: layout.pp])) for rank in range(layout.pp)]
    longest = max(range(layout.pp), key=each.__getitem__)
    own = each[longest] * layout.num_microbatches
    if layout.pp == 1:
        return own, 0.0, 0
    sent = Sizes.of(model, layout).residual
    hop = cluster.link(layout.tp * layout.cp * layout.pp).seconds(sent)
    if roughly:
        waits = each[longest] * (layout.pp - 1) / layout.num_chunks + 2 * (layout.num_stages - 1) * hop
        return own + waits, waits, longest
    short = layout.shortened()
    found = simulate(
        short.schedule(),
        forward_time=[f for f, _ in times],
        backward_time=[b for _, b in times],
        p2p_latency=hop,
    )
    waits = found.makespan - each[longest] * short.num_microbatches
    return own + waits, waits, longest


def _core_seconds(layout: Layout, cluster: Cluster, parts: Mapping[int, tuple[Seconds, Seconds]]) -> float:
    """What the cores of a cluster whose ranks share them need for all that the ranks do before the step ends."""
    one_pipeline = sum(sum(given.values()) for stage in parts.values() for given in stage) * layout.num_microbatches
    return one_pipeline * layout.tp * layout.cp * layout.dp / min(cluster.cores, layout.world_size)


def _params_of(model: ModelConfig, layout: Layout, stages: list[range], rank: int) -> int:
    z = Sizes.of(model, layout)
    held = range(rank, len(stages), layout.pp)
    ends = (0 in held) + (len(stages) - 1 in held)
    return sum(len(stages[stage]) for stage in held) * z.block_weight + ends * z.vocab_weight


def _data_seconds(layout: Layout, cluster: Cluster, params: int, layers: int, backward: float) -> float:
    """What is not hidden of gathering parameters before, and reducing gradients behind, a step.

    Chunks are gathered as the first micro-batch reaches them and reduced as the last one leaves them, so that about one
    micro-batch's passes hide them; the first and the last chunk have nothing to hide behind. On shared cores all shows.
    """
    ranks = layout.dp * layout.cp
    shard = layout.shard_size
    link = cluster.link(layout.world_size)
    element = 2 if layout.dtype == "bf16" else WIDE
    gather = collective_seconds(link, shard, params * element, "all_gather")
    scatter = collective_seconds(link, shard, params * WIDE, "reduce_scatter")
    replicas = collective_seconds(link, ranks // shard, params / shard * WIDE, "all_reduce")
    if cluster.cores:
        blocks = max(1, (layers + 1) * (shard > 1))
        return gather + scatter + replicas + 2 * (blocks - 1) * link.latency_s
    pieces = layout.num_chunks if layout.pp > 1 else 16  # of one chunk blocks are pieces: the first of them shows
    group = min(layout.pp, layout.num_microbatches) if layout.num_chunks > 1 else 1
    hidden = group * backward * (1 - 1 / pieces)
    exposed = [max(time / pieces, time - window) for time, window in ((gather, hidden / 2), (scatter, hidden))]
    return sum(exposed) + replicas
