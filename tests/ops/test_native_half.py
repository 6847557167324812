"""The CPU loops between the matrix products in bf16: as exact as their rounding allows, and no worse than PyTorch's
operations one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rookery.ops import gates7, low_rank, mix7, relu_square, token_shift, wkv7
from rookery.ops.jit import outer
from rookery.ops.low_rank import low_rank_plain
from rookery.ops.mix7 import mix7_plain
from rookery.ops.pointwise import gates7_plain, relu_square_plain, token_shift_plain
from rookery.ops.rows_numba import read, write

BF16 = torch.bfloat16
ULP = 2.0**-8
"""Largest relative error of one rounding to bf16."""


def normal(*size: int, seed: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*size, generator=torch.Generator().manual_seed(seed))).to(BF16)


def results(function: Callable, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and gradients of a weighted sum of them."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    weights = [normal(*y.shape, seed=99 + i).to(y.dtype) for i, y in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, weights)
    assert all(grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves, strict=True))
    return [*(y.detach() for y in outputs), *grads]


def shift_plain(x: Tensor, before: Tensor, *mixes: Tensor) -> tuple[Tensor, ...]:
    return token_shift_plain(x, before, mixes, None)


def mixed(function: Callable) -> Callable:
    """`mix7` without its final state, which is fp32 whatever the inputs."""
    return lambda *inputs: function(*inputs, None)[0]


B, T, H, N = 2, 37, 2, 32
C = H * N
SEQUENCES = [normal(B, T, C, seed=i) for i in range(6)]
RATE = torch.sigmoid(normal(B, T, C, seed=6).float()).to(BF16)
VECTORS = [normal(1, 1, C, seed=10 + i) for i in range(6)]

CASES: dict[str, tuple[Callable, Callable, list[Tensor]]] = {
    "token_shift": (token_shift, shift_plain, [SEQUENCES[0], normal(B, C, seed=7), *VECTORS[:3]]),
    "token_shift of an odd width": (
        token_shift,
        shift_plain,
        [normal(1, 9, 21, seed=1), normal(1, 21, seed=2), normal(21, seed=3)],
    ),
    "relu_square": (relu_square, relu_square_plain, [normal(3, 5, 1001, seed=4)]),
    "gates7": (gates7, gates7_plain, [*SEQUENCES[:5], *VECTORS[:3]]),
    "low_rank": (
        lambda *inputs: low_rank(*inputs, "tanh"),
        lambda *inputs: low_rank_plain(*inputs, "tanh"),
        [SEQUENCES[0], normal(C, 24, seed=20, scale=0.1), normal(24, C, seed=21)],
    ),
    "mix7": (
        mixed(mix7),
        mixed(mix7_plain),
        [*SEQUENCES[:4], RATE, SEQUENCES[5], VECTORS[0], VECTORS[1], normal(H, N, seed=8), VECTORS[2][0, 0],
         VECTORS[3][0, 0]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_bf16_loops_round_once(name: str) -> None:
    native, plain, inputs = CASES[name]
    want = results(plain, inputs, torch.float64)
    ours, theirs = results(native, inputs, BF16), results(plain, inputs, BF16)
    for i, (exact, got, other) in enumerate(zip(want, ours, theirs, strict=True)):
        error, of_plain = (float((x.double() - exact).norm() / exact.norm()) for x in (got, other))
        assert error <= max(1.02 * of_plain, ULP / 2), (i, error, of_plain)
        assert error <= 2 * ULP


def test_gates7_without_the_values_of_the_first_layer() -> None:
    w, a, v, *_ = (x.double() for x in SEQUENCES)

    def of(function: Callable) -> Callable:
        return lambda w, a, w0, a0: function(w, a, v.to(w.dtype), None, None, w0, a0, w0)[:2]

    inputs = [w, a, *VECTORS[:2]]
    for got, exact in zip(
        results(of(gates7), inputs, torch.float32), results(of(gates7_plain), inputs, torch.float64), strict=True
    ):
        assert (got.double() - exact).norm() <= 2e-6 * exact.norm()


def test_wkv7_of_bf16_reads_and_writes_bf16_alone() -> None:
    """What comes out is what comes out of the same numbers in fp32, rounded."""
    inputs = [normal(1, 40, 2, 16, seed=i, scale=0.3) for i in range(6)]
    y, state = wkv7(*inputs, backend="native")
    y32, state32 = wkv7(*(x.float() for x in inputs), backend="native")
    assert torch.equal(y, y32.to(BF16))
    assert torch.equal(state, state32)


@outer
def _to_bf16(first, last, x, out):
    for j in range(first, last):
        write((None,), out, j, read((None,), x, j))


def test_rounding_to_bf16_is_that_of_pytorch() -> None:
    bits = torch.cat(
        [
            torch.randint(-(2**31), 2**31 - 1, (20000,), generator=torch.Generator().manual_seed(0)),
            # Halves between two numbers, the largest ones, infinity, and numbers that are none.
            torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F7F7FFF, 0x7F800000, 0x7FFFFFFF, 0x7F800001, 1, 0]),
        ]
    )
    x = bits.to(torch.int32).view(torch.float32)
    out = torch.empty(len(x), dtype=BF16)
    _to_bf16(0, len(x), x.numpy(), out.view(torch.uint16).numpy())
    torch.testing.assert_close(out, x.to(BF16), rtol=0, atol=0, equal_nan=True)
