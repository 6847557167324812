"""AdamW that keeps less: its moments in 8 bits, and bf16 weights without fp32 masters.

**Moments.** As in bitsandbytes' AdamW8bit (arXiv:2110.02861), 256 neighbouring elements share a scale, their largest
magnitude, and each is a code of one byte. Here the codes are a geometric series, 7.5 % from one to the next, over four
decades of the first moment and eight of the second: under the second's there is no zero, by which an update would be
divided (RWKV's epsilon is 1e-18). And codes are rounded up or down by chance: rounding to the nearest would hold on to
old second moments, whose decay of 1 % a step is less than half of a code's distance to the next.

**Weights.** A bf16 weight keeps 8 bits, and most updates are smaller than half of the last one. Rounding up or down by
chance, with the probabilities that keep the mean, lets them add up.

The chance is a hash of the tensor's name, the element and the step: every rank that holds a parameter makes the same
update, and a run that goes on makes those of one that never stopped.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256
"""Elements that share a scale."""

SMALLEST = 4096
"""Elements below which a parameter's moments stay in fp32, as in bitsandbytes; so do those of all vectors."""

AT_A_TIME = {"cpu": 1 << 18, "cuda": 1 << 22}
"""Elements that are updated together: what is made for them in fp32 is small beside the parameter, or in the cache."""

DECADES_FIRST, DECADES_SECOND = 4, 8


def _series(codes: int, decades: int) -> Tensor:
    """A geometric series up to 1, fp32."""
    return (10 ** (-decades * torch.arange(codes, dtype=torch.float64).flip(0) / (codes - 1))).float()


class Moment8:
    """A tensor in codes of 8 bits: the first moment (signed) or the second (positive)."""

    dtype = torch.float32
    """Of what is read from it."""

    def __init__(self, shape: torch.Size, device: torch.device, *, signed: bool) -> None:
        """Zeros of `shape`."""
        self.shape = shape
        self.signed = signed
        blocks = -(-shape.numel() // BLOCK)
        self.scales = torch.zeros(blocks, 1, device=device)
        self.codes = torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=device)
        series = _series(127, DECADES_FIRST) if signed else _series(256, DECADES_SECOND)
        self.magnitudes = torch.cat([torch.zeros(1), series] if signed else [series]).to(device)
        """By code, over the scale; negative elements have the codes from 128 on."""
        self.gaps = torch.cat([self.magnitudes.diff(), self.magnitudes.new_zeros(1)])
        """To the next one."""
        self.values = torch.cat([self.magnitudes, -self.magnitudes]) if signed else self.magnitudes
        self.per_octave = (len(series) - 1) / ((DECADES_FIRST if signed else DECADES_SECOND) * math.log2(10))

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `start` (a multiple of `BLOCK`) to `stop` of the flattened tensor, fp32."""
        stop = self.numel() if stop is None else stop
        rows = slice(start // BLOCK, -(-stop // BLOCK))
        values = self.values.index_select(0, self.codes[rows].view(-1).int())
        return (values.view(-1, BLOCK) * self.scales[rows]).view(-1)[: stop - start]

    def write(self, elements: Tensor, noise: Tensor | float, start: int = 0, leave: Tensor | None = None) -> None:
        """Puts `elements`, 1-dim fp32, from `start` on.

        Args:
            noise: from 0 to 1, for each element: 0.5 rounds to the nearest code, evenly spread values by chance.
            leave: 0-dim bool; where it is true, nothing changes.
        """
        padding = -len(elements) % BLOCK
        blocks = F.pad(elements, (0, padding)).view(-1, BLOCK)
        size = blocks.abs()
        scales = size.amax(1, keepdim=True)
        size /= torch.where(scales == 0, 1, scales)
        top = len(self.magnitudes) - 1
        # What lies below the series becomes its first code; what is not finite, some code that `leave` lets nobody use.
        below = size.log2().mul_(self.per_octave).add_(top).floor_().int().clamp_(0, top).view(-1)
        room = size.view(-1).sub_(self.magnitudes.index_select(0, below))
        if isinstance(noise, Tensor):
            noise = F.pad(noise, (0, padding))
        codes = below + (self.gaps.index_select(0, below).mul_(noise) < room)
        if self.signed:
            codes += blocks.view(-1).signbit().int() << 7
        codes = codes.to(torch.uint8).view(-1, BLOCK)
        rows = slice(start // BLOCK, start // BLOCK + len(blocks))
        if leave is not None:
            codes, scales = torch.where(leave, self.codes[rows], codes), torch.where(leave, self.scales[rows], scales)
        self.codes[rows], self.scales[rows] = codes, scales

    def whole(self) -> Tensor:
        """The tensor in fp32. Written back with noise 0.5, it gives the same codes and scales."""
        return self.read().view(self.shape)


def dense(moment: Tensor | Moment8) -> Tensor:
    """The tensor, out of its codes."""
    return moment.whole() if isinstance(moment, Moment8) else moment


def restored(optimizer: Any, p: Tensor, key: str, saved: Tensor) -> Tensor | Moment8:
    """A moment of `p` as `optimizer` keeps it, from one that `dense` gave."""
    if not isinstance(optimizer, LeanAdamW):
        return saved.to(p.dtype)
    moment = optimizer.new_moment(p, key)
    if isinstance(moment, Moment8):
        moment.write(saved.reshape(-1).float(), 0.5)
        return moment
    return moment.copy_(saved)


class LeanAdamW(torch.optim.Optimizer):
    """AdamW with the formula, the state's names and the attributes `grad_scale` and `found_inf` of PyTorch's fused one.

    Every group has `names`, those of its parameters. Parameters in bf16 are rounded by chance.
    """

    grad_scale: Tensor | None = None
    """0-dim: what gradients were multiplied by."""
    found_inf: Tensor | None = None
    """0-dim: if it is not 0, the step changes nothing."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float, eight_bit: bool
    ) -> None:
        """
        Args:
            groups: as of PyTorch's optimisers, with contiguous parameters in fp32 or bf16.
            eight_bit: whether the moments of large matrices are kept in 8 bits; else all are fp32.
        """
        self.eight_bit = eight_bit
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def new_moment(self, p: Tensor, key: str) -> Tensor | Moment8:
        """Zeros for the moment `key`, "exp_avg" or "exp_avg_sq", of a parameter."""
        if self.eight_bit and p.numel() >= SMALLEST and p.squeeze().dim() >= 2:
            return Moment8(p.shape, p.device, signed=key == "exp_avg")
        return torch.zeros_like(p, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                if p.grad is not None:
                    self._update(name, p, group)

    def _update(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state |= {key: self.new_moment(p, key) for key in ("exp_avg", "exp_avg_sq")}
        leave = torch.zeros((), dtype=torch.bool, device=p.device) if self.found_inf is None else self.found_inf != 0
        state["step"] += ~leave
        number = state["step"].to(torch.int32)
        (beta1, beta2), eps, lr = group["betas"], group["eps"], group["lr"]
        correction1, correction2 = 1 - beta1 ** state["step"], (1 - beta2 ** state["step"]).sqrt()
        weights, gradients = p.view(-1), p.grad.view(-1)  # type: ignore[union-attr]
        size = AT_A_TIME["cpu" if p.device.type == "cpu" else "cuda"]
        for start in range(0, p.numel(), size):
            part = slice(start, min(start + size, p.numel()))
            gradient = gradients[part].float()
            if self.grad_scale is not None:
                gradient = gradient / self.grad_scale
            first = _read(state["exp_avg"], part).lerp(gradient, 1 - beta1)
            second = _read(state["exp_avg_sq"], part).mul(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            change = first / (second.sqrt() / correction2 + eps) * (lr / correction1)
            new = weights[part].float() * (1 - lr * group["weight_decay"]) - change
            noise = _hash(name, start, part.stop - start, number)
            if p.dtype == torch.bfloat16:
                new = _rounded_by_chance(new, noise)
            weights[part] = torch.where(leave, weights[part], new)
            _write(state["exp_avg"], part, first, leave, noise >> 16)
            _write(state["exp_avg_sq"], part, second, leave, noise >> 24)


def _read(moment: Tensor | Moment8, part: slice) -> Tensor:
    return moment.view(-1)[part] if isinstance(moment, Tensor) else moment.read(part.start, part.stop)


def _write(moment: Tensor | Moment8, part: slice, elements: Tensor, leave: Tensor, noise: Tensor) -> None:
    """`noise`: int32, whose lowest 8 bits count."""
    if isinstance(moment, Tensor):
        moment.view(-1)[part] = torch.where(leave, moment.view(-1)[part], elements)
    else:
        moment.write(elements, ((noise & 255) + 0.5) / 256, part.start, leave)


def _rounded_by_chance(weights: Tensor, noise: Tensor) -> Tensor:
    """fp32 `weights` in bf16, up with the probability that keeps the mean: noise in the bits that are cut off carries
    into those that stay. The lowest 16 bits of `noise`, int32, count."""
    bits = (weights.view(torch.int32) + (noise & 0xFFFF)) >> 16
    return bits.to(torch.int16).view(torch.bfloat16)


def _hash(name: str, start: int, count: int, step: Tensor) -> Tensor:
    """32 evenly spread bits, int32, for each of `count` elements from `start` on, others in each step (0-dim int32).

    The mixing is lowbias32 of Chris Wellons' hash prospector.
    """
    seed = _signed(zlib.crc32(name.encode()) + start * 0x9E3779B1)
    x = torch.arange(count, dtype=torch.int32, device=step.device).mul_(_signed(0x9E3779B1)).add_(seed)
    x.add_(step * _signed(0x85EBCA77))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x.bitwise_xor_((x >> shift) & ((1 << 32 - shift) - 1)).mul_(_signed(factor))
    return x


def _signed(number: int) -> int:
    """The lowest 32 bits as int32."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
