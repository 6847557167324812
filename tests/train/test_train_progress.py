"""Displays and trackers."""

import io
import json

import pytest
import torch
from rich.console import Console
from train_pieces import CTX

import rookery.train
from rookery.i18n import set_language
from rookery.train import Record, RunFacts
from rookery.train.progress import LiveDisplay, PlainDisplay, duration


def facts(config, tmp_path) -> RunFacts:
    return RunFacts(config(), tmp_path, 0, 100, 32, 10, 1000, 1000, "cpu")


def record(step: int, eta: float | None = 60.0) -> Record:
    return Record(step, 2.5, 3e-4, 0.1, 1.0, step * 32, 12345.0, 0.0, 2.25, eta)


def test_plain_lines_come_at_the_first_step_and_the_last(config, tmp_path, capsys):
    display = PlainDisplay()
    display.on_start(facts(config, tmp_path))
    for step in range(1, 101):
        display.on_record(record(step))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 1/100  loss 2.2500  lr 3.00e-04  12.3k tokens/s  0:01:00 left",
        "step 100/100  loss 2.2500  lr 3.00e-04  12.3k tokens/s",
    ]


def test_the_live_line_shows_the_figures_and_messages_stay(config, tmp_path):
    screen = io.StringIO()
    display = LiveDisplay(Console(file=screen, force_terminal=True, width=120))
    display.on_message("before [it] begins")
    display.on_start(facts(config, tmp_path))
    display.on_record(record(100, eta=0.0))
    display.on_phase("saving")
    display.on_message("a message")
    display.on_end("done", "")
    shown = screen.getvalue()
    assert "before [it] begins" in shown
    assert "a message" in shown
    for part in ("100/100", "loss 2.2500", "lr 3.00e-04", "12.3k tokens/s", "saving", "0:00:00 left"):
        assert part in shown


def test_the_display_speaks_chinese(config, tmp_path, capsys):
    set_language("zh")
    try:
        rookery.train.run(config(my_exit_tokens=2 * 2 * CTX))
    finally:
        set_language("en")
    shown = capsys.readouterr().out
    assert "第 1/2 步" in shown
    assert "已训练 2 步" in shown


def test_durations():
    assert [duration(s) for s in (0.4, 59.6, 3725, -1)] == ["0:00:00", "0:01:00", "1:02:05", "0:00:00"]


def test_tensorboard_gets_the_figures(config, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rookery.train.run(config(tensorboard=True, my_exit_tokens=5 * 2 * CTX))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "wd", "Gtokens", "kt/s", "grad_norm"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seen = {event.step: event.value for event in events.Scalars("loss")}
    assert seen == {row["step"]: pytest.approx(row["loss"]) for row in rows}


def test_wandb_records_offline(command, tmp_path):
    pytest.importorskip("wandb")
    process = command(wandb="project", my_exit_tokens=5 * 2 * CTX)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "off for the rest" not in output
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_missing_tracker_does_not_stop_the_run(command, tmp_path):
    process = command(prelude="import sys; sys.modules['wandb'] = None", wandb="project", my_exit_tokens=5 * 2 * CTX)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "pip install wandb" in output
    assert (tmp_path / "run" / "rwkv-final.pth").exists()


def test_memory_is_shown_on_a_gpu(config, tmp_path, capsys):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    rookery.train.run(config(accelerator="gpu", my_exit_tokens=5 * 2 * CTX))
    assert " GB" in capsys.readouterr().out
