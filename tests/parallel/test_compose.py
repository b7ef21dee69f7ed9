"""Every composition of the axes trains as one process: gradients of the first step, losses of ten (by default 3)."""

import pytest
import torch
from pipeline_cases import Batch, make_batches, make_model, one_process, worst_difference
from ranks import every_composition
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from herdkern.parallel import ParallelConfig, ParallelModel, Stage
from herdkern.parallel.compose import whole_gradient
from herdkern.parallel.tensor import parallelize_tensor

pytestmark = pytest.mark.distributed
SHAPE = {"num_layers": 5, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "init_std": 0.1}
BOUND = 1e-5
MAX_NORM = 0.5

FEW = [
    ({"dp": 4, "dp_shard": 2}, False),
    ({"cp": 2, "pp": 2}, True),
    ({"tp": 4}, False),  # two KV heads: each lies on two ranks
    ({"pp": 2, "dp": 2, "num_chunks": 2, "microbatches_in_flight": 3}, False),
]
MORE = [
    ({"tp": 2, "pp": 2, "num_chunks": 2}, True),
    ({"dp": 4, "dp_shard": 1}, True),
    ({"tp": 2, "dp": 2, "dp_shard": 1}, False),
    ({"pp": 2, "dp": 2, "dp_shard": 1}, True),
    ({"tp": 2, "pp": 2, "dp": 2, "num_chunks": 2}, False),
    ({"cp": 2, "pp": 2, "dp": 2, "num_chunks": 3}, False),
    ({"tp": 2, "dp": 4, "dp_shard": 2}, False),
    ({"pp": 2, "dp": 4, "dp_shard": 2}, False),
    ({"dp": 8, "dp_shard": 4}, True),
]


def batches_of(step, config):
    """The micro-batches of each data-parallel rank."""
    return [make_batches(3, seed=100 * step + dp) for dp in range(config.dp)]


def train(rank, sizes, tied, steps):
    """The worst differences: of gradients in the first step, of losses, of gradient norms, of an evaluation."""
    config = ParallelConfig(**sizes)
    model, reference = make_model(tied, **SHAPE), make_model(tied, **SHAPE)
    parallel = ParallelModel(model, config)
    mine = config.place(rank)["dp"]
    ours = torch.optim.AdamW(parallel.parameters(), lr=1e-3)
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-3)
    expected = dict(reference.named_parameters())
    if tied:
        expected["lm_head.weight"] = expected["embed_tokens.weight"]
    gradients, losses, norms = 0.0, [], []
    for step in range(steps):
        batches = batches_of(step, config)
        loss = parallel.step(batches[mine])
        wanted = one_process(reference, [batch for some in batches for batch in some])
        losses.append(worst_difference(loss, wanted))
        if step == 0:
            for name, param in parallel.named_parameters().items():
                difference = worst_difference(whole_gradient(param), expected[name].grad)
                assert difference <= BOUND, f"{name}: {difference}"
                gradients = max(gradients, difference)
        norm = parallel.clip_gradients(MAX_NORM)
        norms.append(worst_difference(norm, torch.nn.utils.clip_grad_norm_(reference.parameters(), MAX_NORM)))
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    held_out = batches_of(77, config)
    with torch.no_grad():
        wanted = one_process(reference, [batch for some in held_out for batch in some], backward=False)
    return gradients, max(losses), max(norms), worst_difference(parallel.evaluate(held_out[mine]), wanted)


def name_of(case):
    sizes, tied = case
    return "-".join(f"{name}{size}" for name, size in sizes.items()) + "-tied" * tied


def check(worlds, case, steps):
    found = worlds(ParallelConfig(**case[0]).world_size).run(train, *case, steps, seconds=120)
    assert max(gradients for gradients, *_ in found) <= BOUND
    assert max(losses for _, losses, _, _ in found) <= BOUND
    assert max(norms for _, _, norms, _ in found) <= BOUND
    assert max(evaluation for *_, evaluation in found) <= BOUND


@pytest.mark.parametrize("case", FEW, ids=name_of)
def test_training_as_in_one_process(worlds, case):
    check(worlds, case, steps=3)


@pytest.mark.full
@pytest.mark.parametrize("case", [*every_composition(), *MORE], ids=name_of)
def test_every_composition(worlds, case):
    check(worlds, case, steps=10)


class Transfers(TorchDispatchMode):
    """Names and dtypes of collectives."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.found.append((func.__name__.partition(".")[0].strip("_"), str(args[0].dtype)))
        return func(*args, **(kwargs or {}))


def transfers_of_data(rank):
    """Collectives of parameters in a step of three micro-batches, dtypes of gradients, and entries on this rank."""
    parallel = ParallelModel(make_model(compute_dtype=torch.bfloat16, **SHAPE), ParallelConfig(dp=4))
    batches = make_batches(3, seed=rank)
    with Transfers() as transfers:
        parallel.pipeline.step(batches)
    kinds = {str(param.grad.dtype) for param in parallel.parameters()}
    return transfers.found, kinds, sum(param.to_local().numel() for param in parallel.parameters())


def test_parameters_are_gathered_once_in_bf16_and_gradients_summed_in_fp32(worlds):
    found = worlds(4).run(transfers_of_data)
    groups = SHAPE["num_layers"] + 1  # blocks, and what is outside of them
    for transfers, gradients, _ in found:
        names = [name for name, _ in transfers]
        assert names.count("allgather_base") == groups  # once a step: not again for other micro-batches or backwards
        assert names.count("reduce_scatter_base") == groups
        assert {dtype for name, dtype in transfers if name == "allgather_base"} <= {"torch.bfloat16", "torch.uint8"}
        assert {dtype for name, dtype in transfers if name == "reduce_scatter_base"} == {"torch.float32"}
        assert gradients == {"torch.float32"}
    assert sum(parts for *_, parts in found) == sum(param.numel() for param in make_model(**SHAPE).parameters())


def kept_by_tensor_parallel_rank(rank, tp):
    """Bytes that live after the forward pass of some layers and did not before, and the all-gathers of both passes."""
    config = ParallelConfig(tp=tp, dp=4 // tp)
    mesh = config.state_mesh()["tp"]
    model = make_model(num_layers=3, num_heads=4, num_kv_heads=4, head_dim=8, ffn_dim=96)
    stage = Stage(model, 1, 3, range(3))  # one in the middle
    parallelize_tensor([stage], mesh)
    cu_seqlens = torch.tensor([0, 20, 64], dtype=torch.int32)
    positions = torch.cat([torch.arange(20), torch.arange(44)])
    batch = Batch(torch.zeros(64, dtype=torch.int64), None, positions, cu_seqlens, 0)
    x = stage.new_hidden(batch).normal_().requires_grad_()
    stage(x, batch).sum().backward()  # what is made once is made
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        out = stage(x, batch)
    events = recorded.profiler.kineto_results.events()
    with Transfers() as transfers:
        out.sum().backward()
    gathers = [name for name, _ in transfers.found].count("allgather_base")
    return sum(event.nbytes() for event in events if event.name() == "[memory]"), gathers


def test_a_tensor_parallel_rank_keeps_its_share_of_the_activations(worlds):
    whole, part = (max(kept for kept, _ in worlds(4).run(kept_by_tensor_parallel_rank, tp)) for tp in (1, 4))
    assert part <= 1.1 * whole / 4
    # gradients of two sums and rows for two sets of matrices, each once for a layer
    assert {gathers for _, gathers in worlds(4).run(kept_by_tensor_parallel_rank, 4)} == {3 * 4}


def test_what_cannot_be_cut_is_refused():
    from herdkern.parallel.tensor import check_widths

    config = make_model(**SHAPE).config
    with pytest.raises(ValueError, match="num_heads must be a multiple of tp=3, got 4"):
        check_widths(config, 3)
    config = make_model(num_layers=1, num_heads=6, num_kv_heads=3, head_dim=8, ffn_dim=48).config
    with pytest.raises(ValueError, match="num_kv_heads must be a multiple or a divisor of tp=2, got 3"):
        check_widths(config, 2)
