"""AdamW in the place of torch.optim.AdamW: one native call for all parameters, the clip inside it, fp32 masters."""

import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from herdkern.ops.adamw import AdamwSettings, adamw_step

_MOMENTS = ("exp_avg", "exp_avg_sq")
_NARROW = (torch.bfloat16, torch.float16)
_OF_ALL_GROUPS = ("max_grad_norm", "master_weights", "stochastic_rounding", "seed")


class AdamW(Optimizer):
    """torch.optim.AdamW with the clip by the global gradient norm and exact 16-bit parameters built in.

    params, lr, betas, eps, weight_decay, maximize: as torch.optim.AdamW, groups and tensors as lr included.
    max_grad_norm: gradients count as scaled to this norm over all groups if theirs is above it; they are not written.
        0: no clip and no norm; inf: the norm alone. If it is not finite, `step` changes nothing at all, counters
        included: look at `grad_norm`.
    master_weights: 16-bit parameters are roundings of float32 values in state[p]["master"], which a change of the
        parameter from outside (loading weights) overrides. torch does not count writes through `p.data`: after them
        delete state[p]["master"]. False: they are rounded to nearest at every step.
    stochastic_rounding: bfloat16 parameters have no master and are rounded up or down at random, right in the mean, by
        (seed, step, place of the parameter, number of the element): a resumed run has the bits of an undisturbed one.
    foreach, fused, capturable: accepted and without effect, there is one implementation.
    torch.compile of a function that calls `step`: the graph breaks there and the update runs as it does without;
    fullgraph=True is refused by torch.
    amsgrad, differentiable: must be False.

    grad_norm: norm of the gradients of the last step, before the clip; None if it was not computed.
    state[p] has step (float32, CPU), exp_avg, exp_avg_sq (float32 for 16-bit parameters too) and master. `state_dict`
    loads into torch.optim.AdamW (which rounds the moments of 16-bit parameters and ignores master) and back.
    Raises: ValueError for numbers out of range, sparse gradients, complex parameters, and parameters that share memory.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        max_grad_norm: float = 0.0,
        master_weights: bool = True,
        stochastic_rounding: bool = False,
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if not max_grad_norm >= 0:
            raise ValueError(f"AdamW: max_grad_norm must be at least 0, got {max_grad_norm}")
        self.max_grad_norm = float(max_grad_norm)
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        self.grad_norm: float | None = None
        self._versions: dict[Tensor, tuple[int, int]] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,  # torch's groups have it
        }
        super().__init__(params, defaults)
        if stochastic_rounding and not any(p.dtype == torch.bfloat16 for p in self._params()):
            warnings.warn("AdamW: stochastic_rounding has no effect without bfloat16 parameters", stacklevel=2)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; as in torch."""
        for name in _OF_ALL_GROUPS:
            if name in param_group:
                raise ValueError(
                    f"AdamW: {name} must be one for all groups, got one in a group; pass it to AdamW itself"
                )
        super().add_param_group(param_group)
        self._check_group(self.param_groups[-1])

    @torch.compiler.disable  # one native call for all parameters: there is nothing to fuse
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; return what `closure` returns.

        closure: computes the loss and the gradients anew.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params: list[Tensor] = []
        settings: list[AdamwSettings] = []
        streams: list[int] = []
        number = 0
        for group in self.param_groups:
            chosen = _settings(group)
            for p in group["params"]:
                if p.grad is not None:
                    params.append(p)
                    settings.append(chosen)
                    streams.append(number)
                number += 1
        states = [self._state_of(p) for p in params]
        self.grad_norm = adamw_step(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            settings,
            masters=[state.get("master") for state in states],
            max_grad_norm=self.max_grad_norm,
            seed=self.seed if self.stochastic_rounding else None,
            streams=streams,
        )
        for p, state in zip(params, states, strict=True):
            if "master" in state:
                self._versions[p] = _version(p)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of this class or of torch.optim.AdamW; tensors are copied, moments and masters stay fp32.

        Raises: ValueError if the groups do not fit, or ask for what there is not (amsgrad).
        """
        seen: list[dict[str, Any]] = []

        def look(_: Any, given: dict[str, Any]) -> None:
            for group in given["param_groups"]:  # before anything is changed
                self._check_group({**self.defaults, **group, "params": []})
            seen.append(given)

        handle = self.register_load_state_dict_pre_hook(look)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        numbers = chain.from_iterable(group["params"] for group in seen[0]["param_groups"])
        for number, p in zip(numbers, self._params(), strict=True):
            saved = seen[0]["state"].get(number, {})
            for key in (*_MOMENTS, "master"):  # torch has cast them to the dtype of p
                if isinstance(saved.get(key), Tensor):
                    self.state[p][key] = saved[key].detach().to(p.device, _wide(p), copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in (*_OF_ALL_GROUPS, "grad_norm")}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._versions = {}  # masters are compared with their parameters before they are used
        for group in self.param_groups:
            for name, value in (("amsgrad", False), ("maximize", False), ("differentiable", False)):
                group.setdefault(name, value)
            self._check_group(group)
            for p in group["params"]:
                if "step" in self.state.get(p, {}):
                    count = float(self.state[p]["step"])
                    self.state[p]["step"] = torch.tensor(count, dtype=torch.float32, device="cpu")

    def _params(self) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("amsgrad", "differentiable"):
            if group[name]:
                raise ValueError(f"AdamW: {name} must be False, got {group[name]!r}; use torch.optim.AdamW for it")
        _settings(group)
        for p in group["params"]:
            if not p.is_floating_point():
                got = str(p.dtype).removeprefix("torch.")
                raise ValueError(f"AdamW: params must be real, got {got}; give torch.view_as_real of them")

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        """The state of `p`, made or completed; its master is that of the present value."""
        state: dict[str, Any] = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        for key in _MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(p, dtype=_wide(p), memory_format=torch.preserve_format)
        wants_master = p.dtype in _NARROW and self.master_weights
        if not wants_master or (self.stochastic_rounding and p.dtype == torch.bfloat16):
            state.pop("master", None)
        elif "master" not in state:
            state["master"] = p.detach().to(torch.float32)
        elif self._versions.get(p) != _version(p):
            master, value = state["master"], p.detach()
            state["master"] = torch.where(master.to(p.dtype) == value, master, value.float())
        return state


def _version(p: Tensor) -> tuple[int, int]:
    """What changes when `p` is written or, by p.data = other, given other memory."""
    return p._version, 0 if type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__ else p.data_ptr()


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _settings(group: dict[str, Any]) -> AdamwSettings:
    beta1, beta2 = group["betas"]
    return AdamwSettings(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        maximize=bool(group["maximize"]),
    )
