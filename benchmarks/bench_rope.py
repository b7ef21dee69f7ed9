"""RoPE, forward and backward, against plain torch, complex multiplication as in Meta's release, and torch.compile."""

import sys

import torch
from harness import Bench, Case, pytest_cases
from op_cases import COMPILED, Steps, same_results

from herdkern.ops import rope, rope_reference, rope_table


def rotate_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """As in Hugging Face's models: cos and sin repeated, in the dtype of x."""
    cos, sin = (torch.cat((t, t), dim=-1)[positions].to(x.dtype).unsqueeze(1) for t in (cos, sin))
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def turn_complex(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """As in Meta's release: neighbours are the parts of a complex number."""
    turn = torch.complex(cos, sin)[positions].unsqueeze(1)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def case(num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, interleaved: bool) -> Case:
    def setup() -> Steps:
        cos, sin = rope_table(num_tokens, head_dim)
        positions = torch.arange(num_tokens)

        def ours(x: torch.Tensor) -> torch.Tensor:
            return rope(x, cos, sin, positions, interleaved=interleaved)

        def peer(x: torch.Tensor) -> torch.Tensor:
            return (turn_complex if interleaved else rotate_half)(x, cos, sin, positions)

        def reference(x: torch.Tensor) -> torch.Tensor:
            return rope_reference(x, cos, sin, positions, interleaved=interleaved)

        peer_name = "complex product" if interleaved else "rotate_half"
        return Steps(
            {"herdkern": ours, peer_name: peer}, [torch.randn(num_tokens, num_heads, head_dim).to(dtype)], reference
        )

    return Case(
        name=f"{num_tokens}x{num_heads}x{head_dim} {'interleaved' if interleaved else 'half-split'} {str(dtype)[6:]}",
        setup=setup,
        check=same_results,
        bytes=4 * num_tokens * num_heads * head_dim * dtype.itemsize,
        slow_peers=(COMPILED,),
    )


STYLES = [(4096, 8, 32, False), (2048, 32, 128, False), (2048, 32, 128, True)]
BENCH = Bench(
    "rope", [case(*shape, dtype, style) for dtype in (torch.float32, torch.bfloat16) for *shape, style in STYLES]
)
test_rope = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
