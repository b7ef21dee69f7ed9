"""Linear cross entropy over a sharded vocabulary: equal to the whole op on two processes of gloo, and to fp64."""

import datetime
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_linear_cross_entropy import BF16, FP32, example
from test_linear_cross_entropy_options import OPTIONS, assert_bound, plain, results

from herdkern.ops import linear_cross_entropy_reference
from herdkern.ops.linear_cross_entropy_parallel import vocab_parallel_linear_cross_entropy

SIZE = (45, 34, 203)


def share_of(rank, first_shard, vocab_size):
    return (0, first_shard) if rank == 0 else (first_shard, vocab_size)


def cases():
    for kind in ("float32", "bfloat16", "mixed", "float64"):
        for reduction in ("mean", "none"):
            for options in ("plain", "all"):
                for frozen in ("neither", "hidden", "weight"):
                    yield kind, reduction, options, frozen


def inputs_of(kind, frozen):
    torch.manual_seed(0)
    x, weight, targets = example(*SIZE, BF16 if kind in ("bfloat16", "mixed") else FP32)
    weight = weight.float() if kind == "mixed" else weight
    x, weight = (t.double() if kind == "float64" else t for t in (x, weight))
    return [x.requires_grad_(frozen != "hidden"), weight.requires_grad_(frozen != "weight")], targets


def check_case(rank, first_shard, kind, reduction, options, frozen, *, reduce_dhidden):
    inputs, targets = inputs_of(kind, frozen)
    begin, end = share_of(rank, first_shard, SIZE[2])
    dloss = torch.randn(SIZE[0]) if reduction == "none" else torch.tensor(0.5)
    douts = dloss, torch.randn(SIZE[0])

    def sharded(x, weight, targets, **keywords):
        return vocab_parallel_linear_cross_entropy(
            x, weight, targets, vocab_start=begin, reduce_dhidden=reduce_dhidden, backend=backend, **keywords
        )

    backend = "reference" if kind == "float64" else "native"
    keywords = {"reduction": reduction, "return_logps": True, **OPTIONS[options]}
    shard = inputs[1].detach()[begin:end].requires_grad_(frozen != "weight")
    got = results(sharded, [inputs[0], shard], targets, douts, **keywords)
    ref = plain(inputs, targets, douts, **keywords)
    gold = results(linear_cross_entropy_reference, inputs, targets, douts, torch.float64, **keywords)
    if frozen != "hidden" and not reduce_dhidden:
        dist.all_reduce(got[2])
    if frozen != "weight":
        ref[-1], gold[-1] = ref[-1][begin:end], gold[-1][begin:end]
    assert_bound(got, ref, gold)


def check_errors(rank):
    (x, weight), targets = inputs_of("float32", "neither")
    for start, message in ((rank * 50, "one in 2 shards"), (rank * 150, "one in 0 shards")):
        with pytest.raises(ValueError, match=f"targets must lie in one shard each, got {message} at index"):
            vocab_parallel_linear_cross_entropy(x, weight[:100], targets % 150 + 1, vocab_start=start)
    with pytest.raises(ValueError, match="vocab_parallel_linear_cross_entropy: vocab_start must be 0 or more, got -1"):
        vocab_parallel_linear_cross_entropy(x, weight, targets, vocab_start=-1)


def work(rank, store, queue, first_shards):
    try:
        timeout = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
        torch.set_num_threads(1)
        for first_shard in first_shards:
            for case in cases():
                check_case(rank, first_shard, *case, reduce_dhidden=True)
        check_case(rank, 71, "float32", "none", "all", "neither", reduce_dhidden=False)
        check_errors(rank)
        queue.put("")
        dist.destroy_process_group()
    except BaseException:
        queue.put(traceback.format_exc())


def test_two_processes_equal_the_whole_op(tmp_path):
    context = mp.get_context("spawn")
    queue = context.Queue()
    first_shards = [1, 101, 71, 202, 203]  # the last leaves the other rank without rows
    processes = [
        context.Process(target=work, args=(rank, tmp_path / "store", queue, first_shards), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    faults = [queue.get(timeout=240) for _ in processes]
    for process in processes:
        process.join(30)
    assert faults == ["", ""], "\n".join(faults)
