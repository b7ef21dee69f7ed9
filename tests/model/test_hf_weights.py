"""Folders of Hugging Face open here and ours there, with the same logits; Meta's layout comes back bit for bit."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from herdkern.model.hf_weights import config_from_hf, config_to_hf, from_meta_state, load_hf, save_hf, to_meta_state
from herdkern.model.transformer import Transformer
from herdkern.tokenizer import train_bpe

TOKENS = torch.arange(3, 60)
CU_SEQLENS = torch.tensor([0, 57], dtype=torch.int32)


def variant(config, name):
    if name == "tied":
        return dataclasses.replace(config, tied_embeddings=True)
    if name == "llama31":
        return dataclasses.replace(config, rope_scaling_factor=8.0, rope_original_max_seq_len=32)
    return dataclasses.replace(config, bos_id=1, eos_id=2)


@pytest.mark.parametrize("name", ["plain", "tied", "llama31"])
def test_transformers_opens_what_we_saved(small_config, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    model = Transformer(variant(small_config, name), seed=5)
    save_hf(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        ours = model.logits(model(TOKENS, CU_SEQLENS))
        assert (theirs(TOKENS[None]).logits[0] - ours).abs().max() <= 1e-4
    if name == "plain":
        assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (1, 2)


@pytest.mark.parametrize("name", ["plain", "tied", "llama31"])
def test_we_open_what_transformers_saved(small_config, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    config = variant(small_config, name)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_to_hf(config)))
    theirs.save_pretrained(tmp_path)
    model = load_hf(tmp_path)
    assert model.config == config
    with torch.no_grad():
        ours = model.logits(model(TOKENS, CU_SEQLENS))
        assert (theirs(TOKENS[None]).logits[0] - ours).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_round_trip_changes_no_bit(small_config, tmp_path, name):
    model = Transformer(variant(small_config, name), seed=5)
    save_hf(model, tmp_path)
    again = load_hf(tmp_path, compute_dtype=torch.bfloat16)
    assert again.config == model.config
    assert again.compute_dtype == torch.bfloat16
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.rope_cos, again.rope_cos)


def test_shards_with_an_index(small_model, tmp_path):
    save_hf(small_model, tmp_path / "one")
    save_hf(small_model, tmp_path / "many", max_shard_bytes=8000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    one, many = load_hf(tmp_path / "one").state_dict(), load_hf(tmp_path / "many").state_dict()
    assert all(torch.equal(v, many[k]) for k, v in one.items())


def test_bf16_on_disk(small_model, tmp_path):
    save_hf(small_model, tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    again = load_hf(tmp_path)
    assert torch.equal(again.lm_head.weight, small_model.lm_head.weight.bfloat16().float())


def test_the_tokenizer_is_saved_beside_the_weights(small_model, tmp_path):
    class Words:
        def save(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    save_hf(small_model, tmp_path, tokenizer=Words())
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_transformers_opens_model_and_tokenizer_together(small_config, tmp_path):
    transformers = pytest.importorskip("transformers")
    text = "def f(x):\n\treturn  x + 12345  # é 你好\n"
    tokenizer = train_bpe([text * 3], 300)
    ids = {"vocab_size": tokenizer.n_vocab, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    save_hf(Transformer(dataclasses.replace(small_config, **ids)), tmp_path, tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text).input_ids == [tokenizer.bos_id, *tokenizer.encode_ordinary(text)]
    assert theirs.eos_token_id == tokenizer.eos_id
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == tokenizer.eos_id


def test_meta_layout_comes_back_bit_for_bit(small_model, small_config):
    state = small_model.state_dict()
    meta = to_meta_state(state, small_config)
    assert "layers.0.attention.wq.weight" in meta
    assert not torch.equal(meta["layers.0.attention.wq.weight"], state["layers.0.self_attn.q_proj.weight"])
    back = from_meta_state({**meta, "rope.freqs": torch.zeros(4)}, small_config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], v) for k, v in state.items())


def test_meta_rows_are_interleaved(small_config):
    """Row 2i of a head in Meta's layout is row i here, row 2i + 1 is row i + head_dim / 2."""
    rows = torch.arange(48.0)[:, None].expand(48, 24)
    meta = to_meta_state({"layers.0.self_attn.q_proj.weight": rows}, small_config)["layers.0.attention.wq.weight"]
    assert meta[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert meta[8:16, 0].tolist() == [8, 12, 9, 13, 10, 14, 11, 15]


def test_unknown_meta_names_are_refused(small_config):
    with pytest.raises(ValueError, match=r"got 'layers\.0\.attention\.wz\.weight'"):
        from_meta_state({"layers.0.attention.wz.weight": torch.zeros(1)}, small_config)


def test_both_spellings_of_rope_settings(small_config):
    config = variant(small_config, "llama31")
    old = config_to_hf(config)
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
    assert config_from_hf(old) == config_from_hf(new) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be 'llama', got 'gpt2'"),
        ({"attention_bias": True}, "attention_bias must be False"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type must be 'default' or 'llama3', got 'yarn'"),
    ],
    ids=["type", "bias", "activation", "rope"],
)
def test_other_models_are_refused(small_config, change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**config_to_hf(small_config), **change})


def damage_nothing(folder):
    (folder / "model.safetensors").unlink()


def damage_name(folder):
    state = load_file(folder / "model.safetensors")
    state["model.extra.weight"] = state.pop("model.norm.weight")
    save_file(state, folder / "model.safetensors")


def damage_shape(folder):
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = torch.zeros(7)
    save_file(state, folder / "model.safetensors")


def damage_bytes(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def damage_index(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


def damage_index_target(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))


def damage_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama"')


def damage_config_kind(folder):
    (folder / "config.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_nothing, FileNotFoundError, r"must hold model\.safetensors or"),
        (damage_name, ValueError, r"lacks \['model\.norm\.weight'\] and has unknown \['model\.extra\.weight'\]"),
        (damage_shape, ValueError, r"model\.norm\.weight in .* must be \(24,\) .*, got \(7,\)"),
        (damage_bytes, ValueError, r"model\.safetensors must be a whole safetensors file"),
        (damage_index, ValueError, r"must name files of its own folder, got '\.\./model\.safetensors'"),
        (damage_index_target, FileNotFoundError, r"must hold gone\.safetensors"),
        (damage_config, ValueError, r"config\.json must be JSON"),
        (damage_config_kind, ValueError, r"config\.json must be a JSON object, got list"),
    ],
    ids=["missing", "name", "shape", "truncated", "index", "index-target", "config", "config-kind"],
)
def test_damaged_folders_are_named(small_model, tmp_path, damage, error, message):
    save_hf(small_model, tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        load_hf(tmp_path)
