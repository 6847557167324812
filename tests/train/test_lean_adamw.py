"""AdamW in less memory: its formula, codes of 8 bits, bf16 weights rounded by chance, and trainings with both."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from train_pieces import CTX, random_tokens, tiny_model

from rookery.train.lean_adamw import BLOCK, LeanAdamW, Moment8
from rookery.train.optim import Group, build_optimizer, parameter_groups
from rookery.train.schedule import Rates
from rookery.train.strategies import SingleDevice

ADAMW = {"betas": (0.9, 0.99), "eps": 1e-18}


def steps_of(p: torch.Tensor, optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor]) -> None:
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 1e-2, 0.1
    for gradient in gradients:
        p.grad = gradient.to(p.dtype)
        optimizer.step()


def test_without_codes_and_rounding_it_is_adamw() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(70, 70), [torch.randn(70, 70) for _ in range(5)]
    expected, found = (start.clone().requires_grad_() for _ in range(2))
    steps_of(expected, build_optimizer({"p": expected}, [Group(1.0, True, ["p"])], **ADAMW), gradients)
    lean = LeanAdamW([{"params": [found], "names": ["p"]}], **ADAMW, eight_bit=False)
    lean.grad_scale = torch.tensor(4.0)
    steps_of(found, lean, [4 * gradient for gradient in gradients])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert set(lean.state[found]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_finite_changes_nothing(dtype: torch.dtype) -> None:
    p = torch.randn(70, 70, dtype=dtype, requires_grad=True)
    optimizer = LeanAdamW([{"params": [p], "names": ["p"]}], **ADAMW, eight_bit=True)
    steps_of(p, optimizer, [torch.randn(70, 70)])
    state = optimizer.state[p]

    def everything() -> list[torch.Tensor]:
        moments = [state["exp_avg"], state["exp_avg_sq"]]
        return [p.detach(), state["step"], *(t for moment in moments for t in (moment.codes, moment.scales))]

    before = [tensor.clone() for tensor in everything()]
    optimizer.found_inf = torch.tensor(1.0)
    steps_of(p, optimizer, [torch.full((70, 70), float("nan"))])
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    optimizer.found_inf = torch.tensor(0.0)
    steps_of(p, optimizer, [torch.randn(70, 70)])
    assert not any(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_keep_the_mean_and_come_back_exactly(signed: bool) -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 1024) * torch.logspace(-15, 2, 5)[:, None]
    rows = rows if signed else rows**2
    rows[1, :300] = 0
    inside = (rows.abs() > (1e-3 if signed else 1e-6) * rows.abs().amax(1, keepdim=True)).reshape(-1)[:5000]
    values = rows.reshape(-1)[:5000]
    moment = Moment8(values.shape, values.device, signed=signed)
    assert moment.nbytes < 1.1 * values.numel()
    moment.write(values, 0.5)
    error = (moment.whole() / values - 1)[inside]
    assert error.abs().max() < 0.038  # half of a code's distance to the next, 7.5 %
    codes, scales = moment.codes.clone(), moment.scales.clone()
    moment.write(moment.whole(), 0.5)
    assert torch.equal(moment.codes, codes)
    assert torch.equal(moment.scales, scales)

    total = torch.zeros(len(values))
    for part in range(256):
        moment.write(values, torch.full((len(values),), (part + 0.5) / 256))
        total += moment.read()
    error = (total / 256 / values - 1)[inside]
    assert error.abs().max() < 3e-4


def test_no_second_moment_becomes_zero_beside_larger_ones() -> None:
    values = torch.full((BLOCK,), 1e-30)
    values[0] = 1.0
    moment = Moment8(values.shape, values.device, signed=False)
    moment.write(values, 0.5)
    assert moment.whole().min() == pytest.approx(1e-8, rel=1e-5)


def test_updates_below_a_bf16_weights_last_bit_add_up() -> None:
    p = torch.ones(256, 256, dtype=torch.bfloat16, requires_grad=True)
    optimizer = LeanAdamW([{"params": [p], "names": ["p"]}], **ADAMW, eight_bit=False)
    optimizer.param_groups[0]["lr"] = 1e-4  # a fortieth of the distance from 1 to the next weight below
    for _ in range(200):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.float().mean().item() == pytest.approx(1 - 200 * 1e-4, abs=2e-4)
    assert p.dtype == torch.bfloat16
    assert len(p.unique()) > 3


def engine_of(*, eight_bit: bool, dtype: torch.dtype = torch.float32, masters: bool = True) -> SingleDevice:
    model = tiny_model()
    groups = parameter_groups(model.named_parameters(), "x070", weight_decay=True)
    build = partial(build_optimizer, groups=groups, betas=(0.9, 0.99), eps=1e-18, eight_bit=eight_bit)
    return SingleDevice(model, build, dtype=dtype, grad_clip=1.0, masters=masters)


def losses(engine: SingleDevice, steps: range) -> list[float]:
    """On random walks, which can be learnt."""
    found = []
    for step in steps:
        moves = torch.randint(0, 3, (8, CTX + 1), generator=torch.Generator().manual_seed(step))
        tokens = (moves.cumsum(1) + random_tokens(1, seed=step)[0, 0]) % 32
        loss, _state = engine.model.loss(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss, weight=1.0, last=True)
        found.append(engine.step(Rates(2e-3, 0.0, 0.0))[0].item())
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_losses_stay_close_to_adamws() -> None:
    expected = mean(losses(engine_of(eight_bit=False), range(120))[-20:])
    variants = {
        "8 bits": engine_of(eight_bit=True),
        "bf16": engine_of(eight_bit=False, dtype=torch.bfloat16, masters=False),
        "both": engine_of(eight_bit=True, dtype=torch.bfloat16, masters=False),
    }
    assert expected < 1.5
    for name, engine in variants.items():
        # Measured: 8e-4.
        assert mean(losses(engine, range(120))[-20:]) == pytest.approx(expected, rel=5e-3), name


@pytest.mark.parametrize("masters", [True, False])
def test_a_run_goes_on_exactly(tmp_path: Path, masters: bool) -> None:
    def new() -> SingleDevice:
        return engine_of(eight_bit=True, dtype=torch.bfloat16, masters=masters)

    engine = new()
    losses(engine, range(5))
    kinds = [type(m) for state in engine.optimizer.state.values() for m in state.values()]
    assert Moment8 in kinds
    engine.save(tmp_path)
    expected = losses(engine, range(5, 10))
    again = new()
    for p in again.model.parameters():
        p.data.fill_(7.0)
    again.load(tmp_path)
    assert losses(again, range(5, 10)) == expected
    other = engine_of(eight_bit=False)
    other.load(tmp_path)
    assert losses(other, range(5, 10)) == pytest.approx(expected, rel=0.02)
