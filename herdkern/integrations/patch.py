"""Puts herdkern's kernels into a Hugging Face model that exists, and takes them out again: `herdkern.patch(model)`.

Nothing but that model changes: its modules get a forward of their own, beside the one of their class, and lose it
again. Modules, parameters, names in the state_dict and classes stay what they are.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn

from herdkern.integrations import patch_rules
from herdkern.integrations.patch_rules import PatchedForward, Unfit

_NOW = {
    "norm": "rms_norm",
    "mlp": "swiglu",
    "packed_mlp": "swiglu",
    "rope": "rope_qk",
    "attention": "",
    "loss": "linear_cross_entropy",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One module that is patched.  path: its name in the model.  what: the ops that it now takes."""

    path: str
    module: nn.Module
    what: str
    forward: PatchedForward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Left:
    """One module that stays as it is, and why."""

    path: str
    module: nn.Module
    reason: str


class Patch:
    """What `patch` changed, in `changes`, and what it left, in `left`; `print` shows both.

    `undo()` takes all of it back. As a context manager it does so at the end of the block, also after an exception.
    """

    def __init__(self, model: nn.Module, changes: list[Change], left: list[Left]) -> None:
        self.model, self.changes, self.left = model, tuple(changes), tuple(left)

    @property
    def active(self) -> bool:
        """Whether any module still runs the forward that this patch gave it."""
        return any(change.module.__dict__.get("forward") is change.forward for change in self.changes)

    def undo(self) -> None:
        """Take the patch back; a second time does nothing.

        Raises: RuntimeError, and changes nothing, if other code has put a forward of its own over a patched one.
        """
        _take_back("undo", [(change.path, change.module) for change in self.changes if _is_on(change)])

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        name = type(self.model).__name__
        state = "patched" if self.active else "no longer patched"
        lines = [f"{name}: {len(self.changes)} modules {state}, {len(self.left)} left as they are"]
        rows = [(c.path, type(c.module).__name__, c.what) for c in self.changes]
        rows += [(entry.path, type(entry.module).__name__, f"left: {entry.reason}") for entry in self.left]
        return "\n".join(lines + [f"  {line}" for line in _table(rows)])

    __repr__ = __str__


def _is_on(change: Change) -> bool:
    """False once `unpatch` has undone it, whoever has patched the module since."""
    forward = change.module.__dict__.get("forward")
    return forward is change.forward or not (forward is None or isinstance(forward, PatchedForward))


def _table(rows: list[tuple[str, str, str]]) -> Iterator[str]:
    """Aligned lines; rows that differ in the numbers of their path alone become one."""
    groups: dict[tuple[str, str, str], list[list[int]]] = {}
    for path, kind, what in rows:
        numbers = [int(number) for number in re.findall(r"\d+", path)]
        groups.setdefault((re.sub(r"\d+", "#", path), kind, what), []).append(numbers)
    lines = []
    for (pattern, kind, what), found in groups.items():
        spans = [_span(column) for column in zip(*found)]
        path = "".join(map("".join, zip(pattern.split("#"), [*spans, ""])))
        lines.append((path or "(the model)", kind, what))
    widths = [max((len(line[column]) for line in lines), default=0) for column in (0, 1)]
    for path, kind, what in lines:
        yield f"{path:{widths[0]}}  {kind:{widths[1]}}  {what}"


def _span(numbers: tuple[int, ...]) -> str:
    distinct = sorted(set(numbers))
    if len(distinct) == 1:
        return str(distinct[0])
    if distinct == list(range(distinct[0], distinct[-1] + 1)):
        return f"{{{distinct[0]}..{distinct[-1]}}}"
    return "{" + ",".join(map(str, distinct)) + "}"


def patch(
    model: nn.Module,
    *,
    norm: bool = True,
    mlp: bool = True,
    rope: bool = True,
    loss: bool = True,
    attention: bool = False,
) -> Patch:
    """Return what was changed, after giving the modules of a Hugging Face model forwards that run herdkern's ops.

    norm: RMSNorm modules.  mlp: gated feed-forward modules with SiLU.  rope: the rotation inside attention modules.
    loss: `model(input_ids, labels=labels)` never holds all logits while the model is in training mode; its `logits`
    are then None, as with Liger-Kernel, and `skip_logits=False` (or True, also in evaluation) in the call says
    otherwise.  attention: packed attention with a document mask, as with attn_implementation="herdkern".
    A module is changed only if its own forward, tried on a few numbers, has the formula of ours; the others are
    listed with the reason. `unpatch(model)`, `.undo()` of the result or the end of a `with` block take all of it back.
    Raises: ValueError if nothing can be changed: no such module, or all are patched already; ImportError if loss or
    attention are wanted for a Hugging Face model and transformers is missing or too old.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    wanted = {"norm": norm, "mlp": mlp, "rope": rope, "loss": loss, "attention": attention}
    if not any(wanted.values()):
        raise ValueError("patch: one of norm, mlp, rope, loss and attention must be True, got none")
    changes: list[Change] = []
    left: list[Left] = []
    for path, module in model.named_modules():
        try:
            forward = _forward_for(module, wanted)
        except Unfit as reason:
            left.append(Left(path=path, module=module, reason=str(reason)))
            continue
        if forward is not None:
            changes.append(Change(path=path, module=module, what=_describe(forward), forward=forward))
    if not changes:
        reasons = "; ".join(dict.fromkeys(f"{entry.path or 'the model'}: {entry.reason}" for entry in left[:3]))
        got = f"{type(model).__name__} ({reasons or 'it has no module of these kinds'})"
        raise ValueError(f"patch: model must have a module that herdkern can replace, got {got}")
    for change in changes:  # nothing above changed anything: an exception there leaves the model as it was
        change.module.forward = change.forward
        if change.forward.attention is not None:
            change.module.config._attn_implementation = "herdkern"  # type: ignore[union-attr]
    return Patch(model, changes, left)


def unpatch(model: nn.Module) -> None:
    """Take every patch of `model` and its modules back; also of a copy, or one that was saved while it was patched.

    Raises: ValueError if no module is patched; RuntimeError as `Patch.undo`.
    """
    found = [(path, module) for path, module in model.named_modules() if _is_patched(module)]
    if not found:
        raise ValueError(f"unpatch: model must be patched, got {type(model).__name__} without a patched module")
    _take_back("unpatch", found)


def _is_patched(module: nn.Module) -> bool:
    """Whether a patched forward is on, or under one of other code that keeps it, as accelerate's hooks do."""
    own = module.__dict__.get("forward")
    if own is None or isinstance(own, PatchedForward):
        return own is not None
    kept = (*module.__dict__.values(), getattr(own, "__wrapped__", None), getattr(own, "func", None))
    return any(isinstance(value, PatchedForward) for value in kept)


def _take_back(function: str, modules: list[tuple[str, nn.Module]]) -> None:
    for path, module in modules:
        forward = module.__dict__["forward"]
        if not isinstance(forward, PatchedForward):
            got = getattr(forward, "__qualname__", type(forward).__name__)
            remedy = "take off first what was put over it (a hook of another library)"
            raise RuntimeError(
                f"{function}: forward of {path or 'the model'} must be the patched one, got {got}; {remedy}"
            )
    for _, module in modules:
        forward = module.__dict__["forward"]
        if forward.attention is not None:
            module.config._attn_implementation = forward.attention  # type: ignore[union-attr]
        del module.forward


def _forward_for(module: nn.Module, wanted: dict[str, bool]) -> PatchedForward | None:
    """The forward that `module` is to get; None if it is of no kind that is wanted.  Raises: Unfit."""
    name = type(module).__name__
    if wanted["norm"] and name.endswith("RMSNorm"):
        return PatchedForward(module, "norm", _tried(patch_rules.norm_options, module))
    if wanted["mlp"] and name.endswith("MLP"):
        return PatchedForward(module, _tried(patch_rules.mlp_kind, module), {})
    if wanted["loss"] and name.endswith("ForCausalLM"):
        _tried(patch_rules.check_loss, module)
        return PatchedForward(module, "loss", {})
    if (wanted["rope"] or wanted["attention"]) and name.endswith("Attention"):
        return _attention_for(module, wanted)
    return None


def _attention_for(module: nn.Module, wanted: dict[str, bool]) -> PatchedForward:
    before = None
    if wanted["attention"]:
        from herdkern.integrations.transformers import register

        register()  # adds a name to transformers' table, where it stays; changes no other model
        before = getattr(getattr(module, "config", None), "_attn_implementation", None)
        before = None if before == "herdkern" else before
    if wanted["rope"]:
        try:
            _tried(patch_rules.check_rotation, module)
            return PatchedForward(module, "rope", {}, before)
        except Unfit:
            if before is None:
                raise
    if before is None:
        raise Unfit('its attention is "herdkern" already, or its config names none')
    return PatchedForward(module, "attention", {}, before)


def _tried(probe: Callable[[Any], Any], module: nn.Module) -> Any:
    if "forward" in module.__dict__:
        by = "herdkern.patch" if isinstance(module.__dict__["forward"], PatchedForward) else "other code"
        raise Unfit(f"its forward is replaced already, by {by}")
    try:
        with torch.random.fork_rng(devices=()):  # a forward that draws numbers takes none of the caller's
            return probe(module)
    except Unfit:
        raise
    except Exception as error:  # the forward of a class that nobody here knows, on arguments that it may not take
        raise Unfit(f"its forward cannot be tried: {type(error).__name__}: {error}") from error


def _describe(forward: PatchedForward) -> str:
    now = _NOW[forward.kind]
    if forward.kind == "norm" and forward.options["casting"] != "llama":
        now += f" (casting={forward.options['casting']!r}"
        now += f", weight_offset={forward.options['weight_offset']})" if forward.options["weight_offset"] else ")"
    if forward.attention is not None:
        now = ", ".join(filter(None, (now, f"attention (was {forward.attention!r})")))
    return now
