"""Elementwise steps between the matrix products. Back-ends read each input once; the plain one is the formula in
PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rookery.ops import pointwise_native, pointwise_triton
from rookery.ops.backend import Backend, Call, Op, beside, never_refuses
from rookery.ops.packed import Packing, previous


def token_shift(
    x: Tensor, before: Tensor, *mixes: Tensor, kernel: str = "auto", packing: Packing | None = None
) -> tuple[Tensor, ...]:
    """For each mix m: x_t + m * (x_{t-1} - x_t).

    Args:
        x: (B, T, C).
        before: (B, C), what came before the first token.
        mixes: each with C elements.
        kernel: "auto" or a back-end of the recurrence; where it does not exist here or cannot serve, the plain one.
        packing: the S sequences in the one row of `x`; `before` is then (S, C).
    """
    chosen = TOKEN_SHIFT.choose(Call.of(x, before, *mixes), beside(kernel), instead="plain")
    return chosen.run(x, before, mixes, packing)


def relu_square(x: Tensor, *, kernel: str = "auto") -> Tensor:
    """max(x, 0)²; `kernel` as in `token_shift`."""
    return RELU_SQUARE.choose(Call.of(x), beside(kernel), instead="plain").run(x)


def gates7(
    w: Tensor, a: Tensor, v: Tensor, gate: Tensor | None, v_first: Tensor | None,
    w0: Tensor, a0: Tensor, v0: Tensor, *, kernel: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What RWKV-7's low-rank products become::

        w = w + w0                                   raw decay
        a = sigmoid(a + a0)                          in-context learning rate
        v = v + sigmoid(gate + v0) (v_first - v)     value, mixed with that of the first layer

    Args:
        w, a, v, gate, v_first: (B, T, C); without `gate` and `v_first`, as in the first layer, v stays as it is.
        w0, a0, v0: C elements.
        kernel: as in `token_shift`.
    """
    tensors = (w, a, v, gate, v_first, w0, a0, v0)
    return GATES7.choose(Call.of(*tensors), beside(kernel), instead="plain").run(*tensors)


def token_shift_plain(
    x: Tensor, before: Tensor, mixes: Sequence[Tensor], packing: Packing | None
) -> tuple[Tensor, ...]:
    """`token_shift` as separate operations."""
    difference = previous(x, before, packing) - x
    return tuple(torch.addcmul(x, difference, mix) for mix in mixes)


def relu_square_plain(x: Tensor) -> Tensor:
    """`relu_square` as separate operations."""
    return torch.relu(x).square()


def gates7_plain(
    w: Tensor, a: Tensor, v: Tensor, gate: Tensor | None, v_first: Tensor | None,
    w0: Tensor, a0: Tensor, v0: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`gates7` as separate operations."""
    if gate is not None and v_first is not None:
        v = torch.lerp(v, v_first, torch.sigmoid(v0 + gate))
    return w0 + w, torch.sigmoid(a0 + a), v


TOKEN_SHIFT = Op(
    "token_shift",
    [
        Backend("triton", pointwise_triton.refuses, pointwise_triton.token_shift, packs=True),
        Backend("native", pointwise_native.refuses, pointwise_native.token_shift, packs=True),
        Backend("plain", never_refuses, token_shift_plain, packs=True),
    ],
)

RELU_SQUARE = Op(
    "relu_square",
    [
        Backend("triton", pointwise_triton.refuses, pointwise_triton.relu_square),
        Backend("native", pointwise_native.refuses, pointwise_native.relu_square),
        Backend("plain", never_refuses, relu_square_plain),
    ],
)

GATES7 = Op(
    "gates7",
    [
        Backend("triton", pointwise_triton.refuses, pointwise_triton.gates7),
        Backend("native", pointwise_native.refuses, pointwise_native.gates7),
        Backend("plain", never_refuses, gates7_plain),
    ],
)
