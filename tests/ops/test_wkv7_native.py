"""What the compiled loops of RWKV-7 promise beyond the right numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rookery.ops import wkv7
from rookery.ops.native import CACHED

T, H, N = 300, 12, 64


def gradients(inputs: list[Tensor], state: Tensor, dy: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (*inputs, state)]
    y, final = wkv7(*leaves, backend="native")
    return list(torch.autograd.grad([y, final], leaves, [dy, torch.ones_like(final)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_past_the_caches_and_of_several_threads_are_the_same_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    *inputs, dy = (torch.randn(2, T, H, N, generator=generator).mul(0.3).to(dtype) for _ in range(7))
    state = torch.randn(2, H, N, N, generator=generator)
    assert 6 * dy.nbytes > CACHED > 6 * dy[:1, :, :1].nbytes
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = gradients(inputs, state, dy)
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(gradients(inputs, state, dy), want, strict=True))
    finally:
        torch.set_num_threads(threads)
    for i, h in ((0, 0), (1, 7)):
        got = gradients(
            [x[i : i + 1, :, h : h + 1] for x in inputs], state[i : i + 1, h : h + 1], dy[i : i + 1, :, h : h + 1]
        )
        for a, b in zip(got[:-1], want[:-1], strict=True):
            assert torch.equal(a[0, :, 0], b[i, :, h])
        assert torch.equal(got[-1][0, 0], want[-1][i, h])


def test_decays_of_both_extremes_cost_no_accuracy() -> None:
    """A chunk's product of decays falls to 6e-5 where all are the strongest; beside them some all but vanish."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    kappa = torch.nn.functional.normalize(normal(1, 64, 2, N), dim=-1)
    w = torch.where(normal(1, 64, 2, N) > 0, 12.0, -6.0)
    w[..., : N // 2] = 12.0
    inputs = [normal(1, 64, 2, N), w, normal(1, 64, 2, N), normal(1, 64, 2, N), -kappa, kappa * 0.7]
    state, dy = normal(1, 2, N, N), normal(1, 64, 2, N)
    got = gradients(inputs, state, dy)
    leaves = [x.double().requires_grad_() for x in (*inputs, state)]
    y, final = wkv7(*leaves, backend="reference")
    want = torch.autograd.grad([y, final], leaves, [dy.double(), torch.ones_like(final)])
    for a, b in zip(got, want, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 1e-6
