"""Generation with a cache equals generation without one; sampling draws what it should."""

import pytest
import torch

from herdkern.model.generate import GenerateConfig, generate, sample
from herdkern.model.layers import KVCache

PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [90, 3], list(range(40))]


def recompute(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        hidden = model(torch.tensor(tokens), torch.tensor([0, len(tokens)], dtype=torch.int32))
        tokens.append(int(model.logits(hidden[-1]).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_greedy_equals_full_recomputation(small_model, dtype):
    small_model.compute_dtype = dtype
    with torch.no_grad():
        want = [recompute(small_model, prompt, 24) for prompt in PROMPTS]
    assert generate(small_model, PROMPTS, GenerateConfig(max_new_tokens=24)) == want


def test_a_row_does_not_depend_on_its_neighbours(small_model):
    config = GenerateConfig(max_new_tokens=16, temperature=1.3, top_k=20, top_p=0.9, seed=4)
    together = generate(small_model, PROMPTS, config)
    assert together == [generate(small_model, [prompt], config)[0] for prompt in PROMPTS]
    assert together != generate(small_model, PROMPTS, GenerateConfig(max_new_tokens=16, temperature=1.3, seed=5))


def test_stop_tokens_end_a_row_and_are_left_out(small_model):
    free = generate(small_model, PROMPTS, GenerateConfig(max_new_tokens=12))
    stop = free[1][4]
    stopped = generate(small_model, PROMPTS, GenerateConfig(max_new_tokens=12, stop_tokens=(stop,)))
    for whole, cut in zip(free, stopped, strict=True):
        assert cut == (whole[: whole.index(stop)] if stop in whole else whole)


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([sample(logits, GenerateConfig(temperature=1.0), generator) for _ in range(4000)])
    share = torch.bincount(draws, minlength=5) / 4000
    assert ((share - logits.exp()).abs() < 4 * (logits.exp() / 4000).sqrt()).all()  # four standard errors


@pytest.mark.parametrize(
    ("config", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 1e-6}, {0}),
        ({"top_k": 3, "top_p": 0.99}, {0, 1, 2}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
    ],
    ids=str,
)
def test_top_k_and_top_p_cut_the_tail(config, allowed):
    logits = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()
    generator = torch.Generator().manual_seed(0)
    config = GenerateConfig(temperature=1.0, **config)
    assert {sample(logits, config, generator) for _ in range(400)} == allowed


def test_temperature_sharpens():
    logits = torch.tensor([1.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    cold = sum(sample(logits, GenerateConfig(temperature=0.1), generator) for _ in range(200))
    hot = sum(sample(logits, GenerateConfig(temperature=10.0), generator) for _ in range(200))
    assert cold < 5 < 60 < hot


def test_cache_refuses_more_than_its_capacity(small_config):
    cache = KVCache(small_config, batch_size=2, capacity=4, dtype=torch.float32, device="cpu")
    assert cache.begin([3, 1]).tolist() == [0, 1, 2, 0]
    assert cache.cu_seqlens_q.tolist() == [0, 3, 4]
    assert cache.seqlens_k.tolist() == [3, 1]
    with pytest.raises(ValueError, match="row 0 must have at most 4 tokens, got 5"):
        cache.begin([2, 1])


def test_cache_grows_by_pages_and_takes_them_back(small_config):
    cache = KVCache(small_config, batch_size=2, capacity=40, dtype=torch.float32, device="cpu", page_size=4)
    cache.begin([9, 2])
    assert cache.block_table.tolist() == [cache.pages[0], [*cache.pages[1], 0, 0]]
    assert len({*cache.pages[0], *cache.pages[1]}) == 4
    assert cache.k.shape[1] == 4
    taken = set(cache.pages[0])
    cache.end(0)
    cache.begin([0, 10])
    assert cache.seqlens_k.tolist() == [0, 12]
    assert taken >= set(cache.pages[1][1:])  # what row 0 gave back is used again, the pool does not grow
    assert cache.k.shape[1] == 4


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "prompt 1 must have at least one token"), ([[1] * 120], "must fit max_seq_len=128, got 136")],
    ids=["empty", "long"],
)
def test_prompts_that_cannot_be_continued(small_model, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(small_model, prompts, GenerateConfig(max_new_tokens=16))


@pytest.mark.parametrize(
    "change",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}],
    ids=str,
)
def test_wrong_settings_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        GenerateConfig(**change)
