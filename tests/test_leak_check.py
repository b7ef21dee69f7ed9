"""The checker passes what keeps documents apart and names what does not: every kind of leak has a control here."""

import os
import warnings

import pytest
import torch
from torch import nn

import herdkern
from herdkern.documents import document_ids_from_cu_seqlens, position_ids_from_cu_seqlens
from herdkern.leak_check import LeakError, LeakReport
from herdkern.model.config import ModelConfig
from herdkern.model.transformer import Transformer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TINY = ModelConfig(
    vocab_size=50,
    dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=32,
    max_seq_len=64,
    init_std=0.3,
)


def attend(x, cu_seqlens, masked=True, causal=True):
    """Plain attention of x: (tokens, dim) to itself."""
    document = document_ids_from_cu_seqlens(cu_seqlens)
    seen = document[:, None] == document if masked else torch.ones(len(x), len(x)).bool()
    scores = (x @ x.T).masked_fill(~(seen.tril() if causal else seen), -torch.inf)
    return scores.softmax(-1) @ x


class Engine(nn.Module):
    """An embedding and whatever mixes the tokens: mix(rows (tokens, dim), cu_seqlens)."""

    def __init__(self, mix, positions=None):
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 16)
        self.place = nn.Embedding(64, 16)
        self.mix, self.positions = mix, positions

    def forward(self, tokens, cu_seqlens):
        x = self.embed_tokens(tokens)
        if self.positions is not None:
            x = x + self.place(self.positions(cu_seqlens, len(tokens)))
        return self.mix(x, cu_seqlens)


def check(model, **options):
    return herdkern.assert_no_leak(model, forward=lambda model, *batch: model(*batch), **options)


def shifted(x, cu_seqlens):
    return x + x.roll(1, 0) * (torch.arange(len(x)) > 0)[:, None]


class LeakyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return dout + dout.roll(-9, 0)


def test_transformer_is_clean():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = herdkern.assert_no_leak(Transformer(TINY, seed=0))
    assert report == LeakReport(
        documents=4,
        gradients=True,
        nan_contained=True,
        alone_difference=report.alone_difference,
        positions_run_on=False,
    )
    assert report.alone_difference < 1e-5
    herdkern.assert_no_leak(Transformer(TINY, seed=0), require_nan_contained=True, lengths=[3, 3])


@pytest.mark.parametrize(
    ("mix", "cause", "pairs"),
    [
        (lambda x, b: attend(x, b, masked=False), "causal attention over the whole row", 6),
        (
            lambda x, b: attend(x, b, masked=False, causal=False),
            "attention that sees the whole row, or a statistic",
            12,
        ),
        (lambda x, b: (x - x.mean(0)) / x.std(0), "BatchNorm", 12),
        (shifted, "a border that is off by one, or a convolution", 3),
        (lambda x, b: attend(x, torch.cat([b[:1], (b[1:-1] + 1), b[-1:]])), "a border that is off by one", None),
        (lambda x, b: attend(x, b) + 1e-6 * x.cumsum(0), "tokens by what they hold", 6),
    ],
)
def test_leak_is_named(mix, cause, pairs):
    with pytest.raises(LeakError, match=cause) as caught:
        check(Engine(mix))
    error = caught.value
    assert error.kind == "output"
    assert error.source != error.victim
    assert error.difference > 0
    text = str(error)
    assert f"document {error.source} leaks into document {error.victim}" in text
    assert f"token {error.token} of document {error.victim}" in text
    assert pairs is None or f"{pairs} of 12 pairs leak" in text


def test_batch_norm_layer_is_caught():
    norm = nn.BatchNorm1d(16)
    with pytest.raises(LeakError, match="BatchNorm"):
        check(Engine(lambda x, b: norm(attend(x, b))).train())


def test_leak_of_the_gradient_alone_is_caught():
    model = Engine(lambda x, b: attend(LeakyBackward.apply(x), b))
    with pytest.raises(LeakError, match="the gradient of a loss on the latter's tokens is not 0 at token") as caught:
        check(model)
    assert caught.value.kind == "gradient"


def test_tolerance_lets_rounding_pass():
    model = Engine(lambda x, b: attend(x, b) + 1e-7 * x.cumsum(0))
    assert check(model, tolerance=1e-5).gradients


def test_positions_that_run_on_are_no_leak():
    def runs_on(cu_seqlens, total):
        return torch.arange(total)

    with pytest.warns(UserWarning, match="positions run on over the borders"):
        report = check(Engine(attend, runs_on))
    assert report.positions_run_on
    assert report.alone_difference > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not check(Engine(attend, position_ids_from_cu_seqlens)).positions_run_on


def test_rotary_positions_that_run_on_are_seen_by_their_rounding():
    model = Transformer(TINY, seed=0)
    with pytest.warns(UserWarning, match="only one of rounding"):
        report = herdkern.assert_no_leak(model, forward=lambda m, tokens, b: m(tokens, b, torch.arange(len(tokens))))
    assert report.positions_run_on
    assert report.alone_difference < 1e-4


def test_dependence_on_the_batch_length_is_caught():
    with pytest.raises(LeakError, match="packed differs from itself alone") as caught:
        check(Engine(lambda x, b: attend(x, b) / len(x)))
    assert caught.value.kind == "alone"


def test_dependence_on_the_number_of_documents_is_caught_where_positions_run_on():
    def mix(x, cu_seqlens):
        place = 1 + 0.001 * torch.arange(len(x))[:, None]
        return attend(x, cu_seqlens) * place * (1 + 0.5 * (len(cu_seqlens) - 1))

    with pytest.raises(LeakError, match="packed differs from itself alone") as caught:
        check(Engine(mix))
    assert caught.value.kind == "alone"


def test_tokens_that_see_only_what_follows_mix():
    def backwards(x, cu_seqlens):
        return attend(x.flip(0), len(x) - cu_seqlens.flip(0)).flip(0)

    assert check(Engine(backwards)).gradients


@pytest.mark.parametrize("leaks", [False, True])
def test_buffers_are_left_as_they_were(leaks):
    class Counting(Engine):
        def __init__(self):
            super().__init__(attend)
            self.norm = nn.BatchNorm1d(16)
            self.register_buffer("replaced", torch.zeros(1), persistent=False)

        def forward(self, tokens, cu_seqlens):
            self.replaced = self.replaced + 1
            out = super().forward(tokens, cu_seqlens)
            normed = self.norm(out.detach())
            return normed if leaks else out

    model = Counting().train()
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    try:
        check(model, lengths=(6, 3, 4))  # BatchNorm refuses a document of 1 token alone
    except LeakError:
        assert leaks
    else:
        assert not leaks
    assert len(before) == 4
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0], name
        assert torch.equal(buffer, before[name][1]), name


@torch.inference_mode()
def test_inference_mode_is_left_for_the_check():
    with torch.inference_mode(False):
        model = Engine(attend)
    assert check(model).gradients
    assert torch.is_inference_mode_enabled()


def test_nan_through_a_dense_mask_is_an_error_only_on_demand():
    model = Engine(attend)
    assert check(model).nan_contained is False
    with pytest.raises(LeakError, match="NaN in its embeddings reaches") as caught:
        check(model, require_nan_contained=True)
    assert caught.value.kind == "nan"


def test_function_without_an_embedding():
    table = torch.randn(50, 8)
    report = herdkern.assert_no_leak(lambda tokens, b: attend(table[tokens], b), vocab_size=50)
    assert not report.gradients
    assert report.nan_contained is None
    with pytest.raises(LeakError):
        herdkern.assert_no_leak(lambda tokens, b: attend(table[tokens], b, masked=False), vocab_size=50)


def test_random_state_is_left_alone():
    before = torch.get_rng_state()
    check(Engine(attend))
    model = Engine(attend)
    torch.set_rng_state(before)
    herdkern.assert_no_leak(model, forward=lambda model, *batch: model(*batch))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: herdkern.assert_no_leak(3),
            TypeError,
            "model must be a herdkern Transformer.* got int; pass forward=",
        ),
        (lambda: herdkern.assert_no_leak(lambda t, b: t), ValueError, "vocab_size must be at least 2, got None"),
        (lambda: check(Engine(attend), lengths=[4]), ValueError, r"lengths must be at least two .* got \(4,\)"),
        (lambda: check(Engine(lambda x, b: x[1:])), ValueError, r"forward must return floats \(24 tokens, ...\), got"),
        (lambda: check(Engine(lambda x, b: x * 0)), ValueError, "the outputs of document 0 must depend on its tokens"),
        (
            lambda: check(Engine(lambda x, b: attend(x.detach(), b) + 0 * x)),
            ValueError,
            "must have a gradient by its own",
        ),
        (lambda: check(Engine(attend), lengths=[1, 1]), ValueError, r"not all 1, got \(1, 1\)"),
        (lambda: check(Engine(lambda x, b: x)), ValueError, "must depend on other tokens of their document too"),
        (
            lambda: check(Engine(lambda x, b: x + 0 * attend(x, b, masked=False))),  # leaks as soon as it is trained
            ValueError,
            "the check would prove nothing.* train a few steps",
        ),
        (lambda: check(Engine(lambda x, b: x / 0)), ValueError, "the outputs must be finite"),
        (
            lambda: check(Engine(lambda x, b: torch.dropout(x, 0.5, True))),
            ValueError,
            "two runs of one batch must agree",
        ),
        (
            lambda: check(Engine(attend), embedding=nn.Linear(1, 1), vocab_size=50),
            ValueError,
            "embedding must run once",
        ),
    ],
)
def test_what_would_prove_nothing_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from herdkern.integrations.transformers import register

    torch.use_deterministic_algorithms(False)
    register()
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config.initializer_range = 0.2

    def make(implementation):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)

    return make


@pytest.mark.parametrize("train", [False, True])
def test_hugging_face_llama_is_clean(llama, train):
    assert herdkern.assert_no_leak(llama("herdkern").train(train), require_nan_contained=True).gradients
    assert herdkern.assert_no_leak(llama("eager")).nan_contained is False  # 0 * NaN of a dense mask


def run_with_cache(model, tokens, cu_seqlens):
    return model(tokens[None], position_ids=position_ids_from_cu_seqlens(cu_seqlens)[None]).logits[0]


@pytest.mark.parametrize(
    "forward", [lambda model, tokens, b: model(tokens[None]).logits[0], run_with_cache], ids=["plain", "with a cache"]
)
def test_hugging_face_eager_on_a_packed_row_is_caught(llama, forward):
    with pytest.raises(LeakError, match="causal attention over the whole row"):
        herdkern.assert_no_leak(llama("eager"), forward=forward)


def test_the_door_is_clean_beside_a_cache_too(llama):
    herdkern.assert_no_leak(llama("herdkern"), forward=run_with_cache)
