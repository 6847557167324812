"""Sampling equals the `rwkv` package's."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rookery.errors import UserError
from rookery.infer import NoNumbers, Sampler, Sampling, probabilities

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sampling.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", [row for row in GOLDEN["rows"] if "quirk" not in row])
def test_probabilities_equal_the_rwkv_packages(row) -> None:
    probs = probabilities(torch.tensor(row["logits"]), row["temperature"], row["top_p"], row["top_k"])
    torch.testing.assert_close(probs, torch.tensor(row["probs"]), rtol=2e-6, atol=1e-7)


def test_defaults_equal_the_rwkv_packages() -> None:
    ours = Sampling()
    for name in ("temperature", "top_p", "top_k", "alpha_frequency", "alpha_presence", "alpha_decay"):
        assert getattr(ours, name) == GOLDEN["defaults"][name], name


@pytest.mark.parametrize("row", [row for row in GOLDEN["rows"] if "quirk" in row])
def test_top_p_of_one_keeps_everything(row) -> None:
    logits = torch.tensor(row["logits"])
    torch.testing.assert_close(probabilities(logits, 1.0, 1.0), logits.softmax(-1))
    assert (probabilities(logits, 2.0, 1.0, 3) > 0).sum() == 3


LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=4)


@given(st.lists(LOGITS, min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 6), st.sampled_from([0, 0.5, 1, 3]))
def test_a_batch_equals_its_rows(rows, top_p, top_k, temperature) -> None:
    logits = torch.tensor(rows)
    together = probabilities(logits, temperature, top_p, top_k)
    apart = torch.stack([probabilities(row, temperature, top_p, top_k) for row in logits])
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(together.sum(-1), torch.ones(len(rows)))


@pytest.mark.parametrize(("top_p", "top_k"), [(0.5, 0), (0.99, 0), (0.9, 40), (0.9, 2000), (1.0, 30), (0.0, 0)])
@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_a_large_vocabulary_is_cut_like_a_small_one(monkeypatch, spread, top_p, top_k) -> None:
    """The search among the likeliest tokens gives what sorting all gives."""
    logits = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(1)) * spread
    quick = probabilities(logits, 0.7, top_p, top_k)
    monkeypatch.setattr("rookery.infer.sampler.ENOUGH", 20_000)
    torch.testing.assert_close(probabilities(logits, 0.7, top_p, top_k), quick, rtol=0, atol=0)


def text_of(token: int) -> str:
    return "ab1 "[token]


def test_penalties_follow_the_definition() -> None:
    """Presence for every token seen, blanks and digits too; frequency for what is counted, fading by the decay."""
    sampling = Sampling(temperature=0, alpha_presence=0.5, alpha_frequency=1.0, alpha_decay=0.5)
    sampler = Sampler(sampling, text_of)
    for token in (0, 0, 2):
        sampler.saw(token)
    # token 0 counts (1 * .5 + 1) * .5 = .75, so it loses 1.25; token 2, a digit, loses .5
    assert sampler.draw(torch.tensor([1.24, 0.0, -9.0, -9.0])) == 1
    assert sampler.draw(torch.tensor([1.26, 0.0, -9.0, -9.0])) == 0
    assert sampler.draw(torch.tensor([-9.0, 0.0, 0.49, -9.0])) == 1
    assert sampler.draw(torch.tensor([-9.0, 0.0, 0.51, -9.0])) == 2


def test_banned_tokens_are_never_drawn_and_logits_stay_as_they_were() -> None:
    sampler = Sampler(Sampling(token_ban=(1, 3), top_p=1.0, alpha_presence=0, alpha_frequency=0, seed=1), text_of)
    logits = torch.tensor([0.0, 5.0, 0.0, 5.0])
    assert {sampler.draw(logits) for _n in range(50)} == {0, 2}
    assert logits.tolist() == [0, 5, 0, 5]


def test_seeds_reproduce_and_frequencies_are_right() -> None:
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    settings = {"top_p": 1.0, "alpha_presence": 0.0, "alpha_frequency": 0.0}
    draws = []
    for seed in (1, 1, 2):
        sampler = Sampler(Sampling(seed=seed, **settings), text_of)
        draws.append([sampler.draw(logits) for _n in range(3000)])
    assert draws[0] == draws[1] != draws[2]
    assert abs(draws[0].count(0) / 3000 - 0.7) < 0.04
    assert abs(draws[0].count(2) / 3000 - 0.1) < 0.03


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -0.1), ("top_p", 1.5), ("top_k", -1), ("alpha_decay", 2.0), ("max_tokens", 0)]
)
def test_impossible_settings_are_named(name, value) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}"):
        Sampling(**{name: value})


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nothing_is_drawn_from_what_is_no_number(number) -> None:
    logits = torch.zeros(2000)
    logits[1234] = number
    for settings in (
        {"temperature": 0, "alpha_presence": 0, "alpha_frequency": 0},
        {"temperature": 0},
        {},
        {"top_k": 3},
    ):
        with pytest.raises(NoNumbers, match="NaN or infinity"):
            Sampler(Sampling(**settings), text_of).draw(logits)
    for large in (-torch.inf, 3e38, -3e38):
        logits[:] = 0
        logits[:1000] = large
        assert (Sampler(Sampling(), text_of).draw(logits) < 1000) == (large > 0)
