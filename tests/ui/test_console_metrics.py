"""metrics.jsonl read as it grows, cut and thinned out."""

from __future__ import annotations

import json
import threading

import pytest

from rookery.ui.metrics import Metrics


def lines(steps, **more) -> str:
    return "".join(json.dumps({"step": s, "loss": 1 / s, "lr": 0.1, "time": float(s), **more}) + "\n" for s in steps)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_only_whole_lines_are_read_and_the_rest_later(file) -> None:
    text = lines(range(1, 6))
    file.write_text(text[:-7], encoding="utf-8")
    metrics = Metrics(file)
    metrics.refresh()
    assert list(metrics.columns["step"]) == [1, 2, 3, 4]
    file.write_text(text + json.dumps({"step": 5, "val_loss": 0.5, "time": 6.0}) + "\n", encoding="utf-8")
    metrics.refresh()
    assert metrics.generation == 0
    assert list(metrics.columns["step"]) == [1, 2, 3, 4, 5]
    assert metrics.validations == [(5, 0.5)]
    assert metrics.after(3)["step"] == [4, 5]


def test_a_run_that_went_back_to_a_checkpoint_is_read_anew(file) -> None:
    file.write_text(lines(range(1, 11)), encoding="utf-8")
    metrics = Metrics(file)
    metrics.refresh()
    file.write_text(lines(range(1, 6)) + lines(range(6, 20), loss=7.0), encoding="utf-8")
    metrics.refresh()
    assert metrics.generation == 1
    assert len(metrics) == 19
    assert metrics.columns["loss"][10] == 7.0


def test_many_steps_become_groups_that_keep_their_extremes(file) -> None:
    spike = {"step": 500, "loss": 99.0, "time": 500.0}
    file.write_text(lines(range(1, 500)) + json.dumps(spike) + "\n" + lines(range(501, 1001)), encoding="utf-8")
    metrics = Metrics(file)
    metrics.refresh()
    series = metrics.series(points=100)
    assert series["group"] == 10
    assert len(series["step"]) == len(series["loss"]) == 100
    assert max(series["high"]) == 99.0
    assert series["loss"][49] == pytest.approx((99 + sum(1 / s for s in range(491, 500))) / 10)
    assert series["low"][0] == pytest.approx(1 / 10)
    whole = metrics.series(first=495, last=505, points=100)
    assert whole["group"] == 1
    assert whole["step"] == list(range(495, 506))
    assert whole["low"] == whole["loss"]


def test_what_is_missing_or_garbled_is_none(file) -> None:
    file.write_text('{"step": 1, "loss": 2.0, "grad_norm": null}\nnot json\n{"loss": 1}\n[]\n', encoding="utf-8")
    metrics = Metrics(file)
    metrics.refresh()
    series = metrics.series()
    assert (series["loss"], series["grad_norm"], series["memory"]) == ([2.0], [None], [None])
    json.dumps(series, allow_nan=False)


def test_pages_that_ask_at_once_read_each_line_once(file) -> None:
    file.write_text(lines(range(1, 20001)), encoding="utf-8")
    metrics = Metrics(file)
    threads = [threading.Thread(target=metrics.refresh) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(metrics.columns["step"]) == list(range(1, 20001))


def test_a_pause_between_two_sessions_is_no_training_time(file) -> None:
    file.write_text(lines(range(1, 11)) + lines([11], time=5000.0) + lines([12], time=5001.0), encoding="utf-8")
    metrics = Metrics(file)
    metrics.refresh()
    assert metrics.seconds() == 9 + 1
