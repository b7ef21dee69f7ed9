"""The running mean of the weights equals the mean of the checkpoints, whole or in shards."""

import pytest
import torch
from safetensors.torch import save_file

from herdkern.train.average import WeightAverage, offline_mean


def steps(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    start = {"a": torch.randn(6, 4, generator=generator), "b": torch.randn(8, generator=generator)}
    return [{k: v + 1e-3 * torch.randn(v.shape, generator=generator) for k, v in start.items()} for _ in range(count)]


def model_of(values: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = torch.nn.Module()
    for name, value in values.items():
        model.register_parameter(name, torch.nn.Parameter(value.clone()))
    return model


@pytest.mark.parametrize("count", [1, 2, 40])
def test_running_mean_equals_the_offline_mean(tmp_path, count):
    average, files = WeightAverage(), []
    for number, values in enumerate(steps(count)):
        average.update(model_of(values))
        files.append(tmp_path / f"{number}.safetensors")
        save_file(values, files[-1])
    offline = dict(offline_mean(files))
    assert list(offline) == ["a", "b"]
    for name, mean in offline.items():
        assert mean.dtype == torch.float64
        torch.testing.assert_close(average.mean[name], mean, rtol=1e-14, atol=1e-14)
    last = model_of(steps(count)[-1])
    average.copy_to(last)
    assert torch.equal(last.a.detach(), offline["a"].float())


def test_shards_average_to_the_shards_of_the_mean():
    whole, halves = WeightAverage(), [WeightAverage(), WeightAverage()]
    for values in steps(7):
        whole.update(model_of(values))
        for i, half in enumerate(halves):
            half.update(model_of({name: value.chunk(2)[i] for name, value in values.items()}))
    for name, mean in whole.mean.items():
        assert torch.equal(torch.cat([half.mean[name] for half in halves]), mean)


def test_a_loaded_mean_goes_on():
    values = steps(5)
    one, two = WeightAverage(), WeightAverage()
    for value in values:
        one.update(model_of(value))
    for value in values[:3]:
        two.update(model_of(value))
    three = WeightAverage()
    three.load(two.mean, two.count)
    for value in values[3:]:
        three.update(model_of(value))
    assert all(torch.equal(one.mean[name], three.mean[name]) for name in one.mean)


def test_wrong_calls_are_named(tmp_path):
    with pytest.raises(ValueError, match="copy_to must follow at least one update"):
        WeightAverage().copy_to(model_of(steps(1)[0]))
    with pytest.raises(ValueError, match="files must have at least one"):
        next(offline_mean([]))
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    save_file({"a": torch.zeros(2)}, files[0])
    save_file({"c": torch.zeros(2)}, files[1])
    with pytest.raises(ValueError, match="they differ in 'a'"):
        next(offline_mean(files))
    save_file({"a": torch.zeros(3)}, files[1])
    with pytest.raises(ValueError, match=r"must be \(2,\)"):
        next(offline_mean(files))
