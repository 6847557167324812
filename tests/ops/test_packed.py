"""Sequences packed in one row: every op gives for each of them what it gives for it alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interpreted import DEVICE, INTERPRETED, kernels, relative_error, run_interpreted
from torch import Tensor

from rookery.ops import mix7, token_shift, wkv5, wkv6, wkv6_triton, wkv7, wkv7_triton
from rookery.ops.packed import KEEP, Packing, last, pack, previous

LENGTHS = [7, 1, 40, 16, 3, 33, 2]
SHORT = [5, 1, 18, 4]
"""For kernels that are interpreted."""
H, N = 2, 8
C = H * N

lengths_of_sequences = st.lists(st.integers(1, 40), min_size=1, max_size=6).filter(lambda x: len(set(x)) > 1)


def packing_of(lengths: list[int], device: str = "cpu") -> Packing:
    return Packing.of(torch.tensor(lengths), torch.device(device))


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size)), dtype=torch.float64)


def inputs_for(name: str, lengths: list[int]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Inputs (1, T, ...) of an op, its parameters, and initial states of the sequences."""
    T = sum(lengths)
    tokens = (1, T, C) if name in ("mix7", "token_shift") else (1, T, H, N)
    x = [normal(*tokens, seed=i) for i in range(6)]
    state = normal(len(lengths), H, N, N)
    if name == "token_shift":
        return x[:1], [normal(1, 1, C, seed=i) for i in range(3)], normal(len(lengths), C)
    if name == "wkv5":
        return [x[0], x[2], x[3]], [normal(H, N), normal(H, N, seed=1)], state
    if name == "wkv6":
        return x[:4], [normal(H, N)], state
    if name == "wkv7":
        kappa = torch.nn.functional.normalize(x[4], dim=-1)
        return [*x[:4], -kappa, kappa * x[5].sigmoid()], [], state
    vectors = [normal(1, 1, C), normal(1, 1, C, seed=1), normal(H, N), normal(C), normal(C, seed=1)]
    return [*x[:4], x[4].sigmoid(), x[5]], vectors, state


def call(
    name: str, backend: str, x: list[Tensor], p: list[Tensor], state: Tensor, packing: Packing | None
) -> list[Tensor]:
    if name == "token_shift":
        return list(token_shift(x[0], state, *p, packing=packing))
    if name == "wkv5":
        return list(wkv5(x[0], p[0], x[1], x[2], p[1], state, backend=backend, packing=packing))
    if name == "mix7":
        return list(mix7(*x, *p, state, kernel=backend, packing=packing))
    op = {"wkv6": wkv6, "wkv7": wkv7}[name]
    return list(op(*x, *p, state, backend=backend, packing=packing))


def alone(name: str, backend: str, lengths: list[int], x: list[Tensor], p: list[Tensor], state: Tensor) -> list[Tensor]:
    """The same as `call` with a packing, one sequence after another."""
    pieces = zip(*(tensor.split(lengths, dim=1) for tensor in x), state.split(1), strict=True)
    results = [call(name, backend, list(piece), p, start, None) for *piece, start in pieces]
    if name == "token_shift":
        return [torch.cat(parts, dim=1) for parts in zip(*results, strict=True)]
    outputs, finals = zip(*results, strict=True)
    return [torch.cat(outputs, dim=1), torch.cat(finals)]


def with_gradients(function: Callable[..., list[Tensor]], *tensors: list[Tensor] | Tensor) -> list[Tensor]:
    """Results, and gradients for every tensor of a function of all results."""
    groups = [group if isinstance(group, list) else [group] for group in tensors]
    leaves = [[x.detach().requires_grad_() for x in group] for group in groups]
    results = function(leaves[0], leaves[1], leaves[2][0])
    loss = sum((y.double() * normal(*y.shape, seed=9)).sum() for y in results)
    assert isinstance(loss, Tensor)
    return [*(y.detach() for y in results), *torch.autograd.grad(loss, [x for group in leaves for x in group])]


def errors(name: str, backend: str, lengths: list[int], dtype: torch.dtype) -> list[float]:
    """Largest differences between packed and alone, relative to the largest element or 1."""
    x, p, state = inputs_for(name, lengths)
    x, p, state = [t.to(dtype) for t in x], [t.to(dtype) for t in p], state.to(dtype)
    packing = packing_of(lengths)
    got = with_gradients(lambda x, p, state: call(name, backend, x, p, state, packing), x, p, state)
    want = with_gradients(lambda x, p, state: alone(name, backend, lengths, x, p, state), x, p, state)
    assert [g.shape for g in got] == [w.shape for w in want]
    return [float((g - w).abs().max()) / max(1.0, float(w.abs().max())) for g, w in zip(got, want, strict=True)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
@pytest.mark.parametrize("name", ["wkv5", "wkv6", "wkv7", "mix7", "token_shift"])
def test_packed_sequences_give_what_each_gives_alone(
    name: str, backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    assert max(errors(name, backend, LENGTHS, dtype)) < tolerance


@settings(max_examples=15, deadline=None)
@given(lengths=lengths_of_sequences)
@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize("name", ["wkv5", "wkv6", "wkv7"])
def test_any_lengths(name: str, backend: str, lengths: list[int]) -> None:
    assert max(errors(name, backend, lengths, torch.float64)) < 1e-13


@given(lengths=lengths_of_sequences)
@example(lengths=[40] + [14] * 10)
def test_groups_hold_every_token_once_and_less_than_as_much_padding(lengths: list[int]) -> None:
    """In each group, so in all."""
    packing = packing_of(lengths)
    tokens = torch.arange(1.0, sum(lengths) + 1)[None, :, None]
    seen: list[Tensor] = []

    def double(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        assert x.shape[0] == state.shape[0]
        seen.append(x)
        assert 2 * int((x > 0).sum()) > x.numel()
        assert torch.equal(x[:, 0, 0], state), "each sequence should come with its own state"
        return 2 * x, x.sum(dim=(1, 2))

    doubled, sums = packing.in_groups(double, [tokens], [0], tokens[0, packing.first, 0])
    assert torch.equal(doubled, 2 * tokens)
    assert torch.equal(sums, torch.stack([x.sum() for x in tokens.split(lengths, dim=1)]))
    assert sorted(x for group in seen for x in group.flatten().tolist() if x) == tokens.flatten().tolist()


def test_equal_lengths_are_plain_rows() -> None:
    tokens = torch.arange(24).view(2, 12)
    rows, packing = pack(tokens, torch.tensor([4] * 6))
    assert packing is None
    assert torch.equal(rows, tokens.view(6, 4))
    rows, packing = pack(tokens, torch.tensor([12, 12]))
    assert packing is None
    assert rows.data_ptr() == tokens.data_ptr()


@pytest.mark.parametrize("lengths", [[5, 4], [5, 6], [0, 10], [11, -1]])
def test_lengths_that_are_not_those_of_the_tokens_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"do not make up \(2, 5\) tokens"):
        pack(torch.zeros(2, 5, dtype=torch.int64), torch.tensor(lengths))


def test_the_token_before_and_the_last_token() -> None:
    packing = packing_of([2, 1, 3])
    x = torch.arange(6.0).view(1, 6, 1)
    before = torch.tensor([[10.0], [20.0], [30.0]])
    assert previous(x, before, packing).flatten().tolist() == [10, 0, 20, 30, 3, 4]
    assert last(x, packing).flatten().tolist() == [1, 2, 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
@pytest.mark.parametrize("name", ["wkv6", "wkv7"])
def test_a_padded_token_leaves_the_state_exactly_as_it_is(name: str, backend: str, dtype: torch.dtype) -> None:
    x, p, state = inputs_for(name, [5])
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    padding = [torch.full_like(t, KEEP if i == 1 else 0.0).to(dtype) for i, t in enumerate(x)]
    _, final = call(name, backend, padding, [t.to(dtype) for t in p], state.to(exact), None)
    assert torch.equal(final, state.to(exact))


def triton_case(
    name: str, dtype: torch.dtype
) -> tuple[Callable[..., tuple[Tensor, Tensor]], list[Tensor], list[float]]:
    """The recurrence, inputs and padding of a small case with a head size that the kernels know, on the device."""
    x = [normal(1, sum(SHORT), H, 16, seed=i).to(dtype).to(DEVICE) for i in range(6)]
    if name == "wkv7":
        kappa = torch.nn.functional.normalize(x[4], dim=-1)
        return wkv7_triton.wkv7_triton, [*x[:4], -kappa, kappa * x[5].sigmoid()], [0, KEEP, 0, 0, 0, 0]
    u = normal(H, 16).to(dtype).to(DEVICE)
    return lambda r, w, k, v, state: wkv6_triton.wkv6_triton(r, w, k, v, u, state), x[:4], [0, KEEP, 0, 0]


@kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", ["wkv6", "wkv7"])
def test_triton(name: str, dtype: torch.dtype, tolerance: float) -> None:
    pytest.importorskip("triton", reason="Triton exists for Linux on x86-64 only")
    recurrence, x, padding = triton_case(name, dtype)
    state = normal(len(SHORT), H, 16, 16).float().to(DEVICE)
    packing = packing_of(SHORT, DEVICE)

    def packed(x: list[Tensor], _p: list[Tensor], state: Tensor) -> list[Tensor]:
        return list(packing.in_groups(recurrence, x, padding, state))

    def each(x: list[Tensor], _p: list[Tensor], state: Tensor) -> list[Tensor]:
        pieces = zip(*(t.split(SHORT, dim=1) for t in x), state.split(1), strict=True)
        outputs, finals = zip(*(recurrence(*piece) for piece in pieces), strict=True)
        return [torch.cat(outputs, dim=1), torch.cat(finals)]

    pairs = zip(with_gradients(packed, x, [], state), with_gradients(each, x, [], state), strict=True)
    found = [relative_error(got.double(), want.double()) for got, want in pairs]
    assert max(found) < tolerance, found


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the test runs here as it is")
def test_triton_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton exists for Linux on x86-64 only")
    run_interpreted(f"{__file__}::test_triton")
