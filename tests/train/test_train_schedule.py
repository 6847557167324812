"""The schedule against the reference trainers' own numbers."""

import json
from pathlib import Path

import pytest

from rookery.train.schedule import Schedule

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "lr_schedules.json").read_text(encoding="utf-8"))["rows"]

CHANGES = {
    "v5_cosine_my_exit_tokens_positive": {},
    "v5_half_exp_half_cosine_my_exit_tokens_negative": {"sign": -1},
    "v5_exp_my_exit_tokens_zero": {"sign": 0},
    "v5_exp_with_my_pile_edecay_1": {"sign": 0, "edecay": 1},
    "v5_linear_lr_final_zero": {"sign": 0, "lr_final": 0.0},
    "v5_weight_decay_final_tenth": {"decay_to": 0.1},
    "train_temp_cosine": {},
}


def schedule_of(setting: dict, sign: int = 1, edecay: int = 0, lr_final: float | None = None, decay_to: float = 0.0):
    return Schedule(
        lr_init=setting["lr_init"],
        lr_final=setting["lr_final"] if lr_final is None else lr_final,
        warmup_steps=setting["warmup_steps"],
        tokens_per_step=setting["ctx_len"] * setting["real_bsz"],
        exit_tokens=sign * setting["my_exit_tokens"],
        epoch_steps=setting["epoch_steps"],
        epoch_count=setting["epoch_count"],
        first_step=setting.get("epoch_begin", 0) * setting["epoch_steps"],
        weight_decay=setting["weight_decay"],
        weight_decay_final=decay_to * setting["weight_decay"] or -1.0,
        edecay=edecay,
    )


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("row", range(len(GOLDEN)))
def test_rates_equal_the_reference(row, kind):
    setting, golden = GOLDEN[row]["setting"], GOLDEN[row]["kinds"][kind]
    schedule = schedule_of(setting, **CHANGES[kind])
    decay = golden["wd"] if isinstance(golden["wd"], list) else [golden["wd"]] * len(golden["steps"])
    for step, lr, weight_decay in zip(golden["steps"], golden["lr"], decay, strict=True):
        rates = schedule.at(schedule.first_step + step)
        assert rates.lr == pytest.approx(lr, rel=1e-12, abs=1e-300), step
        assert rates.weight_decay == pytest.approx(weight_decay, rel=1e-12), step


def test_training_stops_before_the_first_step_whose_tokens_are_all_used():
    schedule = schedule_of({**GOLDEN[0]["setting"], "my_exit_tokens": 16 * 512 * 100 + 1})
    assert schedule.total_steps == 101
    assert schedule.at(100).progress < 1 <= schedule.at(101).progress
