"""The recurrences of all generations: each back-end against the plain reference, that against its formula."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rookery.ops import wkv5, wkv6, wkv7

OPS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"wkv5": wkv5, "wkv6": wkv6, "wkv7": wkv7}
ops = pytest.mark.parametrize("name", list(OPS))
backends = pytest.mark.parametrize("backend", ["chunked", "native"])


def inputs_for(name: str, B: int, T: int, H: int, N: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Inputs of an op and, last, an initial state. Decays span everything from none to all but 0."""
    generator = torch.Generator().manual_seed(T)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    r, k, v = (normal(B, T, H, N) for _ in range(3))
    state = normal(B, H, N, N)
    if name == "wkv7":
        kappa = torch.nn.functional.normalize(normal(B, T, H, N), dim=-1)
        inputs = [r, 3 * normal(B, T, H, N), k, v, -kappa, kappa * torch.sigmoid(normal(B, T, H, N)), state]
    else:
        w = normal(H, N) if name == "wkv5" else normal(B, T, H, N)
        inputs = [r, 4 * w - 1, k, v, normal(H, N), state]
    return [x.to(dtype).requires_grad_() for x in inputs]


def results(name: str, inputs: list[Tensor], backend: str, *, with_state: bool = True) -> list[Tensor]:
    """Output, final state, and the gradients of a function of both for every input."""
    used = inputs if with_state else inputs[:-1]
    y, state = OPS[name](*used, backend=backend)
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros((), dtype=torch.float64)
    for x in (y, state):
        loss = loss + (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
    return [y.detach(), state.detach(), *torch.autograd.grad(loss, used)]


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """Largest difference of each tensor, relative to its largest element, or to 1 if that is less."""
    return [
        float((g.double() - w.double()).abs().max()) / max(1.0, float(w.double().abs().max()))
        for g, w in zip(got, want, strict=True)
    ]


@pytest.mark.parametrize("with_state", [True, False], ids=["state", "zero state"])
@pytest.mark.parametrize("T", [1, 15, 16, 33, 80])
@backends
@ops
def test_backends_equal_the_reference(name: str, backend: str, T: int, with_state: bool) -> None:
    inputs = inputs_for(name, 2, T, 3, 16)
    want = results(name, inputs, "reference", with_state=with_state)
    got = results(name, inputs, backend, with_state=with_state)
    assert max(errors(got, want)) < 1e-12
    inputs32 = [x.detach().float().requires_grad_() for x in inputs]
    got32 = results(name, inputs32, backend, with_state=with_state)
    assert all(x.dtype == torch.float32 for x in got32)
    assert max(errors(got32, want)) < 1e-5


@pytest.mark.parametrize("N", [8, 64])
@backends
@ops
def test_head_sizes(name: str, backend: str, N: int) -> None:
    inputs = inputs_for(name, 1, 20, 2, N)
    assert max(errors(results(name, inputs, backend), results(name, inputs, "reference"))) < 1e-12


@ops
def test_the_reference_is_its_formula(name: str) -> None:
    """The recurrence in its plainest form, element by element."""
    inputs = [x.detach() for x in inputs_for(name, 1, 4, 1, 4)]
    y, final = OPS[name](*inputs, backend="reference")
    S = inputs[-1][0, 0].clone()
    for t in range(4):
        if name == "wkv7":
            r, w, k, v, a, b = (x[0, t, 0] for x in inputs[:-1])
            removed = S @ a
            for i in range(4):
                for j in range(4):
                    d = math.exp(-math.exp(-0.5) / (1 + math.exp(-w[j])))
                    S[i, j] = S[i, j] * d + removed[i] * b[j] + v[i] * k[j]
            want = S @ r
        else:
            r, k, v = (inputs[n][0, t, 0] for n in (0, 2, 3))
            w = inputs[1][0] if name == "wkv5" else inputs[1][0, t, 0]
            u = inputs[4][0]
            want = torch.zeros(4, dtype=torch.float64)
            for i in range(4):
                for j in range(4):
                    want[i] += r[j] * (S[i, j] + u[j] * k[j] * v[i])
                    S[i, j] = S[i, j] * math.exp(-math.exp(w[j])) + k[j] * v[i]
        torch.testing.assert_close(y[0, t, 0], want)
    torch.testing.assert_close(final[0, 0], S)


@ops
def test_gradients_of_the_reference(name: str) -> None:
    inputs = inputs_for(name, 1, 3, 1, 4)
    assert torch.autograd.gradcheck(lambda *xs: OPS[name](*xs, backend="reference"), inputs)


@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["wkv5", "wkv6"])
def test_extreme_decays_stay_finite(name: str, dtype: torch.dtype, backend: str) -> None:
    """exp(-exp(w)) is 0 from w = 5 on, and exp(w) itself overflows: neither may leave a NaN, or touch what follows."""
    inputs = [x.detach() for x in inputs_for(name, 1, 40, 1, 16, dtype)]
    w = inputs[1]
    w[..., ::3] = 6.0
    w[..., 1::3] = 1000.0
    w[..., 2::3] = -1000.0
    for x in inputs:
        x.requires_grad_()
    got = results(name, inputs, backend)
    assert all(x.isfinite().all() for x in got)
    want = results(name, [x.detach().double().requires_grad_() for x in inputs], "reference")
    # Beyond either end the decay no longer depends on w.
    dw, exact_dw = got.pop(3), want.pop(3)
    assert float(dw.abs().max()) < 1e-100
    assert float(exact_dw.abs().max()) < 1e-100
    assert max(errors(got, want)) < 1e-5
    last = inputs[3][:, -1, :, :, None] * inputs[2][:, -1, :, None, :]
    torch.testing.assert_close(got[1][..., ::3], last[..., ::3].detach())


@backends
def test_a_vanished_decay_costs_no_accuracy(backend: str) -> None:
    """Single tokens that wipe the state lie between tokens that keep it: what comes after is as exact as ever."""
    inputs = [x.detach() for x in inputs_for("wkv6", 1, 64, 2, 16)]
    inputs[1][:] = -4
    inputs[1][:, ::7] = 8
    for x in inputs:
        x.requires_grad_()
    want = results("wkv6", inputs, "reference")
    got = results("wkv6", [x.detach().float().requires_grad_() for x in inputs], backend)
    assert max(errors(got, want)) < 3e-6


@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
@ops
def test_bf16_rounds_only_inputs_and_outputs(name: str, backend: str) -> None:
    inputs = inputs_for(name, 1, 40, 2, 16, torch.bfloat16)
    got = results(name, inputs, backend)
    assert got[0].dtype == torch.bfloat16
    assert got[1].dtype == torch.float32
    assert all(g.dtype == x.dtype for g, x in zip(got[2:], inputs, strict=True))
    want = results(name, [x.detach().double().requires_grad_() for x in inputs], "reference")
    assert max(errors(got, want)) < 2**-7
    assert errors(got, want)[1] < 1e-5


@backends
@ops
def test_a_split_sequence_gives_the_same(name: str, backend: str) -> None:
    inputs = [x.detach() for x in inputs_for(name, 2, 50, 2, 16)]
    per_token = [x.dim() == 4 and x.shape[1] == 50 for x in inputs]
    y, final = OPS[name](*inputs, backend=backend)
    state = inputs[-1]
    parts = []
    for piece in ((0, 1), (1, 18), (18, 50)):
        cut = [x[:, slice(*piece)] if split else x for x, split in zip(inputs[:-1], per_token, strict=False)]
        part, state = OPS[name](*cut, state, backend=backend)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), y)
    torch.testing.assert_close(state, final)


@ops
def test_the_initial_state_is_not_changed(name: str) -> None:
    inputs = [x.detach() for x in inputs_for(name, 1, 5, 1, 8)]
    before = inputs[-1].clone()
    for backend in ("native", "chunked", "reference"):
        OPS[name](*inputs, backend=backend)
    assert torch.equal(inputs[-1], before)


@ops
def test_the_choice_of_a_backend(name: str, caplog: pytest.LogCaptureFixture) -> None:
    inputs = [x.detach() for x in inputs_for(name, 1, 2, 1, 6)]
    engine = "wkv7" if name == "wkv7" else "wkv6"
    with pytest.raises(ValueError, match=f"{engine}: back-end 'native' cannot serve this call: head size 6"):
        OPS[name](*inputs, backend="native")
    with pytest.raises(ValueError, match=r"no back-end 'cuda'; choose one of auto, .*native, chunked, reference"):
        OPS[name](*inputs, backend="cuda")
    with caplog.at_level(logging.INFO, logger="rookery.ops"):
        y, _ = OPS[name](*inputs)
    torch.testing.assert_close(y, OPS[name](*inputs, backend="reference")[0])
