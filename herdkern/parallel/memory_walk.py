"""The tensors that a stage of the model makes and frees, in the order in which training does: forward, loss, backward.

Follows herdkern.model and herdkern.ops line by line: what an op keeps for its backward pass, what a Python variable
still holds, what autograd sums. Shapes: n tokens of a micro-batch on this rank; with tensor parallelism the residual
stream is sharded by tokens (sequence parallelism, Korthikanti et al. 2022, arXiv:2205.05198): the norms' outputs are
kept as shards and gathered again in the backward pass.
"""

from dataclasses import dataclass

from herdkern.model.config import ModelConfig
from herdkern.parallel.layout import Layout
from herdkern.parallel.memory_ledger import Ledger, Passage

KEPT, BRIEF, COPIES, GRADS, SHARDS, LOSS = (
    "activations",
    "temporary",
    "weight copies",
    "gradients",
    "gradient shards",
    "loss",
)
WIDE = 4  # bytes of fp32
SCRATCH = 64 << 20  # what linear_cross_entropy may take beside its results, at most


@dataclass(frozen=True)
class Sizes:
    """Bytes of one rank's tensors of a micro-batch: of the residual stream, of q, of k or v, of the feed-forward width,
    of one fp32 number a row and one a row and head; elements of one rank's weights."""

    element: int
    residual: int
    gathered: int  # the residual stream of all tokens of the tensor group
    q: int
    kv: int
    ffn: int
    row: int
    lse: int
    other_context: int  # elements of k and v that come from other context ranks
    norm_weight: int
    q_weight: int
    kv_weight: int
    ffn_weight: int
    vocab_weight: int

    @staticmethod
    def of(model: ModelConfig, layout: Layout) -> "Sizes":
        """The sizes of `model` cut as `layout` says; shares of a rank are rounded up."""
        tp, tokens = layout.tp, layout.rank_tokens
        element = 2 if layout.dtype == "bf16" else WIDE
        own_tokens = -(-tokens // tp)
        heads, kv_heads = -(-model.num_heads // tp), -(-model.num_kv_heads // tp)
        q_dim, kv_dim, ffn_dim = heads * model.head_dim, kv_heads * model.head_dim, -(-model.ffn_dim // tp)
        return Sizes(
            element=element,
            residual=own_tokens * model.dim * element,
            gathered=tokens * model.dim * element,
            q=tokens * q_dim * element,
            kv=tokens * kv_dim * element,
            ffn=tokens * ffn_dim * element,
            row=own_tokens * WIDE,
            lse=tokens * heads * WIDE,
            other_context=2 * (layout.cp - 1) * tokens * kv_dim,
            norm_weight=model.dim,
            q_weight=model.dim * q_dim,
            kv_weight=model.dim * kv_dim,
            ffn_weight=model.dim * ffn_dim,
            vocab_weight=-(-model.vocab_size // tp) * model.dim,
        )

    @property
    def block_weight(self) -> int:
        """Elements of one block's weights on a rank."""
        return 2 * self.norm_weight + 2 * self.q_weight + 2 * self.kv_weight + 3 * self.ffn_weight


class StageWalk:
    """Forward and backward pass of one stage of a layout.

    layers: how many blocks the stage holds.  is_first, is_last: whether it begins with the embedding, ends in the loss.
    """

    def __init__(self, model: ModelConfig, layout: Layout, *, layers: int, is_first: bool, is_last: bool) -> None:
        self.model, self.layout = model, layout
        self.sizes = Sizes.of(model, layout)
        self.layers, self.is_first, self.is_last = layers, is_first, is_last
        self.is_split = layout.tp > 1
        self.copies = layout.dtype == "bf16" and not layout.fsdp  # 16-bit copies that autograd keeps

    @property
    def weight(self) -> int:
        """Elements of the stage's parameters on one rank; a tied head counts where the embedding is not."""
        size = self.layers * self.sizes.block_weight
        if self.is_first:
            size += self.sizes.vocab_weight
        if self.is_last:
            size += self.sizes.norm_weight
            if not (self.model.tied_embeddings and self.is_first):
                size += self.sizes.vocab_weight
        return size

    def forward(self) -> Passage:
        """The forward pass of one micro-batch."""
        ledger, z = Ledger(), self.sizes
        if self.is_first:
            self._embedding_forward(ledger)
        else:
            ledger.add(KEPT, z.residual)  # received
        for layer in range(self.layers):
            self._block_forward(ledger, has_branch=layer > 0)
        if self.is_last:
            self._loss_forward(ledger)
        elif self.layers:
            ledger.add(BRIEF, z.residual)  # x + branch, which is sent and let go
            self._end_blocks(ledger)
            ledger.free(BRIEF, z.residual)
        else:
            ledger.free(KEPT, z.residual)  # an embedding alone: nothing reads its output again
        return ledger.passage()

    def _end_blocks(self, ledger: Ledger) -> None:
        """Behind the last block nobody keeps its branch; nor its x, unless its own norm does."""
        ledger.free(KEPT, self.sizes.residual * (2 if self.layout.recompute == "block" else 1))

    def backward(self, *, first: bool, last: bool) -> Passage:
        """The backward pass of one micro-batch.  first: there are no gradients yet.  last: with fsdp they are reduced
        and scattered behind it."""
        ledger, z = Ledger(), self.sizes
        if self.is_last:
            self._loss_backward(ledger, first)
        else:
            ledger.add(BRIEF, z.residual)  # received
        for layer in reversed(range(self.layers)):
            again = self.layout.recompute == "block"
            if again:
                self._block_inside(ledger, has_branch=layer > 0)
                ledger.free(KEPT, 0 if layer else z.residual)  # the second time the branch is not made
            self._block_backward(ledger, first, has_branch=layer > 0)
            if again and layer:
                ledger.free(KEPT, 2 * z.residual)  # its inputs
        if self.is_first:
            self._embedding_backward(ledger, first)
        else:
            ledger.free(KEPT, z.residual)
            ledger.free(BRIEF, z.residual)  # sent
        if last and self.layout.fsdp:
            self._scatter(ledger)
        return ledger.passage()

    def _copy(self, ledger: Ledger, weight: int, sign: int = 1) -> None:
        if self.copies:
            ledger.add(COPIES, sign * weight * self.sizes.element)

    def _weight_grad(self, ledger: Ledger, weight: int, first: bool) -> None:
        """A weight's gradient: made in the dtype of the product, summed in fp32."""
        narrow = weight * self.sizes.element
        if self.layout.fsdp:
            ledger.add(BRIEF, narrow)  # until the block is done: _sum_grads
            return
        if self.copies:
            ledger.add(BRIEF, narrow)
        ledger.add(GRADS if first else BRIEF, weight * WIDE)
        if self.copies:
            ledger.free(BRIEF, narrow)
        if not first:
            ledger.free(BRIEF, weight * WIDE)

    def _sum_grads(self, ledger: Ledger, weight: int, first: bool) -> None:
        """With fsdp: the gradients of a block become fp32 sums."""
        if self.layout.fsdp:
            if first:
                ledger.add(GRADS, weight * WIDE)
            ledger.free(BRIEF, weight * self.sizes.element)

    def _scatter(self, ledger: Ledger) -> None:
        """Gradients are reduced in fp32, block by block; the whole ones go, the shards stay."""
        z, shard = self.sizes, self.layout.shard_size
        weights = [z.block_weight] * self.layers
        rest = self.weight - sum(weights)
        for weight in [*weights, rest] if rest else weights:
            ledger.add(BRIEF, weight * WIDE)
            ledger.add(SHARDS, -(-weight // shard) * WIDE)
            ledger.free(GRADS, weight * WIDE)
            ledger.free(BRIEF, weight * WIDE)

    def _embedding_forward(self, ledger: Ledger) -> None:
        z = self.sizes
        if self.copies:  # the rows are looked up in fp32
            ledger.add(BRIEF, z.gathered * WIDE // z.element)
        elif self.is_split:
            ledger.add(BRIEF, z.gathered)
        ledger.add(KEPT, z.residual)
        if self.copies:
            ledger.free(BRIEF, z.gathered * WIDE // z.element)
        elif self.is_split:
            ledger.free(BRIEF, z.gathered)

    def _embedding_backward(self, ledger: Ledger, first: bool) -> None:
        z = self.sizes
        if self.layers:
            ledger.free(KEPT, z.residual)
        if self.copies:
            ledger.add(BRIEF, z.gathered * WIDE // z.element)
            ledger.free(BRIEF, z.residual)
        elif self.is_split:
            ledger.add(BRIEF, z.gathered)
            ledger.free(BRIEF, z.residual)
        weight = z.vocab_weight
        tied = self.model.tied_embeddings and self.is_last
        if self.layout.fsdp:
            ledger.add(BRIEF, weight * z.element)
            self._sum_grads(ledger, weight, first)
        else:
            ledger.add(GRADS if first and not tied else BRIEF, weight * WIDE)
            if tied:  # autograd sums the two gradients of the matrix before it hands them on
                ledger.free(BRIEF, weight * WIDE)
                if not first:
                    ledger.free(LOSS, weight * WIDE)
                else:
                    ledger.move(LOSS, GRADS, weight * WIDE)
            elif not first:
                ledger.free(BRIEF, weight * WIDE)
        whole = z.gathered * WIDE // z.element if self.copies else z.gathered if self.is_split else z.residual
        ledger.free(BRIEF, whole)

    def _block_forward(self, ledger: Ledger, *, has_branch: bool) -> None:
        """A block between its inputs and its outputs: x and a branch that is still to be added to it."""
        z = self.sizes
        if self.layout.recompute != "block":
            self._block_inside(ledger, has_branch=has_branch)
            return
        highest = {KEPT: 2 * z.residual + z.row, BRIEF: 3 * z.ffn + self.is_split * z.gathered}
        if self.copies:
            highest[COPIES] = z.ffn_weight * z.element
        ledger.run(Passage({KEPT: 2 * z.residual}, highest))  # x and branch out; those that came in are kept

    def _block_inside(self, ledger: Ledger, *, has_branch: bool) -> None:
        z = self.sizes
        ledger.add(KEPT, z.residual + z.row)  # the normed
        self._copy(ledger, z.norm_weight)
        if has_branch:
            ledger.add(KEPT, z.residual)  # x + branch
        self._gather(ledger)
        self._copy(ledger, z.q_weight)
        ledger.add(BRIEF, z.q)
        self._copy(ledger, z.kv_weight)
        ledger.add(BRIEF, z.kv)
        self._copy(ledger, z.kv_weight)
        ledger.add(KEPT, z.kv)
        self._ungather(ledger)
        ledger.add(KEPT, z.q + z.kv)  # rotated
        ledger.free(BRIEF, z.q + z.kv)
        keys = z.other_context and z.other_context * z.element + 2 * z.kv
        ledger.add(BRIEF, keys)
        ledger.add(KEPT, z.q + z.lse)
        ledger.free(BRIEF, keys)
        self._copy(ledger, z.q_weight)
        self._gather(ledger)  # a partial sum of all tokens, before it is reduced and scattered
        ledger.add(BRIEF, z.residual)
        self._ungather(ledger)
        self._copy(ledger, z.norm_weight)
        ledger.add(KEPT, 2 * z.residual + z.row)  # x + attention, and the normed
        ledger.free(BRIEF, z.residual)
        self._gather(ledger)
        for _ in ("gate", "up"):
            self._copy(ledger, z.ffn_weight)
            ledger.add(KEPT, z.ffn)
        self._ungather(ledger)
        ledger.add(KEPT, z.ffn)  # their product
        self._copy(ledger, z.ffn_weight)
        self._gather(ledger)
        ledger.add(KEPT, z.residual)
        self._ungather(ledger)
        if self.layout.recompute == "swiglu":
            ledger.free(KEPT, z.ffn)
            self._copy(ledger, z.ffn_weight, -1)
        if has_branch:  # the caller held the one that came in until now
            ledger.free(KEPT, z.residual)

    def _gather(self, ledger: Ledger) -> None:
        if self.is_split:
            ledger.add(BRIEF, self.sizes.gathered)

    def _ungather(self, ledger: Ledger) -> None:
        if self.is_split:
            ledger.free(BRIEF, self.sizes.gathered)

    def _block_backward(self, ledger: Ledger, first: bool, *, has_branch: bool) -> None:
        """Begins with one gradient, that of x and of the branch; ends with that of the inputs."""
        z = self.sizes
        self._gather(ledger)  # of that gradient
        if self.layout.recompute == "swiglu":
            ledger.add(KEPT, z.ffn)
            self._copy(ledger, z.ffn_weight)
        ledger.add(BRIEF, z.ffn)
        self._weight_grad(ledger, z.ffn_weight, first)
        ledger.free(KEPT, z.ffn)
        self._copy(ledger, z.ffn_weight, -1)
        self._ungather(ledger)
        ledger.add(BRIEF, 2 * z.ffn)
        ledger.free(BRIEF, z.ffn)
        ledger.free(KEPT, 2 * z.ffn)
        self._projections_backward(ledger, first, [(z.ffn, z.ffn_weight), (z.ffn, z.ffn_weight)])
        self._norm_backward(ledger, first)
        ledger.free(KEPT, z.residual)  # x + attention
        self._gather(ledger)
        ledger.add(BRIEF, z.q)
        self._weight_grad(ledger, z.q_weight, first)
        self._copy(ledger, z.q_weight, -1)
        self._ungather(ledger)
        held, call = self._context_backward()
        ledger.add(BRIEF, z.q)
        ledger.add(BRIEF, held + call)
        ledger.free(BRIEF, call)
        ledger.add(BRIEF, 2 * z.kv)
        ledger.free(BRIEF, held)
        ledger.free(BRIEF, z.q)
        ledger.free(KEPT, 2 * z.q + 2 * z.kv + z.lse)
        ledger.add(BRIEF, z.q + z.kv)  # turned back
        ledger.free(BRIEF, z.q + z.kv)
        weights = [(z.kv, z.kv_weight), (z.kv, z.kv_weight), (z.q, z.q_weight)]
        self._projections_backward(ledger, first, weights)
        self._norm_backward(ledger, first)
        if has_branch:
            ledger.free(KEPT, z.residual)  # x + branch
        self._sum_grads(ledger, z.block_weight, first)

    def _context_backward(self) -> tuple[int, int]:
        """What the backward pass of attention holds on the context rank whose last queries see all keys, and what its
        call for those, half of its queries, adds: the kernel runs in fp32."""
        z = self.sizes
        if not z.other_context:
            return 0, 0
        own = 2 * z.kv // z.element
        keys = z.other_context + own
        held = keys * (z.element + WIDE) + own * WIDE  # gathered again; their gradients, and those of own keys
        queries = z.q // 2 * WIDE // z.element
        call = queries + keys * WIDE  # dq, dk and dv
        return held, call if z.element == WIDE else call + 3 * queries + keys * WIDE  # dout, q, out; k and v

    def _projections_backward(self, ledger: Ledger, first: bool, parts: list[tuple[int, int]]) -> None:
        """Through projections of one normed input: (bytes of the gradient, elements of the weight) of each."""
        z = self.sizes
        self._gather(ledger)  # the normed
        for number, (dout, weight) in enumerate(parts):
            ledger.add(BRIEF, z.gathered)
            self._weight_grad(ledger, weight, first)
            self._copy(ledger, weight, -1)
            ledger.free(BRIEF, dout)
            if number:  # summed with that of the one before
                ledger.free(BRIEF, z.gathered)
        ledger.free(KEPT, z.residual)  # the normed
        if self.is_split:
            ledger.add(BRIEF, z.residual)
            ledger.free(BRIEF, 2 * z.gathered)

    def _norm_backward(self, ledger: Ledger, first: bool) -> None:
        """From the gradients of the normed and of the sum to one."""
        z = self.sizes
        ledger.add(BRIEF, z.residual)
        self._weight_grad(ledger, z.norm_weight, first)
        self._copy(ledger, z.norm_weight, -1)
        ledger.free(BRIEF, 2 * z.residual)
        ledger.free(KEPT, z.row)

    def _loss_forward(self, ledger: Ledger) -> None:
        z = self.sizes
        self._copy(ledger, z.norm_weight)
        ledger.add(KEPT, (2 if self.layers else 1) * z.residual + z.row)  # x + branch, and the normed
        if self.layers:
            self._end_blocks(ledger)
        rows = self.layout.rank_tokens * WIDE
        if self.is_split:  # the gradients are made in the backward pass
            ledger.add(KEPT, z.gathered - z.residual)
            ledger.add(LOSS, 4 * rows)
            ledger.add(BRIEF, 8 * rows)
            ledger.free(BRIEF, 8 * rows)
            return
        ledger.add(LOSS, 5 * rows + z.residual + z.vocab_weight * self._head_element)
        ledger.add(BRIEF, rows)
        ledger.free(BRIEF, rows)

    @property
    def _head_element(self) -> int:
        return self.sizes.element if self.layout.fsdp else WIDE

    def _loss_backward(self, ledger: Ledger, first: bool) -> None:
        z, rows = self.sizes, self.layout.rank_tokens * WIDE
        head = z.vocab_weight * self._head_element
        tied = self.model.tied_embeddings and self.is_first
        if self.is_split:
            ledger.add(BRIEF, self.layout.rank_tokens * self.model.dim * WIDE)
            ledger.add(LOSS, head)
            ledger.add(LOSS, z.residual)
            ledger.free(BRIEF, self.layout.rank_tokens * self.model.dim * WIDE)
            ledger.free(KEPT, z.gathered - z.residual)
        ledger.free(LOSS, (4 if self.is_split else 5) * rows)
        ledger.free(KEPT, z.residual)  # the normed
        if self.layout.fsdp:
            if first and not tied:
                ledger.add(GRADS, z.vocab_weight * WIDE)
            ledger.free(LOSS, head)
        elif not tied:
            if first:
                ledger.move(LOSS, GRADS, head)
            else:
                ledger.free(LOSS, head)
        ledger.add(BRIEF, z.residual)
        ledger.free(LOSS, z.residual)
        self._weight_grad(ledger, z.norm_weight, first)
        self._sum_grads(ledger, z.norm_weight, first)
        self._copy(ledger, z.norm_weight, -1)
        ledger.free(KEPT, (z.residual if self.layers else 0) + z.row)
