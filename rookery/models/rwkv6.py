"""RWKV-6 "Finch" (x060). Names, shapes, formulas and initial values are those of RWKV-LM's RWKV-v5 trainer.

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
from rookery.models.rwkv5 import initial_bonus, initial_decay
from rookery.models.shape import ModelShape
from rookery.ops import linear, low_rank, relu_square, token_shift, wkv6
from rookery.ops.context import Before, through
from rookery.ops.linear import Linear
from rookery.ops.packed import Packing, previous


class RWKV6(LanguageModel):
    """The language model."""

    version = "x060"

    def __init__(self, shape: ModelShape, *, kernel: str = "auto", dropout: float = 0.0) -> None:
        super().__init__(shape, TimeMix, ChannelMix, kernel=kernel, dropout=dropout)


class TimeMix(TimeMixing):
    """The recurrence with its gate: what a token takes from the tokens before it. How much of the previous token enters
    each projection, and how fast the state decays, depend on the token."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__(shape, layer)
        C, A, H, N = shape.n_embd, shape.dim_att, shape.n_head, shape.head_size
        mix, decay = shape.ranks["mix"], shape.ranks["decay"]
        self.time_maa_x, self.time_maa_w, self.time_maa_k = vector(C), vector(C), vector(C)
        self.time_maa_v, self.time_maa_r, self.time_maa_g = vector(C), vector(C), vector(C)
        self.time_maa_w1, self.time_maa_w2 = matrix(C, 5 * mix), matrix(5, mix, C)
        self.time_decay = vector(A)
        self.time_decay_w1, self.time_decay_w2 = matrix(C, decay), matrix(decay, A)
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
        difference = previous(x, shift, packing) - x
        low = torch.tanh(linear(torch.addcmul(x, difference, self.time_maa_x), self.time_maa_w1.T))
        of_w, of_k, of_v, of_r, of_g = torch.einsum("btjd,jdc->jbtc", low.unflatten(-1, (5, -1)), self.time_maa_w2)

        r = self.receptance(torch.addcmul(x, difference, self.time_maa_r + of_r)).view(heads)
        k = self.key(torch.addcmul(x, difference, self.time_maa_k + of_k)).view(heads)
        v = self.value(torch.addcmul(x, difference, self.time_maa_v + of_v)).view(heads)
        g = F.silu(self.gate(torch.addcmul(x, difference, self.time_maa_g + of_g)))
        xw = torch.addcmul(x, difference, self.time_maa_w + of_w)
        w = self.time_decay + low_rank(xw, self.time_decay_w1, self.time_decay_w2, "tanh", kernel=kernel)

        y, wkv = through(
            wkv, lambda state: wkv6(r, w.view(heads), k, v, self.time_faaaa, state, backend=kernel, packing=packing)
        )
        y = self.ln_x(y.view(B * T, -1)).view(B, T, -1)
        return self.output(y * g), wkv

    def initialise(self, generator: torch.Generator) -> None:
        C, height, depth = self.time_maa_x.numel(), self.height(), self.depth()
        channel = torch.arange(C) / C
        for mix in (self.time_maa_x, self.time_maa_w, self.time_maa_k):
            set_(mix, 1 - channel**height)
        set_(self.time_maa_v, 1 - (channel**height + 0.3 * depth))
        for mix in (self.time_maa_r, self.time_maa_g):
            set_(mix, 1 - channel ** (0.5 * height))
        for down, up in ((self.time_maa_w1, self.time_maa_w2), (self.time_decay_w1, self.time_decay_w2)):
            nn.init.zeros_(down)
            nn.init.uniform_(up, -0.01, 0.01, generator=generator)
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
        self.time_maa_k, self.time_maa_r = vector(C), vector(C)
        self.key = Linear(C, F)
        self.receptance = Linear(C, C)
        self.value = Linear(F, C)

    def forward(self, x: Tensor, shift: Tensor, kernel: str = "auto", *, packing: Packing | None = None) -> Tensor:
        xk, xr = token_shift(x, shift, self.time_maa_k, self.time_maa_r, kernel=kernel, packing=packing)
        return torch.sigmoid(self.receptance(xr)) * self.value(relu_square(self.key(xk), kernel=kernel))

    def initialise(self, generator: torch.Generator) -> None:
        C = self.time_maa_k.numel()
        for mix in (self.time_maa_k, self.time_maa_r):
            set_(mix, 1 - (torch.arange(C) / C) ** (self.height() ** 3))
        orthogonal_(self.key.weight, 1.0, generator)
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)
