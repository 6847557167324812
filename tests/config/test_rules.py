"""The rules that fill in what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rookery.config import rules
from rookery.errors import UserError

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "x070_ranks.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: str(row["n_embd"]))
def test_current_ranks_are_those_of_the_current_trainer(row: dict) -> None:
    assert rules.ranks("x070", 12, row["n_embd"], "current") == row["train_temp"]


@pytest.mark.parametrize("size", GOLDEN["official_G1"])
def test_g1_ranks_are_those_of_the_released_files(size: str) -> None:
    model = dict(GOLDEN["official_G1"][size])
    assert rules.ranks("x070", model.pop("n_layer"), model.pop("n_embd"), "g1") == model


def test_ranks_of_the_older_generations() -> None:
    assert rules.ranks("x052", 12, 768) == {}
    assert rules.ranks("x060", 24, 2048) == {"mix": 32, "decay": 64}
    assert rules.ranks("x060", 32, 4096) == {"mix": 64, "decay": 128}


@pytest.mark.parametrize(
    ("n_embd", "rates"),
    [(768, (6e-4, 5e-5)), (1024, (4e-4, 4e-5)), (2048, (2e-4, 2e-5)), (4096, (1e-4, 1e-5)), (128, (4e-3, 3e-4))],
)
def test_learning_rates_have_one_digit(n_embd: int, rates: tuple[float, float]) -> None:
    assert rules.learning_rates(n_embd) == rates


def test_channel_mixing_width() -> None:
    assert rules.dim_ffn("x070", 768) == 3072
    assert rules.dim_ffn("x060", 768) == 2688
    assert rules.dim_ffn("x052", 2560) == 8960
    assert rules.dim_ffn("x060", 96) == 320, "3.5 x 96 = 336, rounded down to a multiple of 32"


def test_epsilon() -> None:
    assert (rules.adam_eps("x052"), rules.adam_eps("x060"), rules.adam_eps("x070")) == (1e-8, 1e-18, 1e-18)


def test_steps_of_a_mini_epoch() -> None:
    assert rules.epoch_steps(16) == 2520
    assert rules.epoch_steps(240) == 168


def test_a_batch_that_does_not_divide_names_its_neighbours() -> None:
    with pytest.raises(UserError, match=r"11 samples .* 40320 .* make it 10 or 12"):
        rules.epoch_steps(11)


def test_the_schedule_ends_with_the_step_that_reaches_the_tokens() -> None:
    assert rules.total_steps(1000, ctx_len=10, global_batch=10) == 10
    assert rules.total_steps(1001, ctx_len=10, global_batch=10) == 11
