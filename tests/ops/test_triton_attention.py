"""Attention in Triton against fp64: masks, groups of heads, documents of every kind, leaks, repeated runs, the op.

Tiles are small here, so that short documents have several; a few cases take those of the GPU. The plain 16-bit
implementation rounds weights and dS to the dtype of the inputs for their products, as the kernels do.
"""

import functools
import itertools
import random
from dataclasses import replace

import pytest
import torch
from attention_cases import Packed, assert_bound, attention_with_lse, borders, packed, relayout, short
from attention_grid import AXES, LENGTHS, MASKS, sample
from triton_interpreter import DEVICE, triton_runs  # noqa: F401

from herdkern.ops import attention

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
triton_attention = functools.partial(attention_with_lse, backend="triton")
EVERYTHING = {"causal": False, "window_size": (20, 5), "softcap": 2.0, "sinks": True}
CASES = {  # dtype, heads, head_dim, lengths, lengths_k, options
    "causal": (BF16, (2, 1), 64, [1, 20], None, {}),
    "full": (FP16, (2, 2), 16, [20], None, {"causal": False}),
    "around": (FP32, (2, 1), 16, [36], None, {"causal": False, "window_size": (20, 3)}),
    "everything": (BF16, (3, 1), 16, [24, 2], None, EVERYTHING),
    "decode": (BF16, (2, 1), 16, [1, 3], [20, 40], {"sinks": True}),
    "fewer-keys": (FP32, (2, 1), 16, [20, 3], [5, 0], {}),
    "no-queries": (FP32, (2, 1), 16, [0, 4], [9, 4], {"softcap": 3.0}),
    "head-dim-100": (FP32, (2, 1), 100, [20], None, {}),
}
MORE_CASES = {
    "groups": (BF16, (4, 2), 64, [1, 37, 0, 20], None, {}),
    "fp16": (FP16, (2, 2), 32, [40, 9], None, {}),
    "left": (BF16, (4, 1), 16, [60], None, {"window_size": (17, -1)}),
    "right": (FP32, (2, 1), 16, [40], None, {"causal": False, "window_size": (-1, 4)}),
    "left-full": (FP16, (2, 1), 16, [40], None, {"causal": False, "window_size": (5, -1)}),
    "self": (BF16, (2, 1), 16, [5, 30], None, {"window_size": (0, 0)}),
    "softcap": (BF16, (2, 1), 16, [40], None, {"softcap": 3.0}),
    "sinks": (BF16, (4, 2), 16, [3, 40], None, {"sinks": True}),
    "everything-fp32": (FP32, (6, 2), 16, [50, 2], None, EVERYTHING),
    "fewer-keys-sinks": (FP32, (2, 1), 16, [40, 3], [10, 3], {"sinks": True}),
    "no-keys": (BF16, (2, 1), 16, [5, 20], [0, 25], {}),
    "group-of-17": (FP32, (17, 1), 8, [3, 18], None, {}),
    "group-of-32": (BF16, (32, 1), 8, [3, 10], None, {"causal": False}),
    "head-dim-1": (FP32, (2, 1), 1, [20], None, {}),
    "head-dim-96": (BF16, (2, 1), 96, [20], None, {}),
    "head-dim-256": (FP16, (2, 1), 256, [20], None, {}),
    "long": (BF16, (2, 1), 64, [300], None, {"window_size": (100, -1)}),
}
TILES_OF_THE_GPU = {
    "bf16": (BF16, (2, 1), 64, [70], None, {}),
    "bf16-128": (BF16, (8, 2), 128, [1, 140, 0, 40], None, {}),
    "bf16-256": (BF16, (2, 1), 256, [140], None, {"window_size": (60, 0)}),
    "fp32": (FP32, (2, 1), 64, [70], None, {"sinks": True, "window_size": (40, 0)}),
}


def full_but(count: int, cases) -> list:
    """Names of cases; all but the first `count` run in the full form alone."""
    return [pytest.param(name, marks=[pytest.mark.full] * (i >= count)) for i, name in enumerate(cases)]


PATCHED: set[str] = set()  # modules whose triton.language is the interpreter's


@pytest.fixture
def small_tiles(monkeypatch):
    from herdkern.ops.triton import attention as forward
    from herdkern.ops.triton import attention_backward as backward

    for module in (forward, backward):
        monkeypatch.setattr(module, "launch_shape", lambda *_: {"BLOCK_M": 32, "BLOCK_N": 16})


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch):
    """Without checks of integer overflow, and without patching triton.language anew for each call of an inner function:
    half the time."""
    if DEVICE == "cpu":
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))

        def call(self, *args, **kwargs):
            if self.fn.__module__ not in PATCHED:
                interpreter._patch_lang(self.fn)
                PATCHED.add(self.fn.__module__)
            return self.rewrite()(*args, **kwargs)

        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


def made(case, seed=0) -> tuple[Packed, dict]:
    dtype, heads, head_dim, lengths, lengths_k, options = case
    options = dict(options)
    sinks = options.pop("sinks", False)
    with torch.device("cpu"):
        batch = packed(lengths, dtype, heads, head_dim, lengths_k=lengths_k, sinks=sinks, seed=seed)
    return on_device(batch), options


def on_device(batch: Packed) -> Packed:
    return replace(batch, **{name: x.to(DEVICE) for name, x in vars(batch).items() if x is not None})


def check(batch: Packed, **options) -> list[torch.Tensor]:
    got = batch.run(triton_attention, **options)
    assert_bound(batch, got, triton_attention, batch.q.dtype, **options)
    return got


@pytest.mark.parametrize("case", full_but(len(CASES), CASES | MORE_CASES))
@pytest.mark.usefixtures("small_tiles")
def test_matches_fp64(case):
    batch, options = made((CASES | MORE_CASES)[case])
    check(batch, **options)


@pytest.mark.parametrize("case", full_but(1, TILES_OF_THE_GPU))
def test_matches_fp64_with_the_tiles_of_the_gpu(case):
    batch, options = made(TILES_OF_THE_GPU[case])
    check(batch, **options)


@pytest.mark.full
@pytest.mark.parametrize("case", sample(AXES[1:-1], 300, 3, set()), ids=lambda case: "-".join(map(name_of, case)))
@pytest.mark.usefixtures("small_tiles")
def test_matches_fp64_sampled(case):
    dtype, head_dim, heads, mask, softcap, sinks, lengths, layout, scale = case
    causal, window_size = MASKS[mask]
    with torch.device("cpu"):
        batch = packed(LENGTHS[lengths][0], dtype, heads, head_dim, lengths_k=LENGTHS[lengths][1], sinks=sinks)
    batch = relayout(on_device(batch), layout)
    check(batch, causal=causal, window_size=window_size, softcap=softcap, softmax_scale=scale)


def name_of(x) -> str:
    return short(x) if isinstance(x, torch.dtype) else "over".join(map(str, x)) if isinstance(x, tuple) else str(x)


@pytest.mark.parametrize("layout", full_but(1, ["fused", "dim_strided", "every_second_token"]))
@pytest.mark.usefixtures("small_tiles")
def test_strides_change_nothing(layout):
    batch, _ = made((BF16, (4, 2), 16, [9, 0, 4], None, {}))
    for x, y in zip(relayout(batch, layout).run(triton_attention), batch.run(triton_attention)):
        assert torch.equal(x, y)


def of_document(results: list[torch.Tensor], rows: slice, keys: slice) -> list[torch.Tensor]:
    out, lse, dq, dk, dv = results[:5]
    return [out[rows], lse[:, rows], dq[rows], dk[keys], dv[keys]]


def with_content(batch: Packed, document: int, value: float) -> Packed:
    """The batch with every element of one document replaced."""
    rows, keys = batch.documents()[document]
    tensors = {name: getattr(batch, name).clone() for name in ("q", "k", "v", "dout")}
    for name, x in tensors.items():
        x[keys if name in ("k", "v") else rows] = value
    return replace(batch, **tensors)


def changed_documents(batch: Packed, document: int, value: float, op, **options) -> list[int]:
    """Which other documents change by as much as one bit when one becomes `value`."""
    before, after = batch.run(op, **options), with_content(batch, document, value).run(op, **options)
    return [
        d
        for d, places in enumerate(batch.documents())
        if d != document
        and any(not torch.equal(x, y) for x, y in zip(of_document(before, *places), of_document(after, *places)))
    ]


LEAK = (BF16, (2, 1), 16, [7, 5, 1], [7, 18, 3], {"sinks": True})


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("document", [1, pytest.param(0, marks=pytest.mark.full)])
@pytest.mark.parametrize("value", [float("nan"), *(pytest.param(x, marks=pytest.mark.full) for x in (2.0, 1e38))])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.usefixtures("small_tiles")
def test_no_document_reaches_another(value, document, causal):
    batch, _ = made(LEAK)
    assert changed_documents(batch, document, value, triton_attention, causal=causal) == []


@pytest.mark.usefixtures("small_tiles")
def test_control_without_the_document_mask_leaks():
    batch, _ = made(LEAK)

    def unmasked(cu_seqlens, cu_seqlens_k, **more):
        whole = [cu[[0, -1]].contiguous() for cu in (cu_seqlens, cu_seqlens_k)]
        return triton_attention(cu_seqlens=whole[0], cu_seqlens_k=whole[1], **more)

    assert changed_documents(batch, 1, 2.0, unmasked, causal=False) == [0, 2]


@pytest.mark.parametrize(
    "options", [{"causal": False, "window_size": (4, 3)}, pytest.param({}, marks=pytest.mark.full)]
)
@pytest.mark.usefixtures("small_tiles")
def test_neither_a_second_run_nor_other_documents_change_a_bit(options):
    batch, _ = made((BF16, (2, 1), 16, [5, 18], None, {"sinks": True}))
    first, second = (batch.run(triton_attention, **options) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    for rows, keys in batch.documents():
        tensors = {name: getattr(batch, name)[rows] for name in ("q", "k", "v", "dout")}
        alone = replace(batch, **tensors, cu_seqlens=borders([rows.stop - rows.start]).to(DEVICE))
        for x, y in zip(of_document(first, rows, keys), alone.run(triton_attention, **options)):
            assert torch.equal(x, y)


def tiles_of(lengths, lengths_k, tokens, is_reversed, total=None):
    """The list as the kernel makes it: rows of (first, begin, length, begin_k, length_k)."""
    from herdkern.ops.triton.attention_tiles import tile_list

    cu, cu_k = borders(lengths).to(DEVICE), borders(lengths_k).to(DEVICE)
    found, capacity = tile_list(cu, cu_k, (total or sum(lengths), sum(lengths_k)), tokens, is_reversed)
    count = int(found[-1]) if capacity else 0
    assert count <= capacity
    return [tuple(row) for row in found[:-1].view(5, capacity)[:, :count].T.tolist()]


@pytest.mark.parametrize("seed", full_but(6, range(200)))
def test_every_tile_is_listed_once_long_ones_first(seed):
    rng = random.Random(seed)
    lengths, lengths_k = (
        [rng.choice([0, 1, rng.randint(2, 90)]) for _ in range(rng.choice([1, 6, 40 if seed < 6 else 600]))]
        for _ in "qk"
    )
    lengths_k = (lengths_k * len(lengths))[: len(lengths)]
    tokens, is_reversed = rng.choice([1, 5, 32]), seed % 2 == 0
    expected, begin, begin_k = [], 0, 0
    for number, (length, length_k) in enumerate(zip(lengths, lengths_k)):
        firsts = range(0, length, tokens)
        tiles = [(first, begin, length, begin_k, length_k) for first in (reversed(firsts) if is_reversed else firsts)]
        expected.append((-length_k, number, tiles))
        begin, begin_k = begin + length, begin_k + length_k
    assert tiles_of(lengths, lengths_k, tokens, is_reversed) == list(
        itertools.chain.from_iterable(tiles for *_, tiles in sorted(expected))
    )


def test_borders_that_are_none_stay_inside_the_tensors():
    """They cannot be refused without waiting for the device; what they name is cut to what exists."""
    found = tiles_of([30, -20, 50, 10**6], [1, 2, 3, 4], 8, False, total=40)
    assert len(found) > 0
    for first, begin, length, begin_k, length_k in found:
        assert 0 <= begin <= begin + length <= 40
        assert 0 <= first < length
        assert 0 <= begin_k <= begin_k + length_k <= 10


def test_no_tokens_no_documents():
    q, k = torch.zeros(0, 2, 16, requires_grad=True), torch.zeros(0, 1, 16)
    for cu in (torch.zeros(1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)):
        out = attention(q, k, k, cu, backend="triton")
        out.sum().backward()
        assert out.shape == q.grad.shape == (0, 2, 16)


def test_float64_is_refused_with_the_reason():
    q, cu = torch.zeros(3, 1, 16, dtype=torch.float64), borders([3]).to(DEVICE)
    with pytest.raises(NotImplementedError, match="triton: dtype must be float32 or bfloat16 or float16, got float64"):
        attention(q, q, q, cu, backend="triton")


@pytest.mark.usefixtures("small_tiles")
def test_gradients_in_float32_for_callers_that_sum_them():
    from herdkern.ops.triton.attention_backward import run_backward

    batch, _ = made((BF16, (2, 1), 16, [20], None, {}))
    out, lse, dq, dk, dv = batch.run(triton_attention)
    borders = batch.cu_seqlens, batch.cu_seqlens
    found = run_backward(batch.dout, batch.q, batch.k, batch.v, out, lse, *borders, None, -1, 0, 0.0, 0.25, wide=True)
    assert torch.equal(found[0], dq)
    for wide, narrow in zip(found[1:3], (dk, dv)):
        assert wide.dtype == FP32
        assert torch.equal(wide.bfloat16(), narrow)


@pytest.mark.usefixtures("small_tiles")
def test_registered_op():
    batch, _ = made((FP32, (2, 1), 16, [3, 5], None, {"sinks": True}))
    batch.run(triton_attention)  # registers it
    leaves = batch.leaves()
    op = torch.ops.herdkern.triton_attention_forward.default
    args = *(leaves[name] for name in "qkv"), batch.cu_seqlens, batch.cu_seqlens, leaves["sinks"], -1, 0, 0.0, 0.25
    torch.library.opcheck(op, args)


@pytest.mark.usefixtures("small_tiles")
def test_compiles_as_one_graph():
    batch, _ = made((FP32, (2, 1), 16, [3, 5], None, {}))
    whole = torch.compile(triton_attention, fullgraph=True, backend="aot_eager")
    for x, y in zip(batch.run(whole), batch.run(triton_attention)):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("small_tiles")
def test_second_derivatives_are_those_of_the_reference():
    batch, _ = made((FP32, (2, 1), 8, [4, 3], None, {}))

    def squared_gradient(backend):
        q = batch.q.clone().requires_grad_()
        out = attention(q, batch.k, batch.v, batch.cu_seqlens, backend=backend)
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        return torch.autograd.grad(dq.square().sum(), q)[0]

    torch.testing.assert_close(squared_gradient("triton"), squared_gradient("reference"), atol=1e-4, rtol=1e-4)
