"""What a model costs by its shapes alone, and what the machine could do at most."""

from __future__ import annotations

import re
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from rookery.bench.timing import wait
from rookery.models import Model
from rookery.ops.linear import Linear, linear

LOW_RANK = re.compile(r"blocks\.\d+\.att\.([wavg][12]|time_(maa|decay)_w[12])")
"""Matrices that are no modules: those of low rank."""

UNREAD = re.compile(r"blocks\.0\.att\.v[12]")
"""Matrices that a file holds and no token meets."""

LARGE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices by which the peak is measured."""

FORMULAS = {
    "mfu": "FLOP a token x tokens a second / peak FLOP a second, by the same clock",
    "training FLOP a token": "6 x the sum of in x out of all matrices that a token is multiplied with (2 forward, 4 "
    "backward); no embedding, no recurrence, nothing that grad_cp computes again",
    "inference FLOP a token": "2 x the same sum",
    "matrix products alone": "those of a step, 3 a matrix, by PyTorch (in fp32 on a CPU by oneDNN), of the head only "
    "where targets are trained",
    "peak": "the fastest of several products of two square matrices of the same precision on this device, measured in "
    "the same run, unless it was given",
}


def products_of(model: Model) -> list[tuple[str, int, int]]:
    """Name, outputs and inputs of all matrices that every token is multiplied with."""
    found = [(name, *m.weight.shape) for name, m in model.named_modules() if isinstance(m, Linear)]
    for name, p in model.named_parameters():
        if LOW_RANK.fullmatch(name) and not UNREAD.fullmatch(name):
            into, out = p.shape[-2:]
            found += [(name, out, into)] * (p.numel() // (into * out))  # x060 has five in one
    return found


def multiplications(model: Model) -> int:
    """The sum of in x out of those matrices."""
    return sum(out * into for _name, out, into in products_of(model))


def fastest(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T by what PyTorch has: in fp32 on a CPU oneDNN, which is no slower than its default there."""
    if x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


@torch.no_grad()
def peak(device: str, dtype: torch.dtype, given: float = 0.0, rounds: int = 5) -> dict[str, float]:
    """FLOP a second, by each clock: the most that was seen, or what was given."""
    if given:
        return {"wall": given, "cpu": given}
    size = LARGE[device]
    x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    linear(x, weight)
    found = {"wall": 0.0, "cpu": 0.0}
    for _round in range(rounds):
        wait(device)
        wall, cpu = time.perf_counter(), time.process_time()
        linear(x, weight)
        wait(device)
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        found = {clock: max(found[clock], 2 * size**3 / seconds) for clock, seconds in spent.items() if seconds}
    return found
