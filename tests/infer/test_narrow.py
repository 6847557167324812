"""bf16 weights in 12 bits: what is multiplied is the weights themselves, whatever they are."""

import pytest
import torch

from rookery.infer.matrix import Narrow, PackedLinear, Room
from rookery.ops.linear import Linear

LARGEST = 2.0**78
"""With the largest exponent that a row may have."""


def packed(weight: torch.Tensor) -> PackedLinear:
    linear = Linear(weight.shape[1], weight.shape[0]).bfloat16()
    with torch.no_grad():
        linear.weight.copy_(weight)
    return PackedLinear(linear, torch.bfloat16, Room(linear))


def multiplied_with(module: PackedLinear) -> torch.Tensor:
    """The weights, as products with unit vectors show them."""
    units = torch.eye(module.matrix.data.shape[1])
    return torch.cat([module(part) for part in units.split(7)]).T


def unusual() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 96, generator=generator)
    weight[0] = 0
    weight[1, ::3] = 0
    weight[2] *= LARGEST / weight[2].abs().max()
    weight[3] *= 2.0**-126
    weight[4, :5] = torch.tensor([2.0**-130, -(2.0**-133), 1e-30, -1e-9, -0.0])
    weight[5] = 2.0 ** torch.arange(-60, 36)
    weight[6, :] = -weight[5]
    return weight.bfloat16()


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_every_number_is_kept(scale) -> None:
    weight = (torch.randn(128, 768, generator=torch.Generator().manual_seed(1)) * scale).bfloat16()
    module = packed(weight)
    assert module.matrix.narrow is not None
    assert len(module.matrix.narrow.values), "some of so many are listed"
    assert torch.equal(multiplied_with(module), weight.float())


def test_zeros_tiny_and_huge_numbers_are_kept() -> None:
    weight = torch.cat([unusual(), torch.randn(232, 96, generator=torch.Generator().manual_seed(2)).bfloat16()])
    module = packed(weight)
    assert module.matrix.narrow is not None
    assert torch.equal(multiplied_with(module), weight.float())


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_products_equal_those_in_fp64(rows) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, 416, generator=generator).bfloat16()
    x = torch.randn(rows, 416, generator=generator) * torch.logspace(-4, 4, 416)
    y = packed(weight)(x)
    exact = x.double() @ weight.double().T
    limit = 2e-7 * (x.abs().double() @ weight.abs().double().T)
    assert ((y - exact).abs() <= limit).all()
    for row in range(rows):
        assert torch.equal(packed(weight)(x[row : row + 1])[0], y[row]), "alone and beside others"


@pytest.mark.parametrize(
    "weight",
    [
        torch.full((4, 32), 2 * LARGEST),
        torch.full((4, 32), float("inf")),
        torch.full((4, 32), float("nan")),
        unusual(),
        torch.ones(6, 32),
        torch.ones(4, 48),
    ],
    ids=["too large", "inf", "nan", "too many to list", "rows", "columns"],
)
def test_what_has_no_narrow_form_is_read_as_it_lies(weight) -> None:
    module = packed(weight)
    assert module.matrix.narrow is None
    assert Narrow.of(weight.bfloat16(), Room(module)) is None
    y = module(torch.ones(1, weight.shape[1]))
    torch.testing.assert_close(y[0], weight.bfloat16().float().sum(1), equal_nan=True)
