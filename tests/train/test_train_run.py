"""Whole runs: what they leave, where they begin, where they stop, and what they refuse."""

import json
import math
import os
import signal
import sys

import pytest
import torch
from safetensors import safe_open
from train_pieces import CTX, STEPS, VOCAB, write_data

import rookery.train
from rookery.config import parse
from rookery.errors import Interrupted, UserError
from rookery.formats import read_weights, write_pth
from rookery.train import Callback


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(folder) -> list[float]:
    return [row["loss"] for row in metrics(folder) if "loss" in row]


def files(folder) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_run_leaves_the_files_of_the_reference_and_ours(config, tmp_path, capsys):
    result = rookery.train.run(config())
    folder = tmp_path / "run"
    assert files(folder) == {
        "config.toml", "status.json", "metrics.jsonl", "train_log.txt", "run.lock", "vocab.json", "checkpoints",
        "rwkv-init.pth", "rwkv-0.pth", "rwkv-1.pth", "rwkv-final.pth",
    }  # fmt: skip
    assert (result.step, result.final_path) == (STEPS, folder / "rwkv-final.pth")
    assert result.tokens == STEPS * 2 * CTX
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["tokens"] == STEPS * 2 * CTX
    assert {"loss", "lr", "grad_norm", "tok_s", "time"} <= rows[0].keys()
    assert result.loss == pytest.approx(sum(losses(folder)[-10:]) / 10, rel=0.2)
    assert losses(folder)[-1] < losses(folder)[0] - 0.3

    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    assert (status["phase"], status["step"], status["total_steps"], status["progress"]) == ("done", STEPS, STEPS, 1.0)
    assert status["exit_reason"]

    log = (folder / "train_log.txt").read_text(encoding="utf-8").splitlines()
    assert log[0].startswith("NEW RUN 2")
    assert "'n_layer': 2" in log[1]
    mean = sum(losses(folder)[:15]) / 15
    epoch, loss, perplexity, lr, _day, _time, epoch_of_run = log[2].split(" ")
    assert (epoch, epoch_of_run) == ("0", "0")
    assert loss == f"{mean:.6f}"
    assert perplexity == f"{math.exp(mean):.4f}"
    assert lr == f"{rows[14]['lr']:.8f}"
    assert [line.split(" ")[0] for line in log[2:]] == ["0", "1", "2"]

    shown = capsys.readouterr().out
    assert f"step 1/{STEPS}" in shown
    assert f"step {STEPS}/{STEPS}" in shown
    assert parse([], folder / "config.toml").config.data.my_exit_tokens == STEPS * 2 * CTX - 1


def test_a_finished_run_says_so_and_trains_nothing(config, tmp_path, capsys):
    rookery.train.run(config())
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    result = rookery.train.run(config())
    assert result.step == STEPS
    assert f"all {STEPS} steps were already trained" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_weights_have_the_dtype_of_the_precision(config, tmp_path, precision, dtype):
    rookery.train.run(config(precision=precision, my_exit_tokens=3 * 2 * CTX))
    for name in ("rwkv-init.pth", "rwkv-final.pth"):
        assert {tensor.dtype for tensor in read_weights(tmp_path / "run" / name).values()} == {dtype}
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert {tensor.dtype for tensor in read_weights(checkpoint / "weights.safetensors").values()} == {torch.float32}


def test_stage_1_writes_the_initial_weights_that_training_begins_with(config, tmp_path):
    result = rookery.train.run(config(train_stage=1))
    assert result.final_path == tmp_path / "run" / "rwkv-init.pth"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    rookery.train.run(config())
    rookery.train.run(config(proj_dir=str(tmp_path / "direct")))
    assert losses(tmp_path / "run") == losses(tmp_path / "direct")


def test_another_configuration_is_refused_with_the_differences(config, tmp_path):
    rookery.train.run(config())
    with pytest.raises(UserError) as refusal:
        rookery.train.run(config(lr_init=1e-3, beta2=0.95, save_every=7))
    assert "lr_init: 0.003 -> 0.001" in str(refusal.value)
    assert "beta2: 0.99 -> 0.95" in str(refusal.value)
    assert "save_every" not in str(refusal.value)
    with pytest.raises(UserError, match="n_layer"):
        rookery.train.run(config(n_layer=3))


def test_without_checkpoints_a_run_goes_on_from_the_newest_numbered_weights(config, tmp_path):
    rookery.train.run(config())
    folder = tmp_path / "run"
    final = read_weights(folder / "rwkv-1.pth")
    for checkpoint in (folder / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    started = []

    class Watch(Callback):
        def on_start(self, facts):
            started.append(facts.first_step)

    rookery.train.run(config(), callbacks=[Watch()])
    assert started == [30]
    assert [row["step"] for row in metrics(folder)] == list(range(1, STEPS + 1))
    # Warm-up begins again, as in the reference.
    assert metrics(folder)[30]["lr"] == pytest.approx(0.01 * metrics(folder)[29]["lr"], rel=0.2)
    log = (folder / "train_log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ")[0] for line in log if line[0].isdigit()] == ["0", "1", "2"]
    assert log[-1].split(" ")[-1] == "0"

    # The newest is damaged: the one before it.
    for checkpoint in (folder / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / (checkpoint.name + "-second"))
    (folder / "rwkv-1.pth").write_bytes(b"no weights")
    rookery.train.run(config(), callbacks=[Watch()])
    assert started == [30, 15]
    assert read_weights(folder / "rwkv-1.pth").keys() == final.keys()


def test_training_goes_on_from_a_loaded_model(config, tmp_path):
    rookery.train.run(config())
    result = rookery.train.run(
        config(load_model=str(tmp_path / "run" / "rwkv-final.pth"), proj_dir=str(tmp_path / "more"), n_layer=None)
    )
    assert result.step == STEPS
    assert losses(tmp_path / "more")[0] < losses(tmp_path / "run")[0] - 0.3
    assert "rwkv-init.pth" not in files(tmp_path / "more")


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_the_same_whoever_reads_them_and_however_they_are_divided(config, tmp_path, workers):
    rookery.train.run(config(my_exit_tokens=6 * 4 * CTX, micro_bsz=4, proj_dir=str(tmp_path / "whole")))
    rookery.train.run(config(my_exit_tokens=6 * 4 * CTX, accumulate_grad_batches=2, num_workers=workers))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    rates = [[row["lr"] for row in metrics(tmp_path / name)] for name in ("run", "whole")]
    assert rates[0] == rates[1]


def test_validation_loss_is_reported(config, tmp_path, data_file):
    val_file = write_data(tmp_path / "validation", seed=1)
    result = rookery.train.run(config(val_file=str(val_file), val_every=20))
    rows = [row for row in metrics(tmp_path / "run") if "val_loss" in row]
    assert [row["step"] for row in rows] == [15, 20, 30, 40]
    assert rows[-1]["val_loss"] == result.val_loss
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert math.log(4) < rows[-1]["val_loss"] < math.log(VOCAB)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT that reaches one process alone")
def test_a_validation_that_a_stop_cuts_short_comes_first_when_the_run_goes_on(config, tmp_path):
    class Stop(Callback):
        def on_record(self, record):
            if record.step == 20:
                os.kill(os.getpid(), signal.SIGINT)

    val_file = write_data(tmp_path / "validation", seed=1)
    changes = {"val_file": str(val_file), "val_every": 20, "my_exit_tokens": 22 * 2 * CTX}
    whole = rookery.train.run(config(**changes, proj_dir=str(tmp_path / "whole")))
    with pytest.raises(Interrupted, match="at step 20"):
        rookery.train.run(config(**changes), callbacks=[Stop()])
    assert not [row for row in metrics(tmp_path / "run") if row["step"] == 20 and "val_loss" in row]
    assert rookery.train.run(config(**changes)).val_loss == whole.val_loss
    validations = [
        [(row["step"], row["val_loss"]) for row in metrics(tmp_path / name) if "val_loss" in row]
        for name in ("run", "whole")
    ]
    assert validations[0] == validations[1]
    assert [step for step, _loss in validations[0]] == [15, 20, 22]


def test_divergence_stops_cleanly_and_says_where(config, tmp_path):
    """A matrix so large that its product overflows: the parameter is finite, the activation is not."""
    folder = tmp_path / "run"
    rookery.train.run(config(train_stage=1))
    weights = read_weights(folder / "rwkv-init.pth")
    weights["blocks.1.ffn.key.weight"] = torch.full_like(weights["blocks.1.ffn.key.weight"], 3e38)
    write_pth(folder / "rwkv-init.pth", weights)
    with pytest.raises(UserError) as failure:
        rookery.train.run(config())
    assert "step 1 " in str(failure.value)
    assert "activation blocks.1.ffn.key" in str(failure.value)
    with safe_open(folder / "nan-batch-step-1.safetensors", framework="pt") as file:
        assert file.get_tensor("tokens.0").shape == (2, CTX)
        assert file.get_tensor("targets.0").shape == (2, CTX)
        assert file.metadata()["first_sample"] == "0"
    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    assert status["phase"] == "failed"
    assert "blocks.1.ffn.key" in status["exit_reason"]
    assert not list((folder / "checkpoints").iterdir()) if (folder / "checkpoints").exists() else True
    assert losses(folder) == []


def test_divergence_keeps_the_last_checkpoint(config, tmp_path):
    with pytest.raises(UserError, match="not finite"):
        rookery.train.run(config(lr_init=3e4, lr_final=3e4, save_every=1, warmup_steps=0, grad_clip=0.0))
    (newest, *_rest) = sorted((tmp_path / "run" / "checkpoints").iterdir(), reverse=True)
    weights = read_weights(newest / "weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert int(newest.name[5:]) == len(losses(tmp_path / "run"))


def test_several_devices_are_refused_and_one_device_needs_no_strategy(config, capsys):
    with pytest.raises(UserError, match="one"):
        rookery.train.run(config(devices=2))
    rookery.train.run(config(strategy="deepspeed_stage_2", my_exit_tokens=3 * 2 * CTX))
    assert "deepspeed_stage_2" in capsys.readouterr().out


@pytest.mark.parametrize("kernel", ["triton", "fla"])
def test_a_kernel_that_cannot_serve_is_refused_before_anything_is_written(config, tmp_path, kernel):
    with pytest.raises(UserError, match=f"--kernel {kernel}: .* runs on a GPU, not on cpu. Without it"):
        rookery.train.run(config(kernel=kernel, accelerator="cpu"))
    assert not (tmp_path / "run" / "config.toml").exists()


def test_prepare_decides_everything_and_writes_nothing(config, tmp_path):
    resolved = rookery.train.prepare(config())
    assert resolved.config.run.epoch_count == 3
    assert resolved.config.model.vocab_size == VOCAB
    assert not (tmp_path / "run").exists()
