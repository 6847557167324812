"""The fused CPU loops between the matrix products equal the plain formulas, forward and backward."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rookery.ops import linear, low_rank, mix7, relu_square, token_shift
from rookery.ops.backend import Call, Op
from rookery.ops.low_rank import low_rank_plain
from rookery.ops.mix7 import mix7_plain
from rookery.ops.pointwise import TOKEN_SHIFT


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size)), dtype=torch.float64)


def with_gradients(function: Callable, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs of `function` and the gradients of a weighted sum of them."""
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    total = sum((y.double() * normal(*y.shape, seed=7)).sum() for y in outputs)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(total, inputs)]


def assert_equal(got: list[Tensor], want: list[Tensor], tolerance: float = 2e-6) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert (g.double() - w).norm() <= tolerance * w.norm() + 1e-12


@pytest.mark.parametrize(("B", "T", "mixes"), [(2, 1, 1), (3, 17, 6), (1, 64, 5)])
def test_token_shift(B: int, T: int, mixes: int) -> None:
    C = 48
    inputs = [normal(B, T, C), normal(B, C), *(normal(1, 1, C, seed=i) for i in range(mixes))]

    def plain(x: Tensor, before: Tensor, *mixes: Tensor) -> list[Tensor]:
        previous = torch.cat([before[:, None], x[:, :-1]], dim=1)
        return [x + m * (previous - x) for m in mixes]

    assert_equal(with_gradients(token_shift, inputs, torch.float32), with_gradients(plain, inputs, torch.float64))


@pytest.mark.parametrize("size", [(1,), (3, 5, 7), (1 << 15, 3)])
def test_relu_square(size: tuple[int, ...]) -> None:
    inputs = [normal(*size)]
    want = with_gradients(lambda x: x.clamp(min=0) ** 2, inputs, torch.float64)
    assert_equal(with_gradients(relu_square, inputs, torch.float32), want)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 15, 16, 300])
def test_linear(rows: int, transposed: bool) -> None:
    def product(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight.T if transposed else weight)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return x @ (weight if transposed else weight.T)

    for width, out in ((40, 24), (300, 530)):  # one tile with edges; several of each kind
        inputs = [normal(2, rows, width), normal(width, out) if transposed else normal(out, width)]
        assert_equal(with_gradients(product, inputs, torch.float32), with_gradients(plain, inputs, torch.float64))


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="oneDNN does not promise it")
def test_linear_gives_the_same_bits_for_a_part_of_the_rows_and_on_two_threads() -> None:
    x, weight = normal(1000, 300).float(), normal(170, 300).float()
    want = linear(x, weight)
    assert torch.equal(linear(x[20:50], weight), want[20:50])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(linear(x, weight), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("between", ["", "tanh", "sigmoid"])
@pytest.mark.parametrize("rows", [1, 50])
def test_low_rank(rows: int, between: str) -> None:
    def native(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return low_rank(x, down, up, between, kernel="native")

    for scale in (1e-4, 1.0):  # tanh is another formula near 0
        inputs = [scale * normal(2, rows, 40), normal(40, 9), normal(9, 30)]
        want = with_gradients(lambda *inputs: low_rank_plain(*inputs, between), inputs, torch.float64)
        assert_equal(with_gradients(native, inputs, torch.float32), want)


@pytest.mark.parametrize("trained", [{0}, {1}, {2}, {0, 1}])
def test_low_rank_with_frozen_inputs(trained: set[int]) -> None:
    inputs = [normal(3, 20, 40).float(), normal(40, 9).float(), normal(9, 30).float()]

    def grads(function: Callable) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(i in trained) for i, x in enumerate(inputs)]
        function(*leaves, "tanh").square().sum().backward()
        assert [x.grad is not None for x in leaves] == [i in trained for i in range(3)]
        return [x.grad for x in leaves if x.grad is not None]

    assert_equal(grads(low_rank), [x.double() for x in grads(low_rank_plain)])


def mix7_inputs(B: int, T: int, H: int, N: int) -> list[Tensor]:
    C = H * N
    sequences = [normal(B, T, C, seed=i) for i in range(4)] + [torch.sigmoid(normal(B, T, C)), normal(B, T, C, seed=5)]
    vectors = [normal(1, 1, C), 1 + 0.1 * normal(1, 1, C, seed=1), normal(H, N), normal(C), normal(C, seed=1)]
    return [*sequences, *vectors, normal(B, H, N, N)]


@pytest.mark.parametrize(("B", "T", "H", "N"), [(1, 1, 1, 4), (2, 16, 2, 32), (2, 33, 3, 64)])
def test_mix7(B: int, T: int, H: int, N: int) -> None:
    inputs = mix7_inputs(B, T, H, N)
    want = with_gradients(mix7_plain, inputs, torch.float64)
    assert_equal(with_gradients(mix7, inputs, torch.float32), want)


def test_a_back_end_that_cannot_serve_gives_way_to_the_plain_one(caplog: pytest.LogCaptureFixture) -> None:
    x, before, mix = normal(1, 3, 7), normal(1, 7), normal(7)
    torch.testing.assert_close(
        token_shift(x, before, mix, kernel="native"), token_shift(x, before, mix, kernel="reference")
    )
    op = Op("shift", TOKEN_SHIFT.backends)  # that has reported nothing yet
    with caplog.at_level(logging.INFO, logger="rookery.ops"):
        for _again in range(2):
            assert op.choose(Call.of(x, before, mix), "native", instead="plain").name == "plain"
    assert caplog.messages == ["shift uses plain (native: its loops take float32 or bfloat16, not float64)"]
    with pytest.raises(ValueError, match="cannot serve this call: its loops take float32 or bfloat16, not float64"):
        op.choose(Call.of(x, before, mix), "native")


def test_mix7_without_an_initial_state() -> None:
    *inputs, state = mix7_inputs(2, 9, 2, 16)
    got = with_gradients(lambda *x: mix7(*x, None), inputs, torch.float32)
    assert_equal(got, with_gradients(lambda *x: mix7_plain(*x, torch.zeros_like(state)), inputs, torch.float64))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    inputs = mix7_inputs(3, 20, 2, 32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = with_gradients(mix7, inputs, torch.float32)
        torch.set_num_threads(3)
        shared = with_gradients(mix7, inputs, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
