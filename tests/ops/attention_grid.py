"""The grid of cases that attention is checked on: what each feature may be, and which combinations are run.

The default run takes a covering selection, in which every value of a feature meets every value of every other; the full
run adds a sample of the whole product. Both are fixed by a seed. A batch holds a few dozen queries and keys and eight
heads: the bound compares largest errors, and those of a handful of numbers are luck. Fewer: test_attention.py.
"""

import itertools
import random
import zlib
from dataclasses import astuple, dataclass, fields

import torch
from attention_cases import DTYPES, LAYOUTS, Packed, packed, relayout, short

from herdkern.ops.backend import available_isas

HEAD_DIMS = (*range(8, 257, 8), 1, 3, 17, 33, 63, 100, 127, 255)
HEADS = ((8, 8), (8, 4), (9, 3), (8, 2), (12, 4), (8, 1), (16, 2))  # (num_heads, num_kv_heads)
MASKS = {  # (causal, window_size)
    "causal": (True, (-1, -1)),
    "full": (False, (-1, -1)),
    "causal_left17": (True, (17, -1)),
    "causal_left64": (True, (64, 3)),  # right says nothing where causal
    "self_only": (True, (0, 0)),
    "left5": (False, (5, -1)),
    "right4": (False, (-1, 4)),
    "around31_32": (False, (31, 32)),
    "around2_0": (False, (2, 0)),
    "ahead9": (False, (0, 9)),
    "wide": (False, (1000, 1000)),
}
LENGTHS = {  # (lengths, lengths_k), the second None where queries and keys are the same tokens
    "ones": ([1] * 40, None),
    "twos": ([2] * 20, None),
    "empty": ([0, 5, 0, 0, 37, 0], None),
    "odd": ([1, 63, 0, 17, 150], None),
    "short": ([3, 1, 12, 7, 5, 9, 2, 11, 4, 6, 10, 8], None),
    "around16": ([15, 16, 17], None),
    "around32": ([31, 32, 33], None),
    "around64": ([63, 64, 65], None),
    "around128": ([127, 128, 129], None),
    "around256": ([257], None),
    "long": ([1, 400, 2], None),
    "decode": ([1] * 16, [5, 64, 131, 1, 17, 33, 100, 2, 8, 65, 129, 16, 3, 40, 32, 70]),
    "steps": ([3, 5, 40], [70, 260, 45]),
    "fewer_keys": ([40, 3, 70], [10, 3, 33]),  # the first queries see no key
    "no_keys": ([5, 36], [0, 39]),
    "no_queries": ([0, 36], [9, 39]),
    "many_queries": ([150], [20]),
    "many_keys": ([40], [300]),
}


@dataclass(frozen=True)
class Case:
    """One combination of features."""

    isa: str
    dtype: torch.dtype
    head_dim: int
    heads: tuple[int, int]
    mask: str
    softcap: float
    sinks: bool
    lengths: str
    layout: str
    scale: float | None
    num_threads: int

    def __str__(self) -> str:
        softmax = f"cap{self.softcap:g}" if self.softcap else "nocap", "sinks" if self.sinks else "nosinks"
        scale = "scale" if self.scale is None else f"scale{self.scale:g}"
        heads = f"{self.heads[0]}over{self.heads[1]}"
        names = self.isa, short(self.dtype), f"D{self.head_dim}", heads, self.mask, *softmax, self.lengths, self.layout
        return "-".join((*names, scale, f"{self.num_threads}t"))

    def batch(self) -> Packed:
        lengths, lengths_k = LENGTHS[self.lengths]
        seed = zlib.crc32(str(self).encode())
        batch = packed(lengths, self.dtype, self.heads, self.head_dim, lengths_k=lengths_k, sinks=self.sinks, seed=seed)
        return relayout(batch, self.layout)

    def options(self) -> dict:
        causal, window_size = MASKS[self.mask]
        return {"causal": causal, "window_size": window_size, "softcap": self.softcap, "softmax_scale": self.scale}


AXES = (
    available_isas(),
    DTYPES,
    HEAD_DIMS,
    HEADS,
    tuple(MASKS),
    (0.0, 1.5, 30.0),
    (False, True),
    tuple(LENGTHS),
    LAYOUTS,
    (None, 0.05, 0.7),
    (1, 2),
)
assert len(AXES) == len(fields(Case))


def covering(axes, seed: int) -> list[tuple]:
    """Rows with one value of each axis such that every two values of two axes are together in some row."""
    rng = random.Random(seed)
    missing = [
        ((a, x), (b, y))
        for a, b in itertools.combinations(range(len(axes)), 2)
        for x, y in itertools.product(range(len(axes[a])), range(len(axes[b])))
    ]
    rng.shuffle(missing)
    wanted, rows = set(missing), []
    for pair in missing:
        if pair not in wanted:
            continue
        row = dict(pair)
        for axis in rng.sample(range(len(axes)), len(axes)):
            if axis not in row:
                order = rng.sample(range(len(axes[axis])), len(axes[axis]))
                row[axis] = max(
                    order, key=lambda x: sum(tuple(sorted([(axis, x), other])) in wanted for other in row.items())
                )
        wanted.difference_update(itertools.combinations(sorted(row.items()), 2))
        rows.append(tuple(axes[axis][row[axis]] for axis in range(len(axes))))
    return rows


def sample(axes, count: int, seed: int, besides: set[tuple]) -> list[tuple]:
    """`count` different rows of the product of `axes` that are not in `besides`."""
    rng, rows = random.Random(seed), dict.fromkeys(besides)
    while len(rows) < len(besides) + count:
        rows[tuple(rng.choice(axis) for axis in axes)] = None
    return list(rows)[len(besides) :]


DEFAULT_CASES = [Case(*row) for row in covering(AXES, seed=0)]
FULL_CASES = [Case(*row) for row in sample(AXES, 8000, 1, {astuple(case) for case in DEFAULT_CASES})]
