"""RWKV-5.2 "Eagle" (x052). Names, shapes, formulas and initial values are those of RWKV-LM's RWKV-v5 trainer.

Architecture: arXiv:2404.05892. Shapes: B batch, T tokens, C width, H heads of N channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rookery.models.common import (
    ChannelMixing,
    LanguageModel,
    TimeMixing,
    matrix,
    orthogonal_,
    set_,
    vector,
)
from rookery.models.shape import ModelShape
from rookery.ops import relu_square, token_shift, wkv5
from rookery.ops.context import Before, through
from rookery.ops.linear import Linear
from rookery.ops.packed import Packing


class RWKV5(LanguageModel):
    """The language model."""

    version = "x052"

    def __init__(self, shape: ModelShape, *, kernel: str = "auto", dropout: float = 0.0) -> None:
        super().__init__(shape, TimeMix, ChannelMix, kernel=kernel, dropout=dropout)


class TimeMix(TimeMixing):
    """The recurrence with its gate: what a token takes from the tokens before it."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__(shape, layer)
        C, A, H, N = shape.n_embd, shape.dim_att, shape.n_head, shape.head_size
        self.time_mix_k, self.time_mix_v = vector(C), vector(C)
        self.time_mix_r, self.time_mix_g = vector(C), vector(C)
        self.time_decay = matrix(H, N)
        self.time_faaaa = matrix(H, N)
        self.receptance = Linear(C, A)
        self.key = Linear(C, A)
        self.value = Linear(C, A)
        self.gate = Linear(C, A)
        self.output = Linear(A, C)
        self.ln_x = nn.GroupNorm(H, A, eps=shape.group_norm_eps)

    def forward(
        self, x: Tensor, shift: Tensor, wkv: Before, kernel: str, *, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor]:
        B, T, _ = x.shape
        heads = (B, T, *self.time_faaaa.shape)
        # time_mix is the share of the token itself, not of the one before.
        mixes = (1 - self.time_mix_r, 1 - self.time_mix_k, 1 - self.time_mix_v, 1 - self.time_mix_g)
        xr, xk, xv, xg = token_shift(x, shift, *mixes, kernel=kernel, packing=packing)
        r, k, v = self.receptance(xr).view(heads), self.key(xk).view(heads), self.value(xv).view(heads)
        g = F.silu(self.gate(xg))
        y, wkv = through(
            wkv, lambda state: wkv5(r, self.time_decay, k, v, self.time_faaaa, state, backend=kernel, packing=packing)
        )
        y = self.ln_x(y.view(B * T, -1)).view(B, T, -1)
        return self.output(y * g), wkv

    def initialise(self, generator: torch.Generator) -> None:
        C, height, depth = self.time_mix_k.numel(), self.height(), self.depth()
        channel = torch.arange(C) / C
        set_(self.time_mix_k, channel**height)
        set_(self.time_mix_v, channel**height + 0.3 * depth)
        set_(self.time_mix_r, channel ** (0.5 * height))
        set_(self.time_mix_g, channel ** (0.5 * height))
        set_(self.time_decay, initial_decay(self.time_decay.numel(), depth))
        set_(self.time_faaaa, initial_bonus(self.time_faaaa.numel(), depth))

        orthogonal_(self.receptance.weight, 1.0, generator)
        orthogonal_(self.key.weight, 0.1, generator)
        orthogonal_(self.value.weight, 1.0, generator)
        orthogonal_(self.gate.weight, 0.1, generator)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.ln_x.weight, ((1 + self.layer) / self.n_layer) ** 0.7)
        nn.init.zeros_(self.ln_x.bias)


class ChannelMix(ChannelMixing):
    """The feed-forward half of a block, with squared ReLU and a gate."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__(shape, layer)
        C, F = shape.n_embd, shape.dim_ffn
        self.time_mix_k, self.time_mix_r = vector(C), vector(C)
        self.key = Linear(C, F)
        self.receptance = Linear(C, C)
        self.value = Linear(F, C)

    def forward(self, x: Tensor, shift: Tensor, kernel: str = "auto", *, packing: Packing | None = None) -> Tensor:
        xk, xr = token_shift(x, shift, 1 - self.time_mix_k, 1 - self.time_mix_r, kernel=kernel, packing=packing)
        return torch.sigmoid(self.receptance(xr)) * self.value(relu_square(self.key(xk), kernel=kernel))

    def initialise(self, generator: torch.Generator) -> None:
        C = self.time_mix_k.numel()
        for mix in (self.time_mix_k, self.time_mix_r):
            set_(mix, (torch.arange(C) / C) ** self.height())
        orthogonal_(self.key.weight, 1.0, generator)
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)


def initial_decay(channels: int, depth: float) -> Tensor:
    """`time_decay` of a new model: fast to slow over the channels, slower overall in deep layers."""
    return -6 + 5 * (torch.arange(channels) / (channels - 1)) ** (0.7 + 1.3 * depth)


def initial_bonus(channels: int, depth: float) -> Tensor:
    """`time_faaaa` of a new model."""
    n = torch.arange(channels)
    return depth * (1 - n / (channels - 1)) + 0.1 * ((n + 1) % 3 - 1)
