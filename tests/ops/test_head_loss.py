"""The loss head: chunked loss and gradients against whole logits, and L2Wrap against the reference's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rookery.ops import head_loss, head_loss_native
from rookery.ops.head_loss import head_loss_plain, rows_plain

GOLDEN = Path(__file__).parent.parent / "golden"


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 11, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(30, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, 30, (2, 11), generator=generator)
    targets[0, 3:6] = -100
    return x, weight, targets


@pytest.mark.parametrize("l2wrap", [True, False])
@pytest.mark.parametrize("chunk", [0, 1, 4, 19, 100])
def test_chunks_equal_whole_logits(chunk: int, l2wrap: bool) -> None:
    x, weight, targets = case()
    loss = head_loss(x, weight, targets, chunk=chunk, l2wrap=l2wrap)
    want = head_loss_plain(x, weight, targets, l2wrap=l2wrap)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, (x, weight)), torch.autograd.grad(3 * want, (x, weight)))


def test_the_loss_is_the_mean_over_trained_targets() -> None:
    x, weight, targets = case()
    want = F.cross_entropy(F.linear(x, weight).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(head_loss(x, weight, targets), want)


@pytest.mark.parametrize(("scale", "tolerance"), [(1.0, 1e-9), (0.25, 1e-9)])
@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
def test_l2wrap_adds_what_the_reference_adds(version: str, scale: float, tolerance: float) -> None:
    io = load_file(GOLDEN / f"{version}_io.safetensors")
    V = io["logits"].shape[-1]
    logits = io["logits"].double().requires_grad_()
    identity = torch.eye(V, dtype=torch.float64)
    targets = io["dix"][:, 1:]
    with_it, without = (
        torch.autograd.grad(scale * head_loss(logits, identity, targets, l2wrap=l2wrap), logits)[0]
        for l2wrap in (True, False)
    )
    want = torch.zeros_like(with_it).scatter(
        2, io["max_logit_index"][..., None], io[f"l2wrap_fixed_scale{scale}_added"][..., None].double()
    )
    torch.testing.assert_close(with_it - without, want, rtol=1e-5, atol=tolerance)
    loss = head_loss(logits, identity, targets)
    torch.testing.assert_close(loss.detach(), io["loss"].squeeze(), rtol=0, atol=1e-6)


def test_nothing_trained() -> None:
    x, weight, targets = case()
    loss = head_loss(x, weight, torch.full_like(targets, -100))
    assert not loss.detach()
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (x, weight)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    x, weight, targets = case(dtype)
    loss = head_loss(x, weight, targets)
    assert loss.dtype == torch.float32
    exact_x, exact_weight = (z.detach().double().requires_grad_() for z in (x, weight))
    want = head_loss(exact_x, exact_weight, targets)
    torch.testing.assert_close(loss.double(), want, rtol=0.01, atol=0)
    for got, exact in zip(
        torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(want, (exact_x, exact_weight)), strict=True
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=0.02 * float(exact.abs().max()))


def test_a_frozen_head_gets_no_gradient() -> None:
    x, weight, targets = case()
    frozen = weight.detach()
    loss = head_loss(x, frozen, targets)
    (dx,) = torch.autograd.grad(loss, (x,))
    torch.testing.assert_close(dx, torch.autograd.grad(head_loss_plain(x, frozen, targets), (x,))[0])


@pytest.mark.parametrize("masked", [0, 3, 22])
def test_a_known_number_of_trained_targets_changes_nothing(masked: int) -> None:
    x, weight, targets = case()
    targets = targets.clamp(min=0)
    targets.view(-1)[torch.randperm(22, generator=torch.Generator().manual_seed(0))[:masked]] = -100
    counted = head_loss(x, weight, targets, chunk=5)
    known = head_loss(x, weight, targets, trained=22 - masked, chunk=5)
    assert torch.equal(known, counted)
    gradients = (torch.autograd.grad(loss, (x, weight)) for loss in (known, counted))
    assert all(torch.equal(got, want) for got, want in zip(*gradients, strict=True))


class Made(TorchDispatchMode):
    """Notes the shapes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.data_ptr() not in {
            x.data_ptr() for x in args if isinstance(x, Tensor)
        }:
            self.shapes.add(tuple(result.shape))
        return result


def test_without_gradients_none_are_computed() -> None:
    x, weight, targets = case()
    with Made() as made:
        loss = head_loss(x, weight, targets)
    assert tuple(weight.shape) in made.shapes
    with torch.no_grad(), Made() as made:
        assert torch.equal(head_loss(x, weight, targets), loss)
    assert tuple(weight.shape) not in made.shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [3, 64, 333])
def test_the_cpu_loop_equals_the_plain_rows(V: int, dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(5, V, generator=torch.Generator().manual_seed(V))).to(dtype)
    targets = torch.randint(V, (5,), generator=torch.Generator().manual_seed(1))
    targets[0] = logits[0].argmax()  # where both terms of the gradient meet
    want_loss, want = rows_plain(logits.double(), targets, 0.01, True)
    loss, got = head_loss_native.rows(logits.clone(), targets, 0.01, True)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-6, atol=0)
    assert got.dtype == dtype
    rtol = 2**-8 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-6)
    alone, untouched = head_loss_native.rows(logits, targets, 0.01, False)
    assert torch.equal(alone, loss)
    assert torch.equal(untouched, logits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_makes_the_loss_none(bad: float) -> None:
    x, weight, targets = (z.detach() if z.is_floating_point() else z for z in case(torch.float32))
    weight[7, 3] = bad
    assert not head_loss(x.float(), weight, targets).isfinite()
