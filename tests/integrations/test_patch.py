"""herdkern.patch: same losses as unpatched, exactly undone, nothing beside the one model changes."""

import copy
import io
import os
import pickle
import warnings

import pytest
import torch

import herdkern

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("error:.*using 'reference'")

COMMON = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "llama31": lambda: transformers.LlamaConfig(
        **COMMON, rope_parameters={**LLAMA31, "original_max_position_embeddings": 32}, tie_word_embeddings=True
    ),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=6),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),  # biases in q, k and v
    "qwen3": lambda: transformers.Qwen3Config(**COMMON),  # norms of q and k
    "gemma2": lambda: transformers.Gemma2Config(**COMMON),  # other norms, GELU, soft-capped logits
    "granite": lambda: transformers.GraniteConfig(**COMMON, logits_scaling=3.0),  # scaled logits
    "phi3": lambda: transformers.Phi3Config(**COMMON),  # gate and up in one matrix
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, num_local_experts=2),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=101, n_embd=48, n_layer=1, n_head=4),
}
PATCHED = {  # what each family lets be replaced
    "llama": {"rms_norm", "swiglu", "rope_qk", "linear_cross_entropy"},
    "gemma2": {"rms_norm (casting='gemma', weight_offset=1.0)", "rope_qk", "linear_cross_entropy"},
    "granite": {"rms_norm", "swiglu", "rope_qk"},
    "mixtral": {"rms_norm", "rope_qk"},
}


@pytest.fixture(autouse=True)
def _free():
    torch.use_deterministic_algorithms(False)  # transformers fills and reads new memory of its own
    warnings.filterwarnings("ignore", message=".*torch.jit.*")


def make(name="llama", dtype=torch.float32, **changes):
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
    return model.train()


def batch(seed=0, shape=(2, 17)):
    ids = torch.randint(3, 101, shape, generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :5] = -100
    return ids, labels


def identities(model):
    """Everything that a patch may touch, by identity: an `is` that changes is found."""
    found = {}
    for path, module in model.named_modules():
        found[path, "module"] = module
        found[path, "class"] = type(module)
        found[path, "forward"] = module.forward.__func__
        found |= {(path, "class", name): value for name, value in vars(type(module)).items()}
        found |= {(path, "own", name): value for name, value in vars(module).items()}
        for store in ("_parameters", "_buffers", "_modules"):
            found |= {(path, store, name): value for name, value in vars(module)[store].items()}
    found |= {("config", name): value for name, value in vars(model.config).items()}
    return found


def assert_same(model, before):
    after = identities(model)
    assert set(after) == set(before)
    assert [key for key, value in after.items() if value is not before[key]] == []


def train(model, dtype, steps=20):
    """The losses of AdamW on four batches in turn, which are learned by heart."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        ids, labels = batch(step % 4, (2, 33))
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().float())
    return torch.stack(losses)


@pytest.mark.parametrize("attention", [False, True], ids=["", "attention"])
@pytest.mark.parametrize("name", ["llama", "llama31", "qwen2", "qwen3"])
def test_twenty_steps_have_the_losses_of_the_unpatched_model(name, attention):
    plain, model = make(name), make(name)
    with herdkern.patch(model, attention=attention):
        got = train(model, torch.float32)
    expected = train(plain, torch.float32)
    assert float(expected[0] - expected[-1]) > 0.3
    assert ((got - expected).abs() / expected).max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_twenty_steps_in_bfloat16(name):
    """1e-2 of the loss. Ours rounds less: the same bound holds against the model in float32."""
    plain, model, exact = make(name, torch.bfloat16), make(name, torch.bfloat16), make(name)
    herdkern.patch(model)
    got = train(model, torch.bfloat16)
    for expected in (train(plain, torch.bfloat16), train(exact, torch.float32)):
        assert ((got - expected).abs() / expected).max() < 1e-2


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gpt2"])
def test_gradients_and_what_is_patched(name):
    model = make(name)
    ids, labels = batch()

    def gradients():
        loss = model(ids, labels=labels).loss
        return loss, *(torch.zeros(()) if g is None else g for g in torch.autograd.grad(loss, list(model.parameters())))

    expected = gradients()
    before = identities(model)
    patch = herdkern.patch(model)
    assert {change.what for change in patch.changes} == PATCHED.get(name, PATCHED["llama"])
    assert list(model.state_dict()) == list(make(name).state_dict())
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-6)
    patch.undo()
    assert_same(model, before)
    assert all(map(torch.equal, gradients(), expected))


def test_left_modules_say_why():
    text = str(herdkern.patch(make("gemma2")))
    assert "model.layers.{0..1}.mlp" in text
    assert "left: its activation must be SiLU, got " in text
    assert "left: its loss is not the cross entropy of its head's logits" in str(herdkern.patch(make("granite")))
    text = str(herdkern.patch(make("mixtral")))
    assert "left: its output must be CausalLMOutputWithPast, got MoeCausalLMOutputWithPast" in text


def test_print_is_a_short_table():
    patch = herdkern.patch(make())
    assert str(patch).splitlines() == [
        "LlamaForCausalLM: 10 modules patched, 0 left as they are",
        "  (the model)                                   LlamaForCausalLM  linear_cross_entropy",
        "  model.layers.{0..1}.self_attn                 LlamaAttention    rope_qk",
        "  model.layers.{0..1}.mlp                       LlamaMLP          swiglu",
        "  model.layers.{0..1}.input_layernorm           LlamaRMSNorm      rms_norm",
        "  model.layers.{0..1}.post_attention_layernorm  LlamaRMSNorm      rms_norm",
        "  model.norm                                    LlamaRMSNorm      rms_norm",
    ]
    patch.undo()
    assert "no longer patched" in repr(patch)


def test_undo_after_an_exception():
    model = make()
    before = identities(model)
    patch = herdkern.patch(model, attention=True)
    assert patch.active
    assert model.config._attn_implementation == "herdkern"
    with pytest.raises(ZeroDivisionError), patch:
        1 / 0  # noqa: B018
    assert not patch.active
    assert_same(model, before)
    patch.undo()  # a second time does nothing


def test_an_exception_while_patching_leaves_the_model(monkeypatch):
    model = make()
    before = identities(model)
    from herdkern.integrations import transformers as integration

    monkeypatch.setattr(integration, "register", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        herdkern.patch(model, attention=True)
    assert_same(model, before)


def test_twice_is_refused_and_parts_may_follow_each_other():
    model = make()
    before = identities(model)
    outer = herdkern.patch(model, norm=True, mlp=False, rope=False, loss=False)
    with herdkern.patch(model) as inner:
        assert not {c.path for c in outer.changes} & {c.path for c in inner.changes}
        assert {"its forward is replaced already, by herdkern.patch"} == {entry.reason for entry in inner.left}
        with pytest.raises(ValueError, match=r"patch: model must have .*replaced already, by herdkern\.patch"):
            herdkern.patch(model)
    assert outer.active
    herdkern.unpatch(model)
    assert not outer.active
    assert_same(model, before)
    with pytest.raises(ValueError, match="unpatch: model must be patched, got LlamaForCausalLM"):
        herdkern.unpatch(model)


def test_undone_patch_leaves_a_newer_one_alone():
    model = make()
    old = herdkern.patch(model)
    herdkern.unpatch(model)
    new = herdkern.patch(model)
    old.undo()
    assert new.active


def test_two_models_one_patched():
    model, other = make(), make()
    before = identities(other)
    patch = herdkern.patch(model)
    assert_same(other, before)
    assert all("forward" not in module.__dict__ for module in other.modules())
    patch.undo()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_patched_and_can_be_unpatched(way):
    model = make()
    ids, labels = batch()
    plain = model(ids, labels=labels).loss
    herdkern.patch(model, attention=True)
    patched = model(ids, labels=labels).loss
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    forwards = [module.__dict__["forward"] for module in other.modules() if "forward" in module.__dict__]
    assert len(forwards) == 10
    assert not {id(f.module) for f in forwards} & {id(module) for module in model.modules()}
    assert torch.equal(other(ids, labels=labels).loss, patched)
    herdkern.unpatch(other)
    assert other.config._attn_implementation == "eager"
    assert torch.equal(other(ids, labels=labels).loss, plain)
    assert torch.equal(model(ids, labels=labels).loss, patched)


def test_saved_weights_load_into_an_unpatched_model(tmp_path):
    model = make()
    herdkern.patch(model)
    model.save_pretrained(tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_generate_gives_the_same_tokens(name):
    model = make(name).eval()
    ids, _ = batch(shape=(2, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    expected = model.generate(ids, **options)
    with herdkern.patch(model):
        assert torch.equal(model.generate(ids, **options), expected)


def test_logits_are_none_in_training_alone():
    model = make()
    ids, labels = batch()
    full = model(ids, labels=labels)
    herdkern.patch(model)
    out = model(ids, labels=labels)
    assert out.logits is None
    assert model(ids).logits is not None
    assert model(ids, labels=labels, return_dict=False)[0] == out.loss
    kept = model(ids, labels=labels, skip_logits=False)
    torch.testing.assert_close(kept.logits, full.logits, rtol=1e-4, atol=1e-5)
    assert model(ids, labels=labels, logits_to_keep=17).logits is not None
    assert len(model(ids, labels=labels, output_hidden_states=True).hidden_states) == 3
    model.eval()
    assert model(ids, labels=labels).logits is not None
    assert model(ids, labels=labels, skip_logits=True).logits is None
    with pytest.raises(ValueError, match="labels must be given with skip_logits=True"):
        model(ids, skip_logits=True)


def test_loss_takes_what_transformers_loss_takes():
    model = make()
    ids, labels = batch()
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    calls = [
        {"num_items_in_batch": 40},
        {"num_items_in_batch": torch.tensor(40)},
        {"shift_labels": shifted},
        {"ignore_index": 7},
    ]
    labels_of = [labels, labels, labels, labels.clamp(min=7)]
    expected = [model(ids, labels=y, **more).loss for more, y in zip(calls, labels_of)]
    herdkern.patch(model)
    got = [model(ids, labels=y, **more).loss for more, y in zip(calls, labels_of)]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_or_a_head_of_the_users_own_is_used():
    model = make()
    ids, labels = batch()
    herdkern.patch(model)
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 5
    assert model(ids, labels=labels).loss == 5
    del model._loss_function
    handle = model.lm_head.register_forward_hook(lambda module, args, out: out * 0)
    torch.testing.assert_close(model(ids, labels=labels).loss, torch.tensor(101.0).log())
    handle.remove()
    assert model(ids, labels=labels).logits is None


def test_all_logits_never_exist():
    model = make(vocab_size=4001)
    herdkern.patch(model)
    ids = torch.randint(3, 4001, (2, 64))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            made = [x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
            largest = max([largest, *made])
            return out

    with Watch():
        model(ids, labels=ids).loss.backward()
    assert largest < 2 * 64 * 4001


def herdkern_ops_of(model, *args, **kwargs):
    """The names of herdkern's ops in the graphs that torch.compile makes of a call, and its output."""
    names = []

    def backend(graph, _):
        for node in graph.graph.nodes:
            target = getattr(node.target, "name", lambda: "")() if node.op == "call_function" else ""
            names.extend([target] if "herdkern::" in str(target) else [])
        return graph.forward

    torch._dynamo.reset()
    out = torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    torch._dynamo.reset()
    return names, out


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_compiled_model_is_patched_too(name):
    model = make(name, use_cache=False)
    ids, labels = batch()
    expected = model(ids, labels=labels).loss
    with herdkern.patch(model) as patch:
        names, out = herdkern_ops_of(model, ids, labels=labels)
        assert len(names) >= len(patch.changes)
        torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    names, out = herdkern_ops_of(model, ids, labels=labels)
    assert names == []


def test_wrapped_models():
    class Wrapper(torch.nn.Module):  # as DistributedDataParallel
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    model = Wrapper(make())
    ids, labels = batch()
    expected = model(ids, labels=labels).loss
    before = identities(model.module)
    with herdkern.patch(model) as patch:
        assert patch.changes[0].path == "module"
        torch.testing.assert_close(model(ids, labels=labels).loss, expected, rtol=1e-5, atol=1e-6)
    assert_same(model.module, before)
    herdkern.patch(model.module)
    herdkern.unpatch(model)
    assert_same(model.module, before)


@pytest.mark.distributed
def test_distributed_data_parallel(tmp_path):
    model = make()
    ids, labels = batch()
    herdkern.patch(model)
    expected = model(ids, labels=labels).loss
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        loss = torch.nn.parallel.DistributedDataParallel(model)(ids, labels=labels).loss
        loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(loss, expected)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = make()
    ids, labels = batch()
    expected = model(ids, labels=labels).loss
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with herdkern.patch(model):
        loss = model(ids, labels=labels).loss
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_autocast(name):
    model = make(name)
    ids, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids, labels=labels).loss
        with herdkern.patch(model):
            loss = model(ids, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)


def test_forwards_of_others_stay():
    """As accelerate's hooks do it: a forward of the module's own, before or after the patch."""
    model = make()
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    norm.forward = own = norm.forward
    patch = herdkern.patch(model)
    assert norm.forward is own
    assert [entry.reason for entry in patch.left] == ["its forward is replaced already, by other code"]
    patched = mlp.forward
    mlp.forward = lambda x: patched(x)
    with pytest.raises(
        RuntimeError, match=r"undo: forward of model\.layers\.0\.mlp must be the patched one, got .*lambda"
    ):
        patch.undo()
    assert patch.active
    mlp.forward = patched
    patch.undo()
    assert norm.forward is own


def test_signature_is_the_models_own():
    import inspect

    model = make()
    before = inspect.signature(model.forward)
    herdkern.patch(model)
    assert inspect.signature(model.forward) == before


def test_random_numbers_stay():
    model = make()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    herdkern.patch(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_model_without_memory():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(CONFIGS["llama"]())
        assert len(herdkern.patch(model).changes) == 10


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_norms_in_bfloat16_have_the_models_own_bits(name):
    norm = make(name, torch.bfloat16).model.norm
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(64, 48).bfloat16()
    expected = norm(x)
    with herdkern.patch(norm):
        assert (norm(x) != expected).float().mean() < 0.002  # a sum in another order, at the edge of a rounding


def test_torch_norms_and_parts_of_models():
    layer = torch.nn.Sequential(torch.nn.RMSNorm(48), torch.nn.RMSNorm(48, eps=1e-4), torch.nn.Linear(48, 48))
    for dtype in (torch.float32, torch.bfloat16):
        layer.to(dtype)
        x = torch.randn(4, 48).to(dtype)
        expected = layer(x)
        with herdkern.patch(layer) as patch:
            assert len(patch.changes) == 2
            torch.testing.assert_close(layer(x), expected)


def test_what_cannot_be_patched_is_refused():
    with pytest.raises(ValueError, match=r"patch: model must have a module that herdkern can replace, got GPT2LMHead"):
        herdkern.patch(make("gpt2"))
    with pytest.raises(ValueError, match=r"patch: model must be a torch\.nn\.Module, got str"):
        herdkern.patch("llama")
    with pytest.raises(ValueError, match="patch: one of norm, mlp, rope, loss and attention must be True"):
        herdkern.patch(make(), norm=False, mlp=False, rope=False, loss=False)


def test_a_norm_of_another_formula_is_left():
    class OddRMSNorm(torch.nn.RMSNorm):
        def forward(self, x):
            return super().forward(x) * 2  # by numbers alone it differs

    model = torch.nn.Sequential(OddRMSNorm(8), torch.nn.RMSNorm(8), torch.nn.RMSNorm(8, elementwise_affine=False))
    reasons = [entry.reason for entry in herdkern.patch(model).left]
    assert reasons == ["its formula is none of ours", "weight must be one vector"]


class GatedMLP(torch.nn.Module):
    def __init__(self, own=None, functional=0.0):
        super().__init__()
        self.gate_proj, self.up_proj = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)
        self.down_proj, self.act_fn = torch.nn.Linear(16, 8), torch.nn.SiLU()
        self.own, self.functional = own, functional

    def forward(self, x):
        out = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        out = torch.nn.functional.dropout(out, self.functional, self.training)
        return out if self.own is None else self.own(out)


def test_what_happens_in_training_alone_is_seen_in_evaluation():
    """from_pretrained gives a model in evaluation mode, where dropout is nothing; it must be there in training."""
    model = torch.nn.Sequential(GatedMLP(torch.nn.Dropout(0.5)), GatedMLP(functional=0.5), GatedMLP()).eval()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    patch = herdkern.patch(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [change.path for change in patch.changes] == ["2"]
    assert [entry.path for entry in patch.left] == ["0", "1"]
    assert "it has a Dropout, which our forward would leave out" in str(patch)


def test_dropout_before_the_head_is_left():
    model = make(attention_dropout=0.1).eval()
    assert herdkern.patch(model).left == ()  # inside the base model it stays where it is
    herdkern.unpatch(model)
    model.last_dropout = torch.nn.Dropout(0.1)
    assert [entry.path for entry in herdkern.patch(model).left] == [""]


def test_arguments_given_twice_or_too_many_are_refused():
    model = make()
    ids, labels = batch()
    herdkern.patch(model)
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model(ids, input_ids=ids, labels=labels)
    with pytest.raises(TypeError, match="positional argument"):
        model(ids, *[None] * 20)


@pytest.mark.parametrize("way", ["kept", "wrapped", "partial"])
def test_unpatch_does_not_pass_over_a_covered_forward(way):
    import functools

    model = make()
    herdkern.patch(model)
    mlp = model.model.layers[0].mlp
    patched = mlp.forward
    if way == "kept":  # accelerate's hooks
        mlp._old_forward = patched
    mlp.forward = functools.partial(patched) if way == "partial" else lambda x: patched(x)
    if way == "wrapped":
        functools.update_wrapper(mlp.forward, patched)
    with pytest.raises(RuntimeError, match=r"unpatch: forward of model\.layers\.0\.mlp must be the patched one"):
        herdkern.unpatch(model)
    assert sum(type(m.__dict__.get("forward")).__name__ == "PatchedForward" for m in model.modules()) == 9
    mlp.forward = patched
    herdkern.unpatch(model)
    assert "forward" not in mlp.__dict__
