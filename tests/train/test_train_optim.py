"""Parameter groups against the reference, and AdamW against a plain restatement."""

import json
from pathlib import Path

import pytest
import torch

from rookery.train.optim import Group, apply_rates, build_optimizer, parameter_groups
from rookery.train.schedule import Rates

ROWS = json.loads((Path(__file__).parents[1] / "golden" / "optimizer_groups.json").read_text(encoding="utf-8"))["rows"]
OURS = [
    row for row in ROWS
    if (row["code"] == "RWKV-LM/RWKV-v5" and row["version"] != "x070") or "train_temp" in row["code"]
]  # fmt: skip


def tensor_for(name: str) -> torch.Tensor:
    """A stand-in of the right rank: the rules look at nothing else of the tensor."""
    matrix = name.endswith(".weight") and ".ln" not in name and not name.startswith("ln")
    return torch.zeros(2, 2) if matrix else torch.zeros(1, 1, 2)


@pytest.mark.parametrize("row", OURS, ids=lambda row: f"{row['code'][-10:]}-{row['version']}-{row['weight_decay']}")
def test_groups_equal_the_reference(row):
    names = [name for group in row["groups"] for name in group["params"]]
    groups = parameter_groups(
        ((name, tensor_for(name)) for name in reversed(names)),
        row["version"],
        weight_decay=row["weight_decay"] > 0,
        layerwise_lr=row.get("layerwise_lr", 1) > 0,
        second_stage=row.get("my_pile_stage") == 2,
    )
    assert [(g.lr_scale, row["weight_decay"] if g.decays else 0.0, g.names) for g in groups] == [
        (g["my_lr_scale"], g["weight_decay"], g["params"]) for g in row["groups"]
    ]


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-12, 1e-18])
def test_adamw_with_the_smallest_epsilon_equals_its_formula_in_fp64(size):
    """eps 1e-18 must work in fp32, also for gradients whose square is denormal."""
    torch.manual_seed(1)
    lr, (beta1, beta2), eps, decay = 1e-3, (0.9, 0.99), 1e-18, 0.1
    parameter = torch.randn(1000, requires_grad=True)
    expected = parameter.detach().double()
    optimizer = build_optimizer({"p": parameter}, [Group(2.0, True, ["p"])], betas=(beta1, beta2), eps=eps)
    mean, square = torch.zeros(1000, dtype=torch.float64), torch.zeros(1000, dtype=torch.float64)
    for step in range(1, 6):
        parameter.grad = torch.randn(1000) * size
        gradient = parameter.grad.double()
        apply_rates(optimizer, Rates(lr / 2, decay, 0.0))
        optimizer.step()
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        expected -= lr * decay * expected
        expected -= lr * (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=3e-6)
