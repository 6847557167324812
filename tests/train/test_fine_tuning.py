"""Training beside a frozen model: adapters, states, quantised bases, validation that ends a run."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from train_pieces import STEPS, VOCAB, random_tokens, tiny_model

import rookery
from rookery.data import BinIdxWriter
from rookery.errors import Interrupted, UserError
from rookery.formats import read_adapter, read_weights, write_pth
from rookery.tokenizer import Character
from rookery.train.callbacks import Callback

METHODS = {
    "lora": {"peft": "lora", "lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.1, "lora_plus_ratio": 4.0},
    "dora": {"peft": "dora", "lora_r": 4, "lora_alpha": 8.0, "train_parts": ["ln"]},
    "pissa": {"peft": "pissa", "lora_r": 4, "lora_alpha": 8.0},
    "quantised pissa": {"peft": "pissa", "lora_r": 4, "quant": "nf4"},
    "miss": {"peft": "miss", "lora_r": 4},
    "bat": {"peft": "miss", "lora_r": 4, "miss_mode": "bat", "quant": "int8"},
    "state": {"peft": "state", "quant": "nf4", "lr_init": 1.0, "lr_final": 0.1},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("base") / "base.pth"
    write_pth(file, {name: tensor.bfloat16() for name, tensor in tiny_model().state_dict().items()})
    return file


@pytest.fixture
def tuning(config, base):
    """Makes a configuration of a short fine-tuning, with changes."""

    def make(**changes):
        defaults = {"n_layer": None, "n_embd": None, "load_model": str(base)}
        rates = {"lr_init": 1e-2, "lr_final": 1e-3, "weight_decay": 0.0}
        return config(**{**defaults, **rates, **changes})

    return make


class StopAt(Callback):
    """Interrupts the run after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_record(self, record) -> None:
        if record.step == self.step:
            signal.raise_signal(signal.SIGINT)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(folder) if "loss" in row]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """What the run wrote at its end."""
    adapter = folder / "adapter-final.safetensors"
    return read_adapter(adapter).tensors if adapter.exists() else read_weights(folder / "rwkv-final.pth")


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_resumed_equals_uninterrupted(tuning, base, tmp_path, method) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    rookery.train.run(tuning(**METHODS[method], proj_dir=str(whole)))
    with pytest.raises(Interrupted):
        rookery.train.run(tuning(**METHODS[method]), callbacks=[StopAt(7)])
    result = rookery.train.run(tuning(**METHODS[method]))
    assert result.step == STEPS
    assert losses(run) == losses(whole)
    assert sum(losses(run)[-5:]) < sum(losses(run)[:5])
    one, other = trained(run), trained(whole)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not [name for name in one if name.endswith(".weight") and "ln" not in name]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_directory_is_the_model_that_was_trained(tuning, base, tmp_path, method) -> None:
    """Also of one trained on a quantised base: what is used is the original base with what was learnt."""
    settings = {key: value for key, value in METHODS[method].items() if key != "quant"}
    rookery.train.run(tuning(**settings, precision="fp32"))
    tokens = random_tokens(2)
    loaded = rookery.load(tmp_path / "run")
    plain = rookery.load(base)
    with torch.no_grad():
        logits, before = loaded(tokens)[0], plain(tokens)[0]
    assert (logits - before).abs().max() > 0.02
    mean = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.isfinite(mean)


def test_without_checkpoints_a_run_goes_on_from_its_newest_adapter(tuning, tmp_path) -> None:
    settings = METHODS["lora"] | {"lora_dropout": 0.0}
    rookery.train.run(tuning(**settings, my_exit=1))
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    done = len(losses(tmp_path / "run"))
    assert (tmp_path / "run" / "adapter-1.safetensors").exists()
    rookery.train.run(tuning(**settings))
    again = losses(tmp_path / "run")
    assert len(again) == STEPS > done
    # The optimiser begins anew, the weights do not.
    assert again[done] < sum(again[:3]) / 3


def test_an_adapter_is_gone_on_with_as_its_file_says(tuning, base, tmp_path) -> None:
    first = tmp_path / "first"
    rookery.train.run(tuning(**METHODS["dora"], proj_dir=str(first)))
    prepared = rookery.train.prepare(tuning(adapter_load=str(first))).config.adapter
    assert (prepared.peft, prepared.lora_r, prepared.train_parts) == ("dora", 4, ["ln"])
    with pytest.raises(UserError, match=r"an adapter with lora_r 4; you ask for 8"):
        rookery.train.run(tuning(peft="dora", lora_r=8, adapter_load=str(first)))
    result = rookery.train.run(tuning(peft="dora", adapter_load=str(first)))
    assert losses(tmp_path / "run")[0] < losses(first)[0]
    assert result.final_path.name == "adapter-final.safetensors"

    changed = {n: t + 0.1 if n == "blocks.0.ffn.key.weight" else t for n, t in read_weights(base).items()}
    write_pth(tmp_path / "other.pth", changed)
    with pytest.raises(UserError, match="has the same dimensions but other weights"):
        rookery.train.run(
            tuning(load_model=str(tmp_path / "other.pth"), adapter_load=str(first), proj_dir=str(tmp_path / "x"))
        )


def test_base_parameters_of_an_adapter_are_gone_on_with_unrounded(tuning, tmp_path) -> None:
    """The base is bf16, what training made of its parameters is fp32."""
    first = tmp_path / "first"
    rookery.train.run(tuning(**METHODS["dora"], proj_dir=str(first)))
    rookery.train.run(tuning(adapter_load=str(first)))
    before = read_adapter(first / "adapter-final.safetensors").tensors
    begun = read_adapter(tmp_path / "run" / "adapter-init.safetensors").tensors
    assert not torch.equal(before["ln_out.weight"], before["ln_out.weight"].bfloat16().float())
    assert all(torch.equal(begun[name], before[name]) for name in before)
    assert losses(tmp_path / "run")[0] < losses(first)[0]


def test_an_old_adapter_is_gone_on_with_by_the_alpha_that_is_given(tuning, tmp_path) -> None:
    first, old = tmp_path / "first", tmp_path / "rwkv-0.pth"
    settings = METHODS["lora"] | {"lora_dropout": 0.0}
    rookery.train.run(tuning(**settings, proj_dir=str(first)))
    write_pth(old, read_weights(first / "adapter-final.safetensors"))
    with pytest.raises(UserError, match=r"rwkv-0.pth does not say its alpha.*--lora_alpha"):
        rookery.train.run(tuning(adapter_load=str(old)))
    rookery.train.run(tuning(adapter_load=str(old), lora_alpha=8.0))
    assert read_adapter(tmp_path / "run").config.alpha == 8.0
    rookery.train.run(tuning(adapter_load=str(first), proj_dir=str(tmp_path / "own")))
    assert losses(tmp_path / "run")[0] == losses(tmp_path / "own")[0]


def test_merge_writes_the_whole_model_beside_each_adapter(tuning, tmp_path) -> None:
    rookery.train.run(tuning(**METHODS["miss"], merge=1))
    run = tmp_path / "run"
    tokens = random_tokens(2)
    with torch.no_grad():
        merged = rookery.load(run / "rwkv-final.pth", dtype=torch.float32)(tokens)[0]
        beside = rookery.load(run, dtype=torch.float32)(tokens)[0]
    assert (merged - beside).abs().max() < 0.05 * beside.std(), "the file has the base's bf16"


def test_a_run_without_improvement_stops_and_keeps_its_best(tuning, tmp_path) -> None:
    # So large a rate only makes things worse after the first steps.
    settings = {"peft": "lora", "lora_r": 4, "lr_init": 1.0, "lr_final": 1.0, "warmup_steps": 0}
    stopping = tuning(**settings, val_split=0.2, val_every=2, early_stop=3, dataload="pad")
    result = rookery.train.run(stopping)
    assert result.step < STEPS
    assert "has not become better for 3 validations" in result.exit_reason
    values = [row["val_loss"] for row in metrics(tmp_path / "run") if row.get("val_loss") is not None]
    assert values.index(min(values)) == len(values) - 4
    best, final = (read_adapter(tmp_path / "run" / f"adapter-{name}.safetensors") for name in ("best", "final"))
    assert any(not torch.equal(best.tensors[name], final.tensors[name]) for name in best.tensors)
    again = rookery.train.run(stopping)
    assert (again.step, again.exit_reason) == (result.step, result.exit_reason), "the same command does not go on"


def test_a_validation_loss_that_is_not_finite_counts_as_worse(tuning, tmp_path, capsys) -> None:
    """Here the validation data have a token with a broken embedding that the training data do not have."""
    weights = read_weights(tuning().model.load_model)
    weights["emb.weight"] = weights["emb.weight"].clone()
    weights["emb.weight"][VOCAB - 1] = torch.nan
    write_pth(tmp_path / "broken.pth", weights)
    for name, tokens in (("training", VOCAB - 1), ("validation", VOCAB)):
        with BinIdxWriter(tmp_path / name, np.uint16, Character([chr(ord("A") + i) for i in range(VOCAB)])) as writer:
            writer.add((np.arange(400) % tokens).astype(np.uint16))
    settings = {"peft": "lora", "lora_r": 4, "load_model": str(tmp_path / "broken.pth"), "val_every": 1}
    data = {"data_file": str(tmp_path / "training"), "val_file": str(tmp_path / "validation")}
    result = rookery.train.run(tuning(**settings, **data, early_stop=3, save_every=1))
    assert result.step == 3
    assert result.val_loss is None
    assert "the validation loss is not finite at step 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft": "lora", "load_model": ""}, "give --load_model"),
        ({"quant": "nf4"}, "add --peft lora"),
        ({"peft": "lora", "target_modules": ["head"]}, "add it to train_parts"),
        ({"peft": "lora", "target_modules": ["kye"]}, "no matrix kye"),
        ({"peft": "lora", "train_parts": ["tiem"]}, "tiem is not one of"),
        ({"peft": "miss", "miss_mode": "bat", "lora_r": 5}, "not divisible by lora_r 5"),
        ({"peft": "lora", "early_stop": 2}, "val_split or val_file"),
        ({"peft": "lora", "train_stage": 1}, "leave out --peft lora there"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(tuning, tmp_path, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        rookery.train.run(tuning(**changes))
    assert not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize("method", ["lora", "state"])
def test_what_was_trained_beside_a_model_is_no_model_to_begin_with(tuning, base, tmp_path, method) -> None:
    folder = tmp_path / "tuned"
    rookery.train.run(tuning(**METHODS[method], proj_dir=str(folder)))
    given = [folder, folder / "adapter-final.safetensors"] if method == "lora" else [folder]
    for path in given:
        with pytest.raises(UserError, match=r"rookery merge .* -o merged\.pth, and --load_model merged\.pth"):
            rookery.train.run(tuning(peft="none", load_model=str(path)))


def test_a_run_finds_its_base_from_anywhere(tuning, base, tmp_path, monkeypatch) -> None:
    """Both were given from the folder where the training was started, and may have moved together."""
    work = tmp_path / "work"
    (work / "models").mkdir(parents=True)
    shutil.copy(base, work / "models" / "base.pth")
    monkeypatch.chdir(work)
    rookery.train.run(tuning(**METHODS["state"], load_model="models/base.pth", proj_dir="out/state"))
    work.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert rookery.load(tmp_path / "moved" / "out" / "state").blocks[0].att.time_state.abs().max() > 0
    (tmp_path / "moved" / "models" / "base.pth").unlink()
    with pytest.raises(UserError, match="which is no longer there"):
        rookery.load(tmp_path / "moved" / "out" / "state")
