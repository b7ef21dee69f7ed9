"""What `herdkern.patch` puts in the place of a module's forward, and how it finds out whether that may be done.

A module is replaced when its own forward, run on a few numbers, gives what ours gives: names change from version to
version and family to family, formulas tell. Nothing of the module runs that hooks or other libraries added.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from herdkern import ops

_SAME = 1e-5  # relative, fp32: two formulas that are one differ by roundings, 1e-7; two formulas differ by far more
_ROTATION = "apply_rotary_pos_emb"


class Unfit(Exception):
    """Why a module is left as it is."""


class PatchedForward:
    """The forward of one module while it is patched; it lies in the `__dict__` of that module alone.

    kind: a key of FORWARDS.  options: what the probe found out, arguments of that forward.  attention: the
    implementation that the module's config named before, where patch changed that; else None.
    It can be copied and pickled with its module, whose copy is then patched too.
    """

    def __init__(self, module: nn.Module, kind: str, options: dict[str, Any], attention: str | None = None) -> None:
        self.module, self.kind, self.options, self.attention = module, kind, options, attention
        self.function = FORWARDS[kind](type(module))
        self.__signature__ = inspect.signature(types.MethodType(type(module).forward, module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it, with the arguments of the module's own forward."""
        return self.function(self.module, *args, **self.options, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return PatchedForward, (self.module, self.kind, self.options, self.attention)


def _norm_forward(module: Any, x: Tensor, *, eps: float | None, casting: Any, weight_offset: float) -> Tensor:
    if x.dtype != module.weight.dtype:  # autocast: the original's result is of the wider dtype
        out: Tensor = type(module).forward(module, x)
        return out
    if eps is None:
        eps = _default_eps(x.dtype)
    return ops.rms_norm(x, module.weight, eps=eps, casting=casting, weight_offset=weight_offset)


def _default_eps(dtype: torch.dtype) -> float:
    """What torch.nn.RMSNorm takes for eps=None."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def _mlp_forward(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.down_proj(ops.swiglu(module.gate_proj(x), module.up_proj(x)))
    return out


def _packed_mlp_forward(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.down_proj(ops.swiglu(module.gate_up_proj(x)))
    return out


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return (q, k) turned.  q, k: (batch, heads, tokens, head_dim).  cos, sin: (1 or batch, tokens, head_dim)."""
    batch_size, _, num_tokens, head_dim = q.shape
    cos, sin = (table[..., : head_dim // 2].reshape(-1, head_dim // 2).float() for table in (cos, sin))
    positions = None
    if cos.shape[0] != batch_size * num_tokens:
        positions = torch.arange(num_tokens, device=q.device).repeat(batch_size)
    q, k = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))  # the memory of a projection, not a copy of it
    turned = ops.rope_qk(q, k, cos, sin, positions)
    q, k = (x.unflatten(0, (batch_size, num_tokens)).transpose(1, 2) for x in turned)
    return q, k


@functools.cache
def _with_rotation(forward: types.FunctionType, original: Callable[..., Any]) -> types.FunctionType:
    """The code of `forward` with `rotate` in the place of its module's global function `original`."""

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        device = q.device.type
        same = q.dtype == k.dtype and (q.dtype == cos.dtype or torch.is_autocast_enabled(device))
        fits = same and not args and not kwargs and q.dim() == 4 and cos.dim() == 3
        if fits and cos.shape[-1] == q.shape[-1] and cos.shape[0] in (1, q.shape[0]) and cos.shape[1] == q.shape[2]:
            return rotate(q, k, cos, sin)
        return original(q, k, cos, sin, *args, **kwargs)

    # without __name__: torch.compile would look names up in the module of that name, and find the original
    scope = {name: value for name, value in forward.__globals__.items() if name != "__name__"}
    scope[_ROTATION] = apply
    copy = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _attention_forward(cls: type) -> Callable[..., Any]:
    forward: Any = cls.forward  # type: ignore[attr-defined]
    return _with_rotation(forward, forward.__globals__[_ROTATION])


def _loss_forward(cls: type) -> Callable[..., Any]:
    original: Any = cls.forward  # type: ignore[attr-defined]
    parameters = list(inspect.signature(original).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    def forward(model: Any, *args: Any, skip_logits: bool | None = None, **kwargs: Any) -> Any:
        if len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
            return original(model, *args, **kwargs)  # raises TypeError
        kwargs.update(zip(names, args))
        has_labels = kwargs.get("labels") is not None
        if skip_logits and not has_labels:
            raise ValueError("forward: labels must be given with skip_logits=True, got none")
        skip_logits = model.training if skip_logits is None else skip_logits
        keeps = kwargs.get("logits_to_keep", 0)
        keeps_all = isinstance(keeps, int) and keeps == 0  # else the labels are meant for some tokens alone: rare
        if not (has_labels and skip_logits and keeps_all) or why_head_unfit(model) is not None:
            return original(model, **kwargs)
        return _fused_loss(model, **kwargs)

    return forward


def _fused_loss(
    model: Any, labels: Tensor, logits_to_keep: int = 0, return_dict: bool | None = None, **kwargs: Any
) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    outputs = getattr(model, model.base_model_prefix)(**kwargs)
    result = CausalLMOutputWithPast(
        loss=fused_causal_loss(model, outputs.last_hidden_state, labels, **kwargs),
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    return_dict = model.config.return_dict if return_dict is None else return_dict
    return result if return_dict else result.to_tuple()


def fused_causal_loss(
    model: Any,
    hidden: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Return transformers' ForCausalLMLoss of the head's logits, without them.  hidden: (batch, tokens, dim)."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    softcap = getattr(model.config, "final_logit_softcapping", None)
    loss = ops.linear_cross_entropy(
        hidden.flatten(0, -2),
        model.lm_head.weight,
        shift_labels.flatten().to(hidden.device),
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
        softcap=softcap or 0.0,
    )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


FORWARDS: dict[str, Callable[[type], Callable[..., Any]]] = {
    "norm": lambda cls: _norm_forward,
    "mlp": lambda cls: _mlp_forward,
    "packed_mlp": lambda cls: _packed_mlp_forward,
    "rope": _attention_forward,
    "attention": lambda cls: cls.forward,  # type: ignore[attr-defined]
    "loss": _loss_forward,
}


def why_head_unfit(model: Any) -> str | None:
    """Why the loss of `model` cannot be had from hidden states and the head's weight; None if it can."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"lm_head must be a torch.nn.Linear, got {type(head).__name__}"
    if head.bias is not None:
        return "lm_head must have no bias, got one"
    if "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks:
        return "lm_head must have no hooks, got some"
    if model.loss_function is not ForCausalLMLoss:
        return f"loss_function must be ForCausalLMLoss, got {getattr(model.loss_function, '__name__', 'another')}"
    return None


def refuse_dropout(modules: Iterable[nn.Module]) -> None:
    """Raises Unfit if one of them drops: in evaluation, as models are loaded, it cannot be told from nothing."""
    for module in modules:
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise Unfit(f"it has a {type(module).__name__}, which our forward would leave out")


def _bare(module: nn.Module, **replaced: Any) -> Any:
    """A stand-in for `module` in training with its attributes, some replaced; the module itself is not touched."""
    clone = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    for store in ("_parameters", "_modules"):
        kept = {name: value for name, value in module.__dict__[store].items() if name not in replaced}
        clone.__dict__[store] = kept
    clone.__dict__.update(replaced, training=True)  # what a forward does in training alone must be seen
    return clone


def _numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)  # the caller's random numbers stay as they were
    return torch.randn(shape, generator=generator, device="cpu").to(dtype)


def _agree(got: Any, expected: Tensor) -> bool:
    if not isinstance(got, Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    return bool(((got - expected).abs() <= _SAME * expected.abs().clamp(min=1)).all())


def norm_options(module: Any) -> dict[str, Any]:
    """The arguments of `ops.rms_norm` with which it is `module`.  Raises: Unfit."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        raise Unfit("weight must be one vector")
    if not hasattr(module, "variance_epsilon") and not hasattr(module, "eps"):
        raise Unfit("it has no eps")
    eps = getattr(module, "variance_epsilon", None) if hasattr(module, "variance_epsilon") else module.eps
    dim = weight.shape[0]
    num_rows = max(2, 2048 // dim)
    for weight_offset in (0.0, 1.0):
        for casting in ("llama", "gemma", "none"):
            options = {"eps": eps, "casting": casting, "weight_offset": weight_offset}
            if all(_norm_fits(module, options, num_rows, dtype) for dtype in (torch.float32, torch.bfloat16)):
                return options
    raise Unfit("its formula is none of ours")


def _norm_fits(module: Any, options: dict[str, Any], num_rows: int, dtype: torch.dtype) -> bool:
    dim = module.weight.shape[0]
    x, weight = _numbers(num_rows, dim, seed=0, dtype=dtype), _numbers(dim, seed=1, dtype=dtype)
    got = type(module).forward(_bare(module, weight=weight), x)
    eps = _default_eps(dtype) if options["eps"] is None else options["eps"]
    expected = ops.rms_norm_reference(x, weight, **{**options, "eps": eps})
    if dtype == torch.float32:
        return _agree(got, expected)
    # the modes differ in where they round, in a third of all elements; one formula written in two ways in far fewer
    return got.dtype == dtype and float((got != expected).float().mean()) < 0.02


def mlp_kind(module: Any) -> str:
    """The key of FORWARDS that is `module`.  Raises: Unfit."""
    refuse_dropout(module.modules())
    names = {name for name, _ in module.named_children()}
    packed = {"gate_up_proj", "down_proj"} <= names
    if not packed and not {"gate_proj", "up_proj", "down_proj"} <= names:
        raise Unfit("it has no gate_proj, up_proj and down_proj")
    dim, ffn_dim = 6, 10
    matrices = {"down_proj": _numbers(ffn_dim, dim, seed=2)}
    if packed:
        matrices["gate_up_proj"] = _numbers(dim, 2 * ffn_dim, seed=0)
    else:
        matrices |= {name: _numbers(dim, ffn_dim, seed=i) for i, name in enumerate(("gate_proj", "up_proj"))}
    projections = {name: functools.partial(torch.matmul, other=matrix) for name, matrix in matrices.items()}
    clone, x = _bare(module, **projections), 3 * _numbers(5, dim, seed=3)
    gates = projections["gate_up_proj"](x).chunk(2, -1) if packed else [projections[n](x) for n in list(matrices)[1:]]
    if not _agree(type(module).forward(clone, x), projections["down_proj"](ops.swiglu_reference(*gates))):
        activation = getattr(module, "act_fn", getattr(module, "activation_fn", None))
        if activation is not None and not _agree(activation(x), nn.functional.silu(x)):
            raise Unfit(f"its activation must be SiLU, got {type(activation).__name__}")
        raise Unfit("its formula is not that of swiglu")
    return "packed_mlp" if packed else "mlp"


def check_rotation(module: Any) -> None:
    """Raises Unfit unless `module` turns its queries and keys as `rotate` does."""
    forward: Any = type(module).forward
    if not isinstance(forward, types.FunctionType) or _ROTATION not in forward.__code__.co_names:
        raise Unfit(f"its forward does not call {_ROTATION}")
    original = forward.__globals__.get(_ROTATION)
    if not callable(original):
        raise Unfit(f"{_ROTATION} is not a function of its file")
    q, k = _numbers(2, 3, 5, 8, seed=0), _numbers(2, 1, 5, 8, seed=1)
    angle = _numbers(2, 5, 4, seed=2).repeat(1, 1, 2)
    got, expected = original(q, k, angle.cos(), angle.sin()), rotate(q, k, angle.cos(), angle.sin())
    if not all(_agree(a, b) for a, b in zip(got, expected)):
        raise Unfit("its rotation is not that of two halves")


def check_loss(model: Any) -> None:
    """Raises Unfit unless the forward of `model` is hidden states, head, ForCausalLMLoss, and no more."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    reason = why_head_unfit(model)
    if reason is not None:
        raise Unfit(reason)
    refuse_dropout(child for name, child in model.named_children() if name != model.base_model_prefix)
    vocab_size, dim = 7, 6
    hidden, labels = 5 * _numbers(2, 4, dim, seed=0), torch.tensor([[1, 5, -100, 2], [0, 6, 3, 3]], device="cpu")
    head = nn.Linear(dim, vocab_size, bias=False, device="meta")
    head.weight = nn.Parameter(_numbers(vocab_size, dim, seed=1), requires_grad=False)
    config: Any = object.__new__(type(model.config))
    config.__dict__.update(model.config.__dict__)
    config.__dict__["vocab_size"] = vocab_size

    class Outputs:
        last_hidden_state = hidden

        def __getattr__(self, name: str) -> None:
            return None

    replaced: dict[str, Any] = {"lm_head": head, "config": config, "vocab_size": vocab_size}
    replaced[model.base_model_prefix] = lambda *_, **__: Outputs()
    clone = _bare(model, **replaced)
    got = type(model).forward(clone, input_ids=labels, labels=labels, return_dict=True)
    if type(got) is not CausalLMOutputWithPast:
        raise Unfit(f"its output must be CausalLMOutputWithPast, got {type(got).__name__}")
    if not _agree(got.loss, fused_causal_loss(clone, hidden, labels)):
        raise Unfit("its loss is not the cross entropy of its head's logits")
