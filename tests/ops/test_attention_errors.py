"""Wrong calls of attention: each raises the documented exception, which names the argument and what it was."""

import itertools
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from attention_cases import borders, short

from herdkern.ops import attention

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.bool)
NOT_FLOATS = (*INTEGERS, torch.complex64, torch.complex128, *FLOAT8)
NOT_TENSORS = [1, 2.5, "q", [[[1.0]]], (1.0,), {}, {1.0}, True, b"1", np.zeros((6, 4, 8)), len, torch.float32]
WRONG_SHAPES = [(), (6,), (6, 8), (6, 4, 8, 1), (1, 6, 4, 8), (1, 1, 6, 4, 8)]


@dataclass
class Wrong:
    """A call with one argument wrong, what the message says of it, and the exception."""

    argument: str
    got: str  # what follows "got "
    changes: dict = field(repr=False)
    exception: type = ValueError
    label: str = ""

    def __str__(self) -> str:
        return re.sub(r"[^\w.=+<>,()-]+", "_", f"{self.argument}={self.label or self.got}")


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def arguments(changes: dict) -> tuple[list, dict]:
    tensors = {"q": zeros(6, 4, 8), "k": zeros(6, 2, 8), "v": zeros(6, 2, 8), "cu_seqlens": borders([2, 4])}
    options = {name: value for name, value in changes.items() if name not in tensors}
    return list((tensors | {name: x for name, x in changes.items() if name in tensors}).values()), options


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def not_tensors():
    for name in ("q", "k", "v", "cu_seqlens", "cu_seqlens_k", "sinks"):
        values = NOT_TENSORS if name in ("cu_seqlens_k", "sinks") else [None, *NOT_TENSORS]
        yield from (Wrong(name, type(x).__name__, {name: x}, TypeError) for x in values)


def sparse_and_nested():
    for name, x in (("q", zeros(6, 4, 8)), ("k", zeros(6, 2, 8)), ("v", zeros(6, 2, 8)), ("sinks", zeros(4))):
        yield Wrong(name, "sparse_coo", {name: x.to_sparse()})
    for name in ("cu_seqlens", "cu_seqlens_k"):
        yield Wrong(name, "sparse_coo", {name: borders([2, 4]).to_sparse()})
    nested = torch.nested.nested_tensor([zeros(2, 4, 8), zeros(4, 4, 8)], layout=torch.jagged)
    yield from (Wrong(name, "a nested tensor", {name: nested}) for name in "qkv")


def shapes():
    yield from (Wrong("q", str(shape), {"q": zeros(*shape)}) for shape in WRONG_SHAPES)
    yield from (Wrong("k", str(shape), {"k": zeros(*shape)}) for shape in WRONG_SHAPES)
    yield from (Wrong("v", str(shape), {"v": zeros(*shape)}) for shape in WRONG_SHAPES)
    for head_dim in (0, 257, 258, 264, 300, 512, 1024):
        wide = {name: zeros(6, heads, head_dim) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
        yield Wrong("head_dim", str(head_dim), wide)
    for head_dim in (0, 1, 4, 7, 9, 16, 256, 257):
        yield Wrong("k", str((6, 2, head_dim)), {"k": zeros(6, 2, head_dim), "v": zeros(6, 2, head_dim)})
        yield Wrong("v", str((6, 2, head_dim)), {"v": zeros(6, 2, head_dim)})
    for tokens in (0, 1, 5, 7, 12):
        yield Wrong("v", str((tokens, 2, 8)), {"v": zeros(tokens, 2, 8)})
        yield Wrong("k", str(tokens), {"k": zeros(tokens, 2, 8), "v": zeros(tokens, 2, 8)})
    for heads in (0, 1, 3, 4):
        yield Wrong("v", str((6, heads, 8)), {"v": zeros(6, heads, 8)})


def heads():
    for num_heads, num_kv_heads in itertools.product(range(13), range(1, 13)):
        if num_heads == 0 or num_heads % num_kv_heads:
            keys = {name: zeros(6, num_kv_heads, 8) for name in "kv"}
            label = f"{num_heads}over{num_kv_heads}"
            yield Wrong("num_heads", str(num_heads), {"q": zeros(6, num_heads, 8), **keys}, label=label)
    yield Wrong("k", "(6, 0, 8)", {"k": zeros(6, 0, 8), "v": zeros(6, 0, 8)})


def dtypes():
    for dtype in NOT_FLOATS:
        operands = {name: zeros(6, count, 8).to(dtype) for name, count in (("q", 4), ("k", 2), ("v", 2))}
        yield Wrong("q", short(dtype), operands)
        yield from (Wrong(name, short(dtype), {name: operands[name]}) for name in "kv")
        yield Wrong("sinks", short(dtype), {"sinks": zeros(4).to(dtype)})
    others = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for one, other in itertools.permutations(others, 2):
        q, k, v = zeros(6, 4, 8, dtype=one), zeros(6, 2, 8, dtype=one), zeros(6, 2, 8, dtype=one)
        label = f"{short(other)}_for_{short(one)}"
        yield Wrong("k", short(other), {"q": q, "k": k.to(other), "v": v}, label=label)
        yield Wrong("v", short(other), {"q": q, "k": k, "v": v.to(other)}, label=label)
    for dtype in (*NOT_FLOATS, *others):
        if dtype != torch.int32:
            yield Wrong("cu_seqlens", short(dtype), {"cu_seqlens": zeros(3).to(dtype)})
            yield Wrong("cu_seqlens_k", short(dtype), {"cu_seqlens_k": zeros(3).to(dtype)})


def devices():
    elsewhere = {
        "k": zeros(6, 2, 8, device="meta"),
        "v": zeros(6, 2, 8, device="meta"),
        "cu_seqlens": zeros(3, dtype=torch.int32, device="meta"),
        "cu_seqlens_k": zeros(3, dtype=torch.int32, device="meta"),
        "sinks": zeros(4, device="meta"),
    }
    yield from (Wrong(name, "meta", {name: x}) for name, x in elsewhere.items())
    q = zeros(6, 4, 8, device="meta")
    yield Wrong("k", "cpu", {"q": q})
    yield Wrong("v", "cpu", {"q": q, "k": elsewhere["k"]})
    keys = {"q": q, "k": elsewhere["k"], "v": elsewhere["v"]}
    yield Wrong("cu_seqlens", "cpu", keys)
    yield Wrong("cu_seqlens_k", "cpu", {**keys, "cu_seqlens": elsewhere["cu_seqlens"], "cu_seqlens_k": borders([2, 4])})
    yield Wrong("sinks", "cpu", {**keys, "cu_seqlens": elsewhere["cu_seqlens"], "sinks": zeros(4)})


def border_forms():
    for name in ("cu_seqlens", "cu_seqlens_k"):
        for shape in ((), (0,), (1, 3), (3, 1), (3, 3), (1, 1, 3)):
            yield Wrong(name, str(shape), {name: zeros(*shape, dtype=torch.int32)})
        for step in (2, 3):
            yield Wrong(name, f"stride {step}", {name: int32([0, 2, 6]).repeat_interleave(step)[::step]})
    for count in (1, 2, 4, 5, 9):
        yield Wrong(
            "cu_seqlens_k", str(count), {"cu_seqlens_k": int32([0, *[6] * (count - 1)])}, label=f"{count}_borders"
        )


RIGHT_BORDERS = [0, 1, 1, 3, 5, 6]


def border_values():
    """Every place of right borders spoilt by every value that breaks a rule there; the first fault is reported."""
    values = [-(2**31), -7, -1, 0, 1, 2, 4, 6, 7, 1000, 2**31 - 1]
    for name, place, value in itertools.product(("cu_seqlens", "cu_seqlens_k"), range(len(RIGHT_BORDERS)), values):
        spoilt = list(RIGHT_BORDERS)
        spoilt[place] = value
        falls = [later for earlier, later in itertools.pairwise(spoilt) if later < earlier]
        if spoilt[0] != 0:
            got = spoilt[0]
        elif falls:
            got = falls[0]
        elif spoilt[-1] != 6:
            got = spoilt[-1]
        else:
            continue
        changes = {"cu_seqlens": int32(RIGHT_BORDERS), name: int32(spoilt)}
        yield Wrong(name, str(got), changes, label=f"{value}_at_{place}")
    for value in (-1, 1, 6, 7):
        yield Wrong("cu_seqlens", str(value), {"cu_seqlens": int32([value])}, label=f"{value}_alone")


def options():
    windows = [None, 3, "ab", "12", (), (1,), (1, 2, 3), {1, 2}, {1: 2, 2: 3}, 1.5, True, np.zeros(2), torch.zeros(2)]
    sides = [-2, -100, -(2**63), 2**63, 2**70, 1.0, 0.5, "1", None, True, False, float("inf"), float("nan"), [1], 1j]
    for window in windows:
        yield Wrong("window_size", repr(window), {"window_size": window})
    for side in sides:
        yield from (Wrong("window_size", repr(w), {"window_size": w}) for w in ((side, 0), (0, side), [side, -1]))
    nothing = [
        float("nan"),
        float("inf"),
        -float("inf"),
        -1.0,
        -1,
        -1e-30,
        "1",
        [1.0],
        (1.0,),
        1j,
        True,
        torch.ones(()),
    ]
    for value in (*nothing, np.ones(1), 1e39, 1e300, 1e-39, 1e-300, np.float64(-1), 2**200):
        yield Wrong("softcap", repr(value), {"softcap": value})
        yield Wrong("softmax_scale", repr(value), {"softmax_scale": value})
    yield from (Wrong("softcap", repr(value), {"softcap": value}) for value in (None, False))
    yield from (Wrong("softmax_scale", repr(value), {"softmax_scale": value}) for value in (0, 0.0, -0.0, False))
    for value in (-1, -5, -(2**40), 1.5, 6.0, "6", [6], (6,), True, False, 1j, torch.tensor(6), float("nan")):
        yield Wrong("max_seqlen", repr(value), {"max_seqlen": value})
    for value in (None, 0, 1, "yes", "False", [], 1.0, torch.tensor(True)):
        yield Wrong("causal", repr(value), {"causal": value})
        yield Wrong("return_lse", repr(value), {"return_lse": value})
    for shape in ((), (0,), (1,), (2,), (3,), (5,), (8,), (1, 4), (4, 1), (2, 2), (4, 8), (6, 4)):
        yield Wrong("sinks", str(shape), {"sinks": zeros(*shape)})


WRONG = [
    *not_tensors(),
    *sparse_and_nested(),
    *shapes(),
    *heads(),
    *dtypes(),
    *devices(),
    *border_forms(),
    *border_values(),
    *options(),
]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_call(wrong, backend):
    positional, keywords = arguments(wrong.changes)
    with pytest.raises(wrong.exception) as caught:
        attention(*positional, **keywords, backend=backend)
    assert type(caught.value) is wrong.exception
    rule = rf"attention: {wrong.argument}\b.* must .*, got {re.escape(wrong.got)}(;.*)?"
    assert re.fullmatch(rule, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize("wrong", list(border_values()), ids=str)
def test_wrong_borders_in_a_compiled_call(wrong):
    """Borders are data: the compiled call reads them when it runs."""
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    positional, keywords = arguments(wrong.changes)
    with pytest.raises(ValueError, match=rf"attention: {wrong.argument} must .*, got {wrong.got}$"):
        compiled(*positional, **keywords)


@pytest.mark.parametrize("name", ["cuda", "", "NATIVE", "flash", "torch", 3])
def test_unknown_backend(name):
    positional, _ = arguments({})
    with pytest.raises(NotImplementedError, match=rf"^attention: no backend can run this call \(asked for {name!r}\)"):
        attention(*positional, backend=name)


def test_no_backend_for_a_dtype_says_why():
    x = zeros(6, 2, 8, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="dtype must be float32 or bfloat16 or float16, got float64"):
        attention(x, x, x, borders([6]), backend="native")
    with pytest.warns(UserWarning, match="attention: using 'reference' because native: dtype"):
        attention(x, x, x, borders([6]))


@pytest.mark.parametrize(
    "changes",
    [
        {"window_size": [3, 4]},
        {"window_size": (np.int64(3), np.int32(-1))},
        {"window_size": (2**63 - 1, 2**63 - 1)},
        {"softcap": np.float32(2)},
        {"softcap": 3},
        {"softmax_scale": np.float64(0.5)},
        {"softmax_scale": 2},
        {"max_seqlen": np.int64(6)},
        {"max_seqlen": 0},
        {"cu_seqlens": int32([0, 0, 6, 6])},
        {"cu_seqlens_k": borders([6, 0])},
        {"sinks": zeros(4, dtype=torch.float64)},
    ],
    ids=str,
)
def test_right_calls_that_look_odd(changes):
    positional, keywords = arguments(changes)
    assert attention(*positional, **keywords).shape == (6, 4, 8)


def test_a_lazily_negated_input_is_read_negated():
    """torch keeps the sign of some views as a flag; memory holds the opposite."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(6, 2, 8, generator=generator) for _ in range(3))
    expected = attention(-q, -k, -v, borders([6]))
    got = attention(*(torch._neg_view(x) for x in (q, k, v)), borders([6]))
    assert torch.equal(got, expected)
