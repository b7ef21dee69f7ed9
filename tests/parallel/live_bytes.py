"""Counts the bytes of the tensors that live while training steps run, as torch's own allocator tells its profiler."""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from herdkern.model import Transformer
from herdkern.model.config import ModelConfig
from herdkern.parallel.layout import Layout
from herdkern.parallel.pipeline_schedule import layers_of_stages
from herdkern.train.batch import Batch, build_batch
from herdkern.train.config import OptimizerConfig
from herdkern.train.objective import next_token_loss
from herdkern.train.optimizer import build_adamw
from herdkern.train.recompute import recompute_activations


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that lived at once while `work` ran, beyond those before it. CPU tensors of every kind: results,
    saved activations, buffers inside torch's operators; not what a native kernel takes for itself.

    Nor a tensor whose end nobody saw: a thread of gloo, which the profiler does not follow, was the last to hold it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = []
    todo = list(recorded.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo.extend(event.children)
        kind, fields = event.typed
        if kind == _EventType.Allocation:
            events.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    events.sort(key=lambda event: event[0])
    changes, began = [], {}  # bytes more or fewer, in order; where each address was given out last
    for _, address, size in events:
        if size > 0:
            began[address] = len(changes), size
            changes.append(0)
        elif address in began:
            place, size = began.pop(address)
            changes[place] = size
            changes.append(-size)
        else:
            changes.append(size)  # lived before
    return max(itertools.accumulate(changes, initial=0))


class RankAlone:
    """One pipeline rank of a layout without its neighbours: it runs its list of actions on random tensors, sends into
    nowhere (what was sent keeps its graph, not its memory) and steps its optimizer."""

    def __init__(self, config: ModelConfig, layout: Layout, rank: int) -> None:
        self.actions = layout.schedule().actions[rank]
        self.last = layout.num_stages - 1
        dtype = torch.bfloat16 if layout.dtype == "bf16" else torch.float32
        model = Transformer(config, compute_dtype=dtype)
        recompute_activations(model, layout.recompute)
        self.model, self.layout = model, layout
        stages = layers_of_stages(config.num_layers, layout.pp, layout.num_chunks)
        held = range(rank, len(stages), layout.pp)
        self.blocks = {stage: [model.layers[i] for i in stages[stage]] for stage in held}
        kept = torch.nn.ModuleList(block for blocks in self.blocks.values() for block in blocks)
        if 0 in held:
            kept.append(model.embed_tokens)
        if self.last in held:
            kept.append(model.norm)
            kept.append(model.lm_head)
        self.optimizer = build_adamw(kept, OptimizerConfig())
        rng = np.random.default_rng(0)
        tokens = layout.micro_batch_tokens
        borders = np.array([0, tokens // 3, tokens + 1], np.int32)
        self.batches = [
            build_batch([(rng.integers(0, config.vocab_size, tokens + 1), borders)])
            for _ in range(layout.num_microbatches)
        ]
        self.step()  # moments exist from the second step on
        self.params = list(kept.parameters())

    def static_bytes(self) -> int:
        """Parameters, moments, tables and batches, from the tensors themselves."""
        moments = [t for p in self.params for t in self.optimizer.state[p].values() if t.ndim]
        ids = [t for b in self.batches for t in (b.tokens, b.targets, b.positions)]
        tensors = [*self.params, *moments, *ids, *self.model.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def step(self) -> None:
        """One training step."""
        ends: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor | None]] = {}
        for kind, stage, number in self.actions:
            if kind == "F":
                ends[stage, number] = self._forward(stage, self.batches[number])
            else:
                out, received = ends.pop((stage, number))
                dout = None if stage == self.last else torch.zeros(self._shape(), dtype=self.model.compute_dtype)
                torch.autograd.backward(out, dout)
                del out, received, dout
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _shape(self) -> tuple[int, int]:
        return self.layout.micro_batch_tokens, self.model.config.dim

    def _forward(self, stage: int, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        model, received = self.model, None
        if stage == 0 == self.last:
            return next_token_loss(model, batch)[0], None
        if stage:
            x = received = torch.zeros(self._shape(), dtype=model.compute_dtype, requires_grad=True)
        else:
            x = model.embed_tokens(batch.tokens).to(model.compute_dtype)
        branch = None
        for block in self.blocks[stage]:
            x, branch = block(x, branch, batch.cu_seqlens, batch.positions, (model.rope_cos, model.rope_sin))
        if stage == self.last:
            return model.loss(model.norm(x, branch)[0], batch.targets, reduction="sum"), received
        out = x if branch is None else x + branch
        out.untyped_storage().resize_(0)  # sent
        return out, received
