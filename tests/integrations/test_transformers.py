"""attn_implementation="herdkern": training, padding, windows and generation equal eager attention; nothing leaks."""

import copy
import os
import warnings

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
integration = pytest.importorskip("herdkern.integrations.transformers")
layout = pytest.importorskip("herdkern.integrations.layout")

pytestmark = pytest.mark.filterwarnings("error:.*using 'reference'")

VOCABULARY = 1000
LENGTHS = [17, 1, 30, 9]
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYER_TYPES = ["sliding_attention", "full_attention"]
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=6),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "gemma2": lambda: transformers.Gemma2Config(
        **COMMON, head_dim=16, query_pre_attn_scalar=20, attn_logit_softcapping=3.0, sliding_window=7
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **COMMON, head_dim=16, sliding_window=8, num_local_experts=2, num_experts_per_tok=1, layer_types=LAYER_TYPES
    ),
}


@pytest.fixture(autouse=True)
def _registered():
    torch.use_deterministic_algorithms(False)  # transformers fills and reads new memory of its own
    integration.register()


def make(name, implementation="herdkern", **changes):
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for parameter in model.parameters():  # larger than the usual start, so that attention is far from uniform
        if parameter.dim() == 2:
            parameter.data *= 3
    return model.eval()


def both(name, **changes):
    ours, eager = make(name, **changes), make(name, "eager", **changes)
    eager.load_state_dict(ours.state_dict())
    return ours, eager


def pair(kind, config):
    """(ours, eager) with the same weights; each has a config of its own, for a model reads its implementation there."""
    torch.manual_seed(0)
    ours, eager = (
        kind._from_config(copy.deepcopy(config), attn_implementation=name).eval() for name in ("herdkern", "eager")
    )
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    eager.load_state_dict(ours.state_dict())
    assert (ours.config._attn_implementation, eager.config._attn_implementation) == ("herdkern", "eager")
    return ours, eager


def row_of(lengths=LENGTHS, seed=0):
    """(ids, position_ids), each (1, T)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (1, sum(lengths)), generator=generator)
    return ids, torch.cat([torch.arange(length) for length in lengths])[None]


def block_diagonal(positions):
    """(1, 1, T, T) additive mask: causal within each document."""
    document = (positions[0] == 0).cumsum(0)
    seen = (document[:, None] == document) & torch.ones(len(document), len(document)).tril().bool()
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def losses(model, steps, mask=None):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for step in range(steps):
        ids, positions = row_of([20 + step, 1, 40, 7 + 2 * step], seed=step)
        labels = ids.masked_fill(positions == 0, -100)
        given = {"attention_mask": block_diagonal(positions)} if mask else {}
        loss = model(ids, position_ids=positions, labels=labels, use_cache=False, **given).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def test_packed_llama_trains_like_eager_with_a_block_diagonal_mask():
    ours, eager = both("llama", num_hidden_layers=3)
    got, expected = losses(ours, 20), losses(eager, 20, mask=True)
    assert (got - expected).abs().max() <= 1e-4
    assert expected[-1] < expected[0] - 0.1


def alone(model, ids):
    """Logits of each document run by itself, end to end: (1, T, vocabulary)."""
    return torch.cat([model(part, use_cache=False).logits for part in ids.split(LENGTHS, dim=1)], dim=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_row_equals_eager_on_each_document_alone(name):
    ours, eager = both(name)
    ids, positions = row_of()
    packed = ours(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, alone(eager, ids), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gpt_oss"])
def test_packed_row_equals_eager_packed(name):
    """gpt_oss is left out: its own masks do not look at position_ids (transformers 5.23), so eager leaks."""
    ours, eager = both(name)
    ids, positions = row_of()
    got, expected = (model(ids, position_ids=positions, use_cache=False).logits for model in (ours, eager))
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_eager(name):
    ours, eager = both(name)
    ids, positions = row_of()
    weights = torch.randn(1, sum(LENGTHS), VOCABULARY)
    (ours(ids, position_ids=positions, use_cache=False).logits * weights).sum().backward()
    (alone(eager, ids) * weights).sum().backward()
    for (key, parameter), other in zip(ours.named_parameters(), eager.parameters()):
        got, expected = (torch.zeros(()) if p.grad is None else p.grad for p in (parameter, other))
        assert (got - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max()), key


def test_packed_row_does_not_leak_into_a_kv_cache_forward():
    """transformers' own masks read position_ids only where there is no cache, and every model makes one by default."""
    ours, eager = both("llama")
    ids, positions = row_of()
    expected = alone(eager, ids)
    assert (eager(ids, position_ids=positions).logits - expected).abs().max() > 0.1
    torch.testing.assert_close(ours(ids, position_ids=positions).logits, expected, atol=2e-4, rtol=1e-4)


def test_packed_row_with_padding_at_its_end():
    ours, eager = both("llama")
    ids, positions = row_of()
    mask = torch.ones_like(ids)
    mask[:, -9:] = 0
    got = ours(ids, position_ids=positions, attention_mask=mask).logits
    for part in torch.arange(sum(LENGTHS)).split(LENGTHS)[:-1]:
        torch.testing.assert_close(got[:, part], eager(ids[:, part]).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("give", ["position_ids", "cu_seq_lens"])
def test_nan_in_one_document_does_not_reach_another(give):
    ours = make("llama")
    ids, positions = row_of()
    embedded = ours.get_input_embeddings()(ids).detach()
    embedded[:, 18:48] = float("nan")
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    given = {"position_ids": positions}
    if give == "cu_seq_lens":
        given |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 30, "max_length_k": 30}
    logits = ours(inputs_embeds=embedded, **given).logits
    assert logits[:, 18:48].isnan().all()
    assert not logits[:, :18].isnan().any()
    assert not logits[:, 48:].isnan().any()


MASKS = {
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]],
    "both": [[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1]],
    "none": [[1] * 7] * 3,
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", MASKS)
def test_padded_batch_equals_each_row_alone(name, side):
    ours, eager = both(name)
    mask = torch.tensor(MASKS[side])
    ids, _ = row_of([7, 7, 7])
    ids = ids.view(3, 7)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = ours(ids, attention_mask=mask, position_ids=positions).logits
    for row in range(3):
        real = mask[row].bool()
        torch.testing.assert_close(got[row, real], eager(ids[row, real][None]).logits[0], atol=2e-4, rtol=1e-4)


def test_padding_with_holes():
    ours, eager = both("llama")
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1, 0]])
    ids = row_of([14])[0].view(2, 7)
    got, expected = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (ours, eager))
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    with pytest.raises(NotImplementedError, match="no padding between real tokens"):
        make("mistral")(ids, attention_mask=mask)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [0, 3])
def test_greedy_generation_equals_eager(name, cache, padding):
    ours, eager = both(name)
    ids = row_of([18])[0].view(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 0, "cache_implementation": cache}
    got, expected = (model.generate(ids, attention_mask=mask, **options) for model in (ours, eager))
    assert got.tolist() == expected.tolist()


def test_generation_reads_the_cache_where_it_lies(monkeypatch):
    from herdkern.integrations import transformers as door

    calls = []
    for name in ("attention", "paged_attention"):
        real = getattr(door, name)
        count = lambda *args, real=real, name=name, **options: calls.append(name) or real(*args, **options)  # noqa: E731
        monkeypatch.setattr(door, name, count)
    ids = row_of([18])[0].view(2, 9)
    make("llama").generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, eos_token_id=0)
    assert calls == ["attention"] * 2 + ["paged_attention"] * 4  # two layers: a prefill and two steps


def test_prefill_in_pieces_equals_one_forward():
    ours, eager = both("mistral")
    ids, _ = row_of([20])
    cache, parts = transformers.DynamicCache(config=ours.config), []
    for part in ids.split([9, 4, 7], dim=1):
        parts.append(ours(part, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), eager(ids).logits, atol=2e-4, rtol=1e-4)


def test_encoder_sees_both_sides():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    ours, eager = pair(transformers.BertModel, config)
    ids = row_of([21])[0].view(3, 7)
    for mask in MASKS.values():
        mask = torch.tensor(mask)
        got, expected = (model(ids, attention_mask=mask).last_hidden_state for model in (ours, eager))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)  # padding sees the real tokens there too


@pytest.mark.parametrize("side", [*MASKS, "holes"])
@pytest.mark.parametrize("decoder_len", [1, 4, 7, 8])
def test_encoder_decoder_crosses_over_padding(side, decoder_len):
    """Also where the two lengths are one: then a mask does not say whose keys they are."""
    ours, eager = encoder_decoder()
    ids, inputs = row_of([21])[0].view(3, 7), row_of([24], seed=1)[0].view(3, 8)[:, :decoder_len]
    mask = torch.tensor(MASKS.get(side, [[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1, 0], [1] * 7]))
    for given in ({}, {"attention_mask": mask}):
        got, expected = (m(ids, decoder_input_ids=inputs, **given).logits for m in (ours, eager))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("decoder_len", [1, 2, 5])
def test_encoder_of_one_token(decoder_len):
    ours, eager = encoder_decoder()
    ids, inputs = row_of([2])[0].view(2, 1), row_of([2 * decoder_len], seed=1)[0].view(2, -1)
    got, expected = (m(ids, decoder_input_ids=inputs).logits for m in (ours, eager))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_gradients_of_an_encoder_decoder_padded_to_one_length():
    models = encoder_decoder()
    ids, mask = row_of([21])[0].view(3, 7), torch.tensor(MASKS["right"])
    for model in models:
        model(ids, attention_mask=mask, decoder_input_ids=ids, labels=ids).loss.backward()
    for (name, got), expected in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_packed_encoder_stays_cut():
    """Positions that start anew are borders in an encoder too, beside padding or not."""
    valid = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 1, 1]])

    def bidirectional(batch, head, query, key):
        return torch.ones_like(query == key)

    for mask, borders in ((None, [0, 3, 5, 6, 7]), (valid, [0, 3, 5, 6, 7])):
        documents = integration.document_mask(1, 7, 7, mask_function=bidirectional, attention_mask=mask).documents
        layout = documents.layout(positions)
        assert layout.cu_seqlens_q.tolist() == borders
        assert layout.cu_seqlens_k is None


def encoder_decoder():
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    )
    return pair(transformers.BartForConditionalGeneration, config)


def test_chunked_attention():
    config = transformers.Llama4TextConfig(
        **COMMON,
        head_dim=16,
        attention_chunk_size=6,
        num_local_experts=1,
        intermediate_size_mlp=96,
        no_rope_layers=[1, 0],
    )
    ours, eager = pair(transformers.Llama4ForCausalLM, config)
    ids, _ = row_of([23])
    got, expected = (m(ids, use_cache=False).logits for m in (ours, eager))
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    ids, positions = row_of()
    gradients = []
    for checkpoint in (False, True):
        model = make("llama").train()
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(ids, position_ids=positions, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_bf16_and_autocast_run():
    ids, positions = row_of()
    model = make("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(ids, position_ids=positions).logits
    half = model.to(torch.bfloat16)(ids, position_ids=positions).logits
    exact = make("llama")(ids, position_ids=positions).logits
    for logits in (mixed, half):
        assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_borders_are_found_once_a_forward(monkeypatch):
    from herdkern.integrations import transformers as door

    calls = []
    real = door.pack
    monkeypatch.setattr(door, "pack", lambda *args: calls.append(1) or real(*args))
    ids, positions = row_of()
    make("llama", num_hidden_layers=4)(ids, position_ids=positions)
    assert len(calls) == 1


def test_positions_that_jump_are_borders_and_are_said_once():
    ours, eager = both("llama")
    ids, positions = row_of()
    layout.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="position_ids jump by more than 1.*cu_seq_lens_q"):
        got = ours(ids, position_ids=2 * positions).logits
    expected = eager(ids.view(-1, 1)).logits.view(got.shape)  # each token alone
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(ids, position_ids=2 * positions + 5)
        layout.warn_once.cache_clear()
        ours(ids, position_ids=positions)
        borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
        ours(ids, position_ids=2 * positions, cu_seq_lens_q=borders)


def test_attention_probabilities_are_refused_once():
    model, (ids, _) = make("llama"), row_of()
    layout.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r'output_attentions gives none.*attn_implementation="eager"'):
        assert model(ids, output_attentions=True).attentions == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, output_attentions=True)


def test_register_and_unregister():
    integration.register()  # twice
    integration.register("other")
    make("llama", "other")(row_of()[0])
    integration.unregister("other")
    with pytest.raises(ValueError, match="other"):
        make("llama", "other")
    with pytest.raises(ValueError, match="name must have been registered, got 'other'"):
        integration.unregister("other")
    for taken in ("sdpa", "eager"):
        with pytest.raises(ValueError, match="name must be free"):
            integration.register(taken)
    for name in ("flash_herdkern", "a/b", ""):
        with pytest.raises(ValueError, match="name must be an identifier"):
            integration.register(name)


def test_what_the_kernels_lack_is_refused():
    ids, positions = row_of()
    with pytest.raises(NotImplementedError, match=r"dropout must be 0, got 0\.1; set attention_dropout=0"):
        make("llama", attention_dropout=0.1).train()(ids)
    with pytest.raises(
        ValueError, match=r"attention_mask must be made by its own .* got one of shape \(1, 1, 57, 57\)"
    ):
        make("llama")(ids, attention_mask=block_diagonal(positions))
    t5 = transformers.T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
    with pytest.raises((NotImplementedError, ValueError)):
        transformers.T5ForConditionalGeneration._from_config(t5, attn_implementation="herdkern")(
            ids % 99, decoder_input_ids=ids % 99
        )


def test_mask_function_is_called_in_the_older_way_too():
    def causal(batch, head, query, key):
        return key <= query

    documents = integration.document_mask(
        batch_size=2, cache_position=torch.arange(5, 8), kv_length=8, mask_function=causal
    ).documents
    assert (documents.q_len, documents.first_query, documents.causal) == (3, 5, True)
    with pytest.raises(NotImplementedError, match="says neither q_length nor cache_position"):
        integration.document_mask(2, kv_length=8, mask_function=causal)


def test_versions(record_property):
    record_property("transformers", transformers.__version__)
    assert int(transformers.__version__.split(".")[0]) >= 5


def test_compiled_model_gives_the_same():
    """With graph breaks: how many documents there are is known only when the mask is made."""
    model = make("llama")
    compiled = torch.compile(model, backend="eager")
    for lengths in (LENGTHS, [5, 20]):
        ids, positions = row_of(lengths)
        expected = model(ids, position_ids=positions, use_cache=False).logits
        assert torch.equal(compiled(ids, position_ids=positions, use_cache=False).logits, expected)
