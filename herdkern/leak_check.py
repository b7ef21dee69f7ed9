"""Does one document of a packed batch reach another? `assert_no_leak` asks any engine, from outside.

One document at a time is filled with other tokens: no output of another document may change, though outputs of its own
must change at other tokens too: else nothing mixes tokens, and nothing would be proved. The gradient of a loss on
one document may not reach the input of another. Each document packed must equal the document alone. Copies of one
document must agree, or else positions run on over the borders: that is no leak, and reported as what it is.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from herdkern.documents import cu_seqlens_from_lengths, position_ids_from_cu_seqlens

Forward = Callable[[Tensor, Tensor], Tensor]  # (tokens (total_tokens,), cu_seqlens) -> (total_tokens, ...)
_NAME = "assert_no_leak"


class LeakError(AssertionError):
    """A document of a packed batch reaches another: `source` reaches `victim`, first at `token` of the victim.

    difference is how much the output or the gradient there is off; kind is "output", "gradient", "nan" or "alone".
    """

    def __init__(self, message: str, *, kind: str, source: int, victim: int, token: int, difference: float) -> None:
        super().__init__(message)
        self.kind, self.source, self.victim, self.token, self.difference = kind, source, victim, token, difference


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeakReport:
    """What a clean check has seen.

    gradients: False if there was no embedding to take gradients at.
    nan_contained: NaN in one document's embeddings left the others as they were; None if not tried.
    alone_difference: greatest difference between a document packed and alone, in units of the greatest output.
    positions_run_on: copies of one document differ, so positions do not start anew.
    """

    documents: int
    gradients: bool
    nan_contained: bool | None
    alone_difference: float
    positions_run_on: bool


def assert_no_leak(
    model: Any,
    *,
    forward: Callable[[Any, Tensor, Tensor], Tensor] | None = None,
    lengths: Sequence[int] = (6, 1, 13, 4),
    vocab_size: int | None = None,
    embedding: nn.Module | None = None,
    tolerance: float = 0.0,
    alone_tolerance: float = 1e-3,
    require_nan_contained: bool = False,
) -> LeakReport:
    """Raise LeakError if a document reaches another in packed batches of random tokens; return a report if none does.

    model: a herdkern Transformer; a Hugging Face model, called with position_ids that start anew and without a cache; a
        function of (tokens, cu_seqlens); or anything, with `forward`. Whether it trains or evaluates is left as it is,
        and so are its buffers. It may be called under torch.inference_mode, which it leaves for its time.
    forward: forward(model, tokens, cu_seqlens) -> outputs (total_tokens, ...), in the way that training packs; tokens
        (total_tokens,) int64, cu_seqlens (num_docs + 1,) int32.
    lengths: tokens of each document.  vocab_size, embedding: found in a module, where they are not given; without an
        embedding, neither gradients nor NaN are tried.
    tolerance: how much outputs and gradients of other documents may change, in units of the greatest output; 0 asks
        for the same bits, which an engine that regroups tokens by content (a mixture of experts) may not keep.
    alone_tolerance: the same for a document packed against the document alone, where sums may run in another order.
    require_nan_contained: whether NaN that spreads is an error: a dense mask spreads it (0 * NaN) without a leak.
    Warns: UserWarning if positions run on over the borders.
    Raises: LeakError; ValueError if the check would prove nothing (outputs that do not depend on tokens, or on no other
        token of their document, or vary by themselves); TypeError if model cannot be called without `forward`.
    """
    with torch.inference_mode(False), _buffers_kept(model):
        report, copies_difference = _assert_no_leak(
            _runner(model, forward),
            model,
            lengths,
            vocab_size,
            embedding,
            tolerance,
            alone_tolerance,
            require_nan_contained,
        )
    if report.positions_run_on:
        warnings.warn(
            f"{_NAME}: positions run on over the borders: no document reaches another, but copies of one differ by "
            f"their place in the batch, by {copies_difference:.2g} of the greatest output; start position_ids at 0 in "
            "each document (with rotary positions the difference is only one of rounding)",
            stacklevel=2,
        )
    return report


def _assert_no_leak(
    run: Forward,
    model: Any,
    lengths: Sequence[int],
    vocab_size: int | None,
    embedding: nn.Module | None,
    tolerance: float,
    alone_tolerance: float,
    require_nan_contained: bool,
) -> tuple[LeakReport, float]:
    """Return the report, and the least difference between copies of one document."""
    embedding = embedding if embedding is not None else _find_embedding(model)
    size = vocab_size or getattr(embedding, "num_embeddings", None)
    if not isinstance(size, int) or size < 2:
        raise ValueError(f"{_NAME}: vocab_size must be at least 2, got {size}; pass vocab_size=")
    if len(lengths) < 2 or min(lengths) < 1 or max(lengths) < 2:
        got = tuple(lengths)
        raise ValueError(f"{_NAME}: lengths must be at least two positive ones, not all 1, got {got}")
    check = _Check(run, lengths, size, embedding, tolerance, _device_of(model))
    check.outputs()
    nan_contained = None
    if embedding is not None:
        check.gradients()
        nan_contained = check.nan(require_nan_contained)
    alone_difference = check.alone()
    least, greatest = check.copies()
    # positions that run on may explain as much as they do between copies, and some more: lengths and places differ
    if alone_difference > alone_tolerance + 4 * greatest:
        check.fail_alone(alone_tolerance + 4 * greatest)
    report = LeakReport(
        documents=len(lengths),
        gradients=embedding is not None,
        nan_contained=nan_contained,
        alone_difference=alone_difference,
        positions_run_on=least > tolerance,
    )
    return report, least


class _Check:
    """One packed batch and the questions asked of it. Differences are in units of the greatest output, at least 1."""

    def __init__(
        self,
        run: Forward,
        lengths: Sequence[int],
        vocab_size: int,
        embedding: nn.Module | None,
        tolerance: float,
        device: torch.device,
    ) -> None:
        self._run, self.vocab_size, self.embedding, self.tolerance = run, vocab_size, embedding, tolerance
        self.generator = torch.Generator().manual_seed(0)
        self.cu_seqlens = cu_seqlens_from_lengths(list(lengths), device=device)
        self.documents = [slice(*ends) for ends in pairwise(self.cu_seqlens.tolist())]
        self.tokens = torch.randint(vocab_size, (sum(lengths),), generator=self.generator).to(device)
        with torch.no_grad():
            self.base = self.run(self.tokens)
            again = self.run(self.tokens, seed=1)  # dropout would show
        self.scale = max(1.0, float(self.base.float().abs().max()))
        if not bool(self.base.isfinite().all()):
            raise ValueError(f"{_NAME}: the outputs must be finite, got NaN or infinity for random tokens")
        noise = float(_difference(self.base, again).max()) / self.scale
        if noise > self.tolerance:
            remedy = "turn dropout off (model.eval()), or pass a tolerance above it"
            raise ValueError(f"{_NAME}: two runs of one batch must agree, got a difference of {noise:.2g}; {remedy}")

    def run(self, tokens: Tensor, cu_seqlens: Tensor | None = None, seed: int = 0) -> Tensor:
        """Outputs (total_tokens, values); the random numbers of the caller are left as they are."""
        with torch.random.fork_rng(devices=[tokens.device] if tokens.is_cuda else []):
            torch.manual_seed(seed)
            out = self._run(tokens, self.cu_seqlens if cu_seqlens is None else cu_seqlens)
        if not isinstance(out, Tensor) or out.shape[:1] != tokens.shape or not out.is_floating_point():
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{_NAME}: forward must return floats ({len(tokens)} tokens, ...), got {got}")
        return out.flatten(1) if out.dim() > 1 else out[:, None]

    def outputs(self) -> None:
        """Fill one document after another with other tokens."""
        found: _Found = {}
        for source, part in enumerate(self.documents):
            step = torch.randint(1, self.vocab_size, self.tokens[part].shape, generator=self.generator)
            tokens = self.tokens.clone()
            tokens[part] = (tokens[part] + step.to(tokens.device)) % self.vocab_size
            with torch.no_grad():
                changed = _difference(self.run(tokens), self.base) / self.scale
            if not bool(changed[part].any()):
                where = f"{_NAME}: the outputs of document {source} must depend on its tokens"
                raise ValueError(f"{where}, got the same for other tokens; does forward hand them on?")
            found |= {(source, victim): at for victim, at in self._beyond(changed, source).items()}
        self._raise_worst("output", found, "changing its tokens changes the output at")
        if not self._tokens_mix():
            raise ValueError(
                f"{_NAME}: the outputs must depend on other tokens of their document too, got none that does: the "
                "check would prove nothing; give the model weights other than 0 (after a start with an output "
                "projection of 0, train a few steps)"
            )

    def _tokens_mix(self) -> bool:
        """Does a token of the longest document change the output at another one?"""
        part = self._longest()
        for at in range(part.start, part.stop):
            tokens = self.tokens.clone()
            tokens[at] = (tokens[at] + 1) % self.vocab_size
            with torch.no_grad():
                changed = _difference(self.run(tokens), self.base) / self.scale
            changed[at] = 0
            if bool((changed[part] > self.tolerance).any()):
                return True
        return False

    def _longest(self) -> slice:
        return max(self.documents, key=lambda part: part.stop - part.start)

    def gradients(self) -> None:
        """Differentiate a loss on one document after another by the embeddings of all."""
        leaves: list[Tensor] = []

        def as_leaf(rows: Tensor) -> Tensor:
            leaves.append(rows.detach().clone().requires_grad_())
            return leaves[0]

        with self._embedded(as_leaf), torch.enable_grad():
            out = self.run(self.tokens)
        weights = torch.randn(out.shape, generator=self.generator).to(out)
        found: _Found = {}
        for victim, part in enumerate(self.documents):
            loss = (out[part] * weights[part]).sum()
            (gradient,) = torch.autograd.grad(loss, leaves[:1], retain_graph=True)
            size = _difference(gradient, torch.zeros_like(gradient))
            if not bool(size[part].any()):
                raise ValueError(f"{_NAME}: document {victim} must have a gradient by its own embeddings, got 0")
            size = size / max(1.0, float(size[part].max()))
            found |= {(source, victim): at for source, at in self._beyond(size, victim).items()}
        self._raise_worst("gradient", found, "the gradient of a loss on the latter's tokens is not 0 at")

    def nan(self, required: bool) -> bool:
        """Fill the embeddings of one document after another with NaN; return whether the others stay what they are."""
        found: _Found = {}
        for source, part in enumerate(self.documents):

            def with_nan(rows: Tensor, part: slice = part) -> Tensor:
                rows = rows.clone()
                rows[part] = float("nan")
                return rows

            with self._embedded(with_nan), torch.no_grad():
                changed = _difference(self.run(self.tokens), self.base) / self.scale
            found |= {(source, victim): at for victim, at in self._beyond(changed, source).items()}
        if required:
            self._raise_worst("nan", found, "NaN in its embeddings reaches the output at")
        return not found

    def alone(self) -> float:
        """The greatest difference between a document packed and alone."""
        self.differences = []
        for part in self.documents:
            tokens = self.tokens[part]
            with torch.no_grad():
                alone = self.run(tokens, cu_seqlens_from_lengths([len(tokens)], device=tokens.device))
            self.differences.append(float(_difference(alone, self.base[part]).max()) / self.scale)
        return max(self.differences)

    def copies(self) -> tuple[float, float]:
        """How much copies of one document packed together differ: by their places alone, so by their positions.

        The least and the greatest: the last rows of a matrix product may be rounded in another way than the others.
        """
        tokens, copies = self.tokens[self._longest()], 4
        borders = cu_seqlens_from_lengths([len(tokens)] * copies, device=tokens.device)
        with torch.no_grad():
            first, *others = self.run(tokens.repeat(copies), borders).split(len(tokens))
        differences = [float(_difference(first, other).max()) / self.scale for other in others]
        return min(differences), max(differences)

    def fail_alone(self, tolerance: float) -> None:
        """Raise for the document that differs most from itself alone though no content reaches it."""
        victim = max(range(len(self.documents)), key=self.differences.__getitem__)
        raise LeakError(
            f"{_NAME}: document {victim} packed differs from itself alone by {self.differences[victim]:.2g} of the "
            f"greatest output (more than {tolerance:.2g}), whatever the others hold; likely: something that counts all "
            "tokens, such as a mean over the batch or a scale by its length",
            kind="alone",
            source=victim,
            victim=victim,
            token=0,
            difference=self.differences[victim],
        )

    @contextmanager
    def _embedded(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Run the body with change(rows: (total_tokens, dim)) in place of the embedding's output."""
        assert self.embedding is not None
        calls = []

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            calls.append(output.shape)
            return change(output.reshape(-1, output.shape[-1])).view(output.shape)

        handle = self.embedding.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
        if len(calls) != 1 or calls[0][:-1].numel() != len(self.tokens):
            got = f"{len(calls)} calls of shapes {[tuple(shape) for shape in calls]}"
            remedy = "pass the module that turns tokens into vectors as embedding="
            raise ValueError(f"{_NAME}: embedding must run once on all {len(self.tokens)} tokens, got {got}; {remedy}")

    def _beyond(self, changed: Tensor, itself: int) -> dict[int, tuple[int, float]]:
        """{other document: (its first token, greatest value)} where changed: (total_tokens,) exceeds the tolerance."""
        reached = {}
        for other, part in enumerate(self.documents):
            rows = changed[part]
            if other != itself and bool((rows > self.tolerance).any()):
                reached[other] = int((rows > self.tolerance).nonzero()[0]), float(rows.max())
        return reached

    def _raise_worst(self, kind: str, found: "_Found", how: str) -> None:
        if not found:
            return
        (source, victim), (token, difference) = max(found.items(), key=lambda item: item[1][1])
        size = f"{difference:.2g} of the greatest {'gradient' if kind == 'gradient' else 'output'}"
        pairs = len(self.documents) * (len(self.documents) - 1)
        whose = source if kind == "gradient" else victim
        raise LeakError(
            f"{_NAME}: document {source} leaks into document {victim}: {how} token {token} of document {whose} (token "
            f"{self.documents[whose].start + token} of the batch), by {size}; {len(found)} of {pairs} pairs leak; "
            f"likely: {_likely_cause(found, difference)}",
            kind=kind,
            source=source,
            victim=victim,
            token=token,
            difference=difference,
        )


_Found = dict[tuple[int, int], tuple[int, float]]  # (source, victim) -> (first token, greatest difference)


def _likely_cause(found: _Found, worst: float) -> str:
    if worst < 1e-5:
        return (
            "rounding, if the engine regroups tokens by what they hold (a mixture of experts): then pass tolerance=1e-5"
        )
    if all(victim == source + 1 for source, victim in found):
        return "a border that is off by one, or a convolution or token shift across it"
    if all(victim > source for source, victim in found):
        return (
            "causal attention over the whole row: position_ids, cu_seqlens or a block-diagonal mask do not reach it, "
            "or (transformers) a KV cache is kept, beside which position_ids are not read"
        )
    return "attention that sees the whole row, or a statistic over tokens such as BatchNorm or a mean"


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """(rows,) the greatest difference in each row, infinite where one is not finite."""
    difference = (a.float() - b.float()).abs().flatten(1).amax(1)
    return torch.nan_to_num(difference, nan=float("inf"))


def _runner(model: Any, forward: Callable[[Any, Tensor, Tensor], Tensor] | None) -> Forward:
    if forward is not None:
        chosen = forward
        return lambda tokens, cu_seqlens: chosen(model, tokens, cu_seqlens)
    if hasattr(getattr(model, "config", None), "model_type"):
        return lambda tokens, cu_seqlens: _run_hugging_face(model, tokens, cu_seqlens)
    is_ours = type(model).__module__.startswith("herdkern.")
    if callable(model) and (is_ours or not isinstance(model, nn.Module)):
        called: Forward = model
        return called
    raise TypeError(
        f"{_NAME}: model must be a herdkern Transformer, a Hugging Face model or a function of (tokens, cu_seqlens), "
        f"got {type(model).__name__}; pass forward=lambda model, tokens, cu_seqlens: ..."
    )


def _run_hugging_face(model: Any, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    positions = position_ids_from_cu_seqlens(cu_seqlens, len(tokens))
    outputs = model(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
    first: Tensor = outputs[0][0]
    return first


def _find_embedding(model: Any) -> nn.Module | None:
    if not isinstance(model, nn.Module):
        return None
    find = getattr(model, "get_input_embeddings", None)
    if find is not None:
        found: nn.Module | None = find()
        return found
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    named = getattr(model, "embed_tokens", None)
    if isinstance(named, nn.Module):
        return named
    return embeddings[0] if len(embeddings) == 1 else None


@contextmanager
def _buffers_kept(model: Any) -> Iterator[None]:
    """Give the buffers of a module, such as the running mean of BatchNorm, back as they were."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    kept = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in kept:
            module._buffers[name] = buffer
            if not torch.equal(buffer, values):
                with torch.no_grad():
                    buffer.copy_(values)


def _device_of(model: Any) -> torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))
