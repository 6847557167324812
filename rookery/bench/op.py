"""Single operations, forward and with their backward pass: every back-end that serves the call, and peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rookery.bench.setting import Setting
from rookery.bench.timing import CLOCKS, alternate, faster, rounded, wait
from rookery.errors import UserError
from rookery.ops import gates7, head_loss, mix7, relu_square, token_shift, wkv5, wkv6, wkv7
from rookery.ops.backend import Call, Op
from rookery.ops.head_loss import head_loss_plain
from rookery.ops.linear import linear
from rookery.ops.mix7 import OP as MIX7
from rookery.ops.pointwise import GATES7, RELU_SQUARE, TOKEN_SHIFT
from rookery.ops.wkv6 import OP as WKV6
from rookery.ops.wkv7 import OP as WKV7

Function = Callable[..., Tensor | tuple[Tensor, ...]]
"""Of a case's tensors. It may give more than there are gradients for."""

RECURRENCES: dict[str, tuple[Function, Op]] = {"wkv7": (wkv7, WKV7), "wkv6": (wkv6, WKV6), "wkv5": (wkv5, WKV6)}

PLAIN = ("chunked", "reference")
"""Back-ends of the recurrences that are plain PyTorch."""

PEERS = ("fla",)
"""Back-ends of the recurrences that are another program's."""


@dataclass(frozen=True)
class Case:
    """An operation at one shape.

    Attributes:
        tensors: what it is called with, by name; gradients are taken for those of floats.
        shared: names of those that have no batch dimension.
        gradients: of what comes out, as far as it is measured.
        functions: what computes it, ours first.
        exact: computes it in fp64.
        unit: what seconds are multiplied with.
    """

    tensors: Mapping[str, Tensor]
    shared: Sequence[str]
    gradients: Sequence[Tensor]
    functions: Mapping[str, Function]
    exact: Function
    unit: float


def measure(setting: Setting, names: Sequence[str], against: Sequence[str] = ()) -> dict[str, Any]:
    """Times, errors and memory of operations at the shapes with which a model of these sizes calls them.

    Args:
        setting: sizes; `kernel` is "auto" for every fast back-end of a recurrence, or the name of the one to measure.
        names: some of `CASES`.
        against: peers that can run here; "torch" is plain PyTorch, of recurrences the chunked form and the one token
            by token.
    """
    return {
        "setting": setting.report(),
        "clocks": CLOCKS,
        "units": "microseconds for a head and token (wkv), milliseconds (all others)",
        "errors": "|got - exact| / |exact| of output and gradients for the first sequence; exact is fp64",
        "results": {name: _measure(CASES[name](setting, against), setting) for name in names},
    }


def _measure(case: Case, setting: Setting) -> dict[str, Any]:
    first = {name: x.detach() if name in case.shared else x.detach()[:1] for name, x in case.tensors.items()}
    gradients = [gradient[:1] if gradient.dim() else gradient for gradient in case.gradients]
    exact = _results(
        case.exact, {name: x.double() if x.is_floating_point() else x for name, x in first.items()}, gradients
    )
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    for label, function in case.functions.items():
        got = _results(function, first, gradients)
        rows[label] = {"errors": {name: _error(got[name], exact[name]) for name in exact}}
        if setting.device == "cuda":
            rows[label]["peak bytes"] = _peak(partial(_results, function, case.tensors, case.gradients))
        runs[f"{label}, forward"] = partial(_forward, function, case.tensors)
        runs[label] = partial(_results, function, case.tensors, case.gradients)
    times = alternate(runs, setting.rounds, setting.device)
    for label, row in rows.items():
        for passes, run in (("forward", f"{label}, forward"), ("forward and backward", label)):
            row[passes] = {
                clock: {which: rounded(case.unit * seconds) for which, seconds in spread.items()}
                for clock, spread in times[run].report(setting.device).items()
            }
    ours, *others = case.functions
    return {
        "shape": {name: list(tensor.shape) for name, tensor in case.tensors.items()},
        **rows,
        f"{ours} is faster by": {other: faster(times[other], times[ours], setting.device) for other in others},
    }


@torch.no_grad()
def _forward(function: Function, tensors: Mapping[str, Tensor]) -> None:
    function(*tensors.values())


def _results(function: Function, tensors: Mapping[str, Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """What comes out ("y", "y1" ..), and the gradient of each tensor of floats."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in tensors.items()}
    found = function(*leaves.values())
    ys = (found if isinstance(found, tuple) else (found,))[: len(gradients)]
    trained = {name: x for name, x in leaves.items() if x.requires_grad}
    upstream = [gradient.to(y.dtype) for y, gradient in zip(ys, gradients, strict=True)]
    grads = torch.autograd.grad(ys, list(trained.values()), upstream)
    outputs = {f"y{i or ''}": y.detach() for i, y in enumerate(ys)}
    return outputs | {f"d{name}": grad for name, grad in zip(trained, grads, strict=True)}


def _error(got: Tensor, exact: Tensor) -> float:
    return float(f"{float((got.double() - exact).norm() / exact.norm()):.1e}")


def _peak(run: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    wait("cuda")
    return torch.cuda.max_memory_allocated() - before


def _random(setting: Setting) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(setting.device, setting.dtype)

    return random


def _recurrence(setting: Setting, against: Sequence[str], *, name: str) -> Case:
    random = _random(setting)
    B, T, H, N = size = (setting.micro_bsz, setting.ctx_len, setting.shape.n_head, setting.head_size)
    if name == "wkv7":
        kappa = F.normalize(random(*size), dim=-1)
        tensors = {"r": random(*size), "w": random(*size, scale=2), "k": random(*size, scale=0.5), "v": random(*size)}
        tensors |= {"a": -kappa, "b": kappa * torch.sigmoid(random(*size))}
    else:
        w = random(H, N) if name == "wkv5" else random(*size)
        tensors = {"r": random(*size), "w": w - 2, "k": random(*size), "v": random(*size), "u": random(H, N)}
    tensors["state"] = torch.zeros(B, H, N, N, device=setting.device)

    function, op = RECURRENCES[name]
    call = Call(setting.device, setting.dtype, N)
    chosen = op.choose(call, setting.kernel).name
    if "fla" in against and (reason := dict(op.explain(call))["fla"]):
        raise UserError(f"--against fla: {reason}")
    able = [backend for backend, reason in op.explain(call) if reason is None and backend != chosen]
    fast = [backend for backend in able if backend not in (*PLAIN, *PEERS) and setting.kernel == "auto"]
    plain = [backend for backend in able if backend in PLAIN and "torch" in against]
    peers = [backend for backend in PEERS if backend in against]
    wanted = (chosen, *fast, *plain, *peers)
    functions: dict[str, Function] = {backend: partial(function, backend=backend) for backend in wanted}
    exact = partial(function, backend="chunked")
    shared = {"wkv5": ("w", "u"), "wkv6": ("u",), "wkv7": ()}[name]
    return Case(tensors, shared, [random(*size)], functions, exact, 1e6 / (B * T * H))


def _head(setting: Setting, against: Sequence[str]) -> Case:
    random = _random(setting)
    B, T, C, V = setting.micro_bsz, setting.ctx_len, setting.n_embd, setting.vocab_size
    targets = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0)).to(setting.device)
    tensors = {"x": random(B, T, C), "weight": random(V, C, scale=C**-0.5), "targets": targets}
    functions: dict[str, Function] = {"rookery": head_loss}
    if "torch" in against:
        functions["torch"] = head_loss_plain
    return Case(tensors, ("weight",), [torch.ones((), device=setting.device)], functions, head_loss_plain, 1e3)


def _linear(setting: Setting, against: Sequence[str]) -> Case:
    """The widest product of a block, channel mixing's key."""
    random = _random(setting)
    B, T, C, ffn = setting.micro_bsz, setting.ctx_len, setting.n_embd, setting.shape.dim_ffn
    tensors = {"x": random(B, T, C), "weight": random(ffn, C, scale=C**-0.5)}
    functions: dict[str, Function] = {"rookery": linear}
    if "torch" in against:
        functions["torch"] = F.linear
    return Case(tensors, ("weight",), [random(B, T, ffn)], functions, F.linear, 1e3)


def _step(setting: Setting, against: Sequence[str], *, name: str) -> Case:
    """One of the steps between the matrix products of a block of RWKV-7, by its back-end and in plain operations."""
    random = _random(setting)
    B, T, C, ffn = setting.micro_bsz, setting.ctx_len, setting.n_embd, setting.shape.dim_ffn
    H, N = setting.shape.n_head, setting.head_size
    of_tokens = {"relu_square": ("x",), "token_shift": ("x",), "gates7": ("w", "a", "v", "gate", "v_first")}
    of_tokens["mix7"] = ("r", "w", "k", "v", "a", "g")
    tensors = {key: random(B, T, ffn if name == "relu_square" else C) for key in of_tokens[name]}
    shared: tuple[str, ...] = {
        "relu_square": (),
        "token_shift": ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"),
        "gates7": ("w0", "a0", "v0"),
        "mix7": ("k_k", "k_a", "r_k", "ln_weight", "ln_bias"),
    }[name]
    if name == "token_shift":
        tensors["before"] = random(B, C)
    if name == "mix7":
        tensors["a"] = torch.sigmoid(tensors["a"])
    tensors |= {key: random(H, N) if key == "r_k" else random(C) for key in shared}
    function, op, outputs = STEPS[name]
    run = partial(function, state=None) if name == "mix7" else function
    chosen = op.choose(Call(setting.device, setting.dtype, N, frozenset({setting.dtype})), setting.kernel, "plain").name
    functions: dict[str, Function] = {chosen: partial(run, kernel="chunked" if chosen == "plain" else chosen)}
    if "torch" in against:
        functions["plain"] = partial(run, kernel="chunked")
    gradients = [random(*tensors[of_tokens[name][0]].shape) for _output in range(outputs)]
    return Case(tensors, shared, gradients, functions, partial(run, kernel="chunked"), 1e3)


STEPS: dict[str, tuple[Function, Op, int]] = {
    "mix7": (mix7, MIX7, 1),
    "token_shift": (token_shift, TOKEN_SHIFT, 6),
    "gates7": (gates7, GATES7, 3),
    "relu_square": (relu_square, RELU_SQUARE, 1),
}
"""The function, its back-ends, and how many outputs it has whose gradients are taken."""

CASES: dict[str, Callable[[Setting, Sequence[str]], Case]] = {
    **{name: partial(_recurrence, name=name) for name in RECURRENCES},
    "head": _head,
    "linear": _linear,
    **{name: partial(_step, name=name) for name in STEPS},
}
