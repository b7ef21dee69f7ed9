"""A checkpoint of several ranks becomes a Hugging Face folder: the same weights and logits, one tensor at a time."""

import json
import shutil
import weakref

import pytest
import sharded_jobs
import torch
from pipeline_cases import make_batches, make_model
from ranks import Ranks
from safetensors import safe_open
from safetensors.torch import load_file

import herdkern.train.sharded_export as module
from herdkern.cli import main
from herdkern.model.hf_weights import config_to_hf, hf_state, load_hf
from herdkern.train.checkpoint import save_checkpoint
from herdkern.train.sharded_export import export_checkpoint

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder whose checkpoint has pipeline stages, cut by tensor parallelism, and the weights that went in."""
    root = tmp_path_factory.mktemp("run")
    with Ranks(4) as ranks:
        answers = ranks.run(sharded_jobs.train_and_save, root / "checkpoints", {"pp": 2, "tp": 2}, True, seconds=250)
    weights = {key: torch.from_numpy(value) for some in answers for key, value in some.items()}
    return root, {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}


def test_transformers_computes_the_same_logits(saved, tmp_path):
    transformers = pytest.importorskip("transformers")
    root, weights = saved
    assert main(["checkpoint", "export", str(root), "--to", str(tmp_path / "hf")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    ours = make_model(True, **sharded_jobs.SHAPE)
    named = dict(ours.named_parameters())
    assert named.keys() == weights.keys()
    for name, value in weights.items():
        named[name].data.copy_(value)
    batch = make_batches(1)[0]
    tokens = batch.tokens[: int(batch.cu_seqlens[1])]
    borders = torch.tensor([0, len(tokens)], dtype=torch.int32)
    with torch.no_grad():
        wanted = ours.logits(ours(tokens, borders))
        got = theirs(tokens[None]).logits[0]
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    again = hf_state(load_hf(tmp_path / "hf"))
    assert all(torch.equal(again[name], value) for name, value in hf_state(ours).items())


def test_one_tensor_is_in_memory_at_a_time(saved, tmp_path, monkeypatch):
    root, weights = saved
    alive = []

    def read(stored, of=module.read_whole):
        assert not [one for one in alive if one() is not None]
        whole = of(stored)
        alive.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(module, "read_whole", read)
    out = export_checkpoint(
        root / "checkpoints" / "step-3", tmp_path / "hf", dtype=torch.bfloat16, max_shard_bytes=9000
    )
    assert len(alive) == len(weights)
    places = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(places.values())) > 2
    for name, value in weights.items():
        with safe_open(out / places[f"model.{name}"], framework="pt") as f:
            assert torch.equal(f.get_tensor(f"model.{name}"), value.bfloat16())
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_checkpoint_of_one_rank_and_its_average(tmp_path):
    model = make_model(**sharded_jobs.SHAPE)
    average = {name: param.detach().double() + 1 for name, param in model.named_parameters()}
    folder = save_checkpoint(
        tmp_path / "run",
        4,
        tensors={"model": hf_state(model), "average": average},
        state={"step": 4},
        files={"config.json": config_to_hf(model.config)},
    )
    (tmp_path / "tok").mkdir()
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / "tok" / name).write_text("{}")
    out = tmp_path / "hf"
    arguments = ["--to", str(out), "--weights", "average", "--tokenizer", str(tmp_path / "tok")]
    assert main(["checkpoint", "export", str(folder), *arguments]) == 0
    found = load_file(out / "model.safetensors")
    assert {name: value.float() for name, value in average.items()}.keys() == {
        name.removeprefix("model.") for name in found
    }
    for name, value in found.items():
        assert torch.equal(value, average[name.removeprefix("model.")].float())
    assert (out / "tokenizer.json").read_text() == "{}"
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"  # not that of the tokenizer
    with pytest.raises(FileExistsError, match="out must not exist yet"):
        export_checkpoint(folder, out)


def test_what_cannot_be_exported_is_told(saved, tmp_path, capsys):
    root, _ = saved
    with pytest.raises(ValueError, match="weights must be one of model, optimizer, got 'average'"):
        export_checkpoint(root / "checkpoints" / "step-3", tmp_path / "hf", weights="average")
    plain = save_checkpoint(tmp_path / "plain", 1, tensors={"model": {"a": torch.zeros(2)}}, state={"step": 1})
    with pytest.raises(ValueError, match=r"must have the config\.json of a Llama"):
        export_checkpoint(plain, tmp_path / "hf")
    broken = shutil.copytree(root, tmp_path / "broken")
    (broken / "checkpoints" / "step-3" / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="state.json must have"):
        assert main(["checkpoint", "export", str(broken), "--to", str(tmp_path / "hf")]) == 1
    assert "must hold an intact checkpoint" in capsys.readouterr().err
    assert main(["checkpoint", "export", str(tmp_path), "--to", str(tmp_path / "hf")]) == 1
    assert "must be a checkpoint, a folder of some or a run" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / "hf.tmp").exists()


def test_inspect_and_verify(saved, tmp_path, capsys):
    root = shutil.copytree(saved[0], tmp_path / "run")
    folder = root / "checkpoints" / "step-3"
    assert main(["checkpoint", "inspect", str(root)]) == 0
    text = capsys.readouterr().out
    assert f"{folder}\nstep 3, written by 4 ranks\n" in text
    assert "model: 20 tensors, " in text
    assert "optimizer: 60 tensors, " in text
    assert "at most 2 parts" in text
    assert "shard-00003-of-00004.safetensors" in text
    assert main(["checkpoint", "verify", str(root)]) == 0
    assert capsys.readouterr().out == f"{folder}: 10 files verified\n"
    (folder / "state.json").write_text("{}")
    (folder / "rank-00002-of-00004.json").unlink()
    assert main(["checkpoint", "verify", str(folder)]) == 1
    text = capsys.readouterr().out
    assert text.startswith(f"{folder}: 2 damaged\n  ")
    assert "rank-00002-of-00004.json must be there" in text
    assert "state.json must have" in text
    (folder / "manifest.json").unlink()
    assert main(["checkpoint", "verify", str(folder)]) == 1
    assert "must be a checkpoint manifest" in capsys.readouterr().out


def test_the_word_after_checkpoint(capsys):
    assert main(["checkpoint"]) == 2
    assert main(["checkpoint", "--help"]) == 0
    assert "export FOLDER --to DIR" in capsys.readouterr().out
    assert main(["checkpoint", "exprt", "x"]) == 2
    assert "did you mean 'export'?" in capsys.readouterr().err
