"""flash-linear-attention as a back-end: where it serves it is compared with the reference; elsewhere it says why not.

What surrounds its kernels (logarithms of decays, transposed states, borders of packed sequences) is tested everywhere,
around stand-ins for its two functions that follow its documentation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from interpreted import relative_error
from torch import Tensor

from rookery.ops import fla, wkv5, wkv6, wkv7
from rookery.ops.backend import Call
from rookery.ops.packed import Packing

OPS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"wkv5": wkv5, "wkv6": wkv6, "wkv7": wkv7}
HERE = Call("cuda", torch.bfloat16, head_size=64)


def inputs_of(name: str, B: int, T: int, states: int, N: int) -> list[Tensor]:
    """Inputs in fp64 and, last, the initial states."""
    H = 2
    generator = torch.Generator().manual_seed(T)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    tokens, state = (B, T, H, N), normal(states, H, N, N)
    r, k, v = normal(*tokens), normal(*tokens) / 2, normal(*tokens)
    if name == "wkv7":
        kappa = torch.nn.functional.normalize(normal(*tokens), dim=-1)
        return [r, 2 * normal(*tokens), k, v, -kappa, kappa * normal(*tokens).sigmoid(), state]
    return [r, normal(*((H, N) if name == "wkv5" else tokens)) - 2, k, v, normal(H, N), state]


def results(run: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor]) -> list[Tensor]:
    """Output, final state, and the gradients of a function of both."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y, state = run(*leaves)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in (y, state)]
    loss = sum((x * weight).double().sum() for x, weight in zip((y, state), weights, strict=True))
    return [y.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", list(OPS))
def test_equals_the_reference(name: str, packed: bool) -> None:
    if reason := fla.refuses(HERE):
        pytest.skip(reason)
    lengths = torch.tensor([30, 100, 10])
    packing = Packing.of(lengths, torch.device("cuda")) if packed else None
    inputs = inputs_of(name, *((1, 140, 3) if packed else (2, 100, 2)), 64)
    given = [*(x.cuda().bfloat16() for x in inputs[:-1]), inputs[-1].cuda().float()]
    got = results(lambda *x: OPS[name](*x, backend="fla", packing=packing), given)
    exact = results(lambda *x: OPS[name](*x, backend="reference", packing=packing), [x.double() for x in given])
    errors = [relative_error(g.double(), e) for g, e in zip(got, exact, strict=True)]
    assert max(errors) < 2e-2, errors


def test_says_why_it_cannot_serve() -> None:
    inputs = inputs_of("wkv7", 1, 2, 1, 8)
    with pytest.raises(ValueError, match="wkv7: back-end 'fla' cannot serve this call: runs on a GPU, not on cpu"):
        wkv7(*inputs, backend="fla")
    assert "not for float32" in (fla.refuses(Call("cuda", torch.float32, head_size=64)) or "") or not installed()
    assert installed() or "pip install flash-linear-attention" in (fla.refuses(HERE) or "")


def installed() -> bool:
    return fla.refuses(HERE) is None


def by_segments(step: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function with fla's arguments from one that reads one token with states [key, value]."""

    def run(
        *, initial_state: Tensor | None, output_final_state: bool, scale: float, cu_seqlens: Tensor | None = None,
        **inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert output_final_state
        assert scale == 1
        r = inputs["r"]
        B, T, H, N = r.shape
        rows = [(b, 0, T) for b in range(B)]
        if cu_seqlens is not None:
            rows = [(0, *pair) for pair in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
        outputs, finals = [], []
        for i, (b, first, last) in enumerate(rows):
            S = r.new_zeros(H, N, N, dtype=torch.float32) if initial_state is None else initial_state[i]
            for t in range(first, last):
                of_token = {name: x if name == "u" else x[b, t] for name, x in inputs.items()}
                y, S = step(S, **of_token)
                outputs.append(y)
            finals.append(S)
        return torch.stack(outputs).view_as(r).to(r.dtype), torch.stack(finals)

    return run


def token7(S: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    removed = torch.einsum("hk,hkv->hv", a, S)
    S = w.exp()[..., None] * S + b[..., None] * removed[:, None] + k[..., None] * v[:, None]
    return torch.einsum("hk,hkv->hv", r, S), S


def token6(S: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    own = k[..., None] * v[:, None]
    return torch.einsum("hk,hkv->hv", r, S + u[..., None] * own), w.exp()[..., None] * S + own


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", list(OPS))
def test_conventions(name: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, function, step in (("rwkv7", "chunk_rwkv7", token7), ("rwkv6", "chunk_rwkv6", token6)):
        stand_in = ModuleType(module)
        setattr(stand_in, function, by_segments(step))
        for parent in ("fla", "fla.ops"):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, f"fla.ops.{module}", stand_in)
    packing = Packing.of(torch.tensor([2, 5, 1]), torch.device("cpu")) if packed else None
    inputs = [x.float() for x in inputs_of(name, *((1, 8, 3) if packed else (2, 4, 2)), 4)]
    run = {"wkv7": fla.wkv7_fla, "wkv6": fla.wkv6_fla, "wkv5": _wkv5_fla}[name]
    got = results(lambda *x: run(*x, packing), inputs)
    want = results(lambda *x: OPS[name](*x, backend="reference", packing=packing), inputs)
    for g, e in zip(got, want, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)


def _wkv5_fla(r: Tensor, w: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    return fla.wkv6_fla(r, w[None, None], *others)
