"""RoPE of queries and keys, forward and backward, against plain torch, the formulas of others, and torch.compile."""

import sys
from collections.abc import Callable

import torch
from harness import OURS, Bench, Case, fresh_and_reused, pytest_cases
from op_cases import COMPILED, lazily_compiled
from torch import Tensor

from herdkern.ops import rope_qk, rope_qk_reference, rope_table

Turn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in Hugging Face's models: cos and sin repeated, in the dtype of x."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def turn_complex(x: Tensor, turn: Tensor) -> Tensor:
    """As in Meta's release: neighbours are the parts of a complex number."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def of_transformers(cos: Tensor, sin: Tensor) -> Turn | None:
    """apply_rotary_pos_emb of transformers' Llama, None where it is not installed."""
    try:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    except ImportError:
        return None

    def turn(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        # its layout is (batch, heads, tokens, head_dim)
        shown = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
        turned = apply_rotary_pos_emb(*shown, cos.unsqueeze(0), sin.unsqueeze(0))
        return tuple(x.squeeze(0).transpose(0, 1) for x in turned)

    return turn


class Both:
    """One forward and backward pass of queries and keys; ours is handed gradients of its own as the peers are."""

    def __init__(self, function: Turn, inputs: list[Tensor], douts: list[Tensor]) -> None:
        self.function, self.douts = function, douts
        self.leaves = [x.clone().requires_grad_() for x in inputs]

    def __call__(self) -> list[Tensor]:
        """[q, k, dq, dk]."""
        out = self.function(*self.leaves)
        return [*(x.detach() for x in out), *torch.autograd.grad(out, self.leaves, self.douts)]


def same_results(functions: dict[str, Both]) -> None:
    """Ours within 2 errors of plain torch of fp64; a peer may also round cos, sin and each product to its dtype."""
    reference = functions["torch plain"]
    wide = Both(
        reference.function, [x.detach().double() for x in reference.leaves], [d.double() for d in reference.douts]
    )
    true, plain = wide(), reference()
    for name, function in functions.items():
        for got, ref, gold in zip(function(), plain, true, strict=True):
            scale = max(1.0, gold.abs().max().item())
            allowed = 2 * (ref.double() - gold).abs().max().item() + 4 * torch.finfo(torch.float32).eps * scale
            if name != OURS:
                allowed += 4 * torch.finfo(ref.dtype).eps * scale
            off = (got.double() - gold).abs().max().item()
            assert off <= allowed, f"{name}: off by {off:.2e}, allowed {allowed:.2e}"


def case(num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, style: str) -> Case:
    def setup() -> dict[str, Both]:
        interleaved = style == "interleaved"
        cos, sin = rope_table(num_tokens, head_dim)
        doubled = [torch.cat((table, table), dim=-1).to(dtype) for table in (cos, sin)]
        turn = torch.complex(cos, sin).unsqueeze(1)

        def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return rope_qk(q, k, cos, sin, interleaved=interleaved)

        def plain(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return rope_qk_reference(q, k, cos, sin, interleaved=interleaved)

        def halves(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            c, s = (table.to(q.dtype).unsqueeze(1) for table in doubled)
            return rotate_half(q, c, s), rotate_half(k, c, s)

        def products(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return turn_complex(q, turn), turn_complex(k, turn)

        functions: dict[str, Turn | None] = {OURS: ours, "torch plain": plain}
        if interleaved:
            functions |= {"complex product": products, COMPILED: lazily_compiled(plain)}
        else:
            functions |= {"rotate_half": halves, COMPILED: lazily_compiled(halves)}
            functions["transformers"] = of_transformers(*doubled)
        inputs, douts = (
            [torch.randn(num_tokens, h, head_dim).to(dtype) for h in (num_heads, num_kv_heads)] for _ in "xy"
        )
        return {name: Both(f, inputs, douts) for name, f in functions.items() if f is not None}

    return Case(
        name=f"{num_tokens}x({num_heads}+{num_kv_heads})x{head_dim} {style} {str(dtype)[6:]}",
        setup=setup,
        check=same_results,
        bytes=4 * num_tokens * (num_heads + num_kv_heads) * head_dim * dtype.itemsize,
        slow_peers=(COMPILED,),
        memory_apart=True,
    )


SHAPES = [(4096, 32, 8, 128, "half-split"), (4096, 32, 8, 128, "interleaved")]
CASES = [case(*shape, dtype, style) for dtype in (torch.float32, torch.bfloat16) for *shape, style in SHAPES]
BENCH = Bench("rope", [each for one in CASES for each in fresh_and_reused(one)], seconds=10, one_thread=True)
test_rope = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
