"""RWKV-7 "Goose" (x070). Names, shapes, formulas and initial values are those of RWKV-LM's current trainer.

Architecture: arXiv:2503.14456. Shapes: B batch, T tokens, C width, H heads of N channels, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rookery.models.shape import ModelShape
from rookery.models.state import State
from rookery.ops import wkv7

GROUP_NORM_EPS = 64e-5


class RWKV7(nn.Module):
    """The language model; the same module trains and infers.

    Parameters are allocated but not set: load a checkpoint, or call `rookery.models.initialise`.
    """

    version = "x070"

    def __init__(self, shape: ModelShape, *, kernel: str = "auto") -> None:
        super().__init__()
        self.shape = shape
        self.kernel = kernel
        self.grad_cp = False
        self.emb = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape, layer) for layer in range(shape.n_layer))
        self.ln_out = nn.LayerNorm(shape.n_embd)
        self.head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (B, T, V) of `tokens` (B, T), int64, T >= 1, and the state after the last of them."""
        x, state = self.hidden(tokens, state)
        return self.head(x), state

    def hidden(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Everything before the head: (B, T, C) after the last LayerNorm, and the state after the last token."""
        x = self.blocks[0].ln0(self.emb(tokens))
        if state is None:
            state = self.initial_state(len(tokens), x)
        # Block 0 sets v_first; the other blocks mix it into their values.
        v_first = x.new_empty(0)
        att_shift, wkv, ffn_shift = [], [], []
        for layer, block in enumerate(self.blocks):
            args = (x, v_first, state.att_shift[layer], state.wkv[layer], state.ffn_shift[layer], self.kernel)
            if self.grad_cp and self.training:
                x, v_first, *after = checkpoint(block, *args, use_reentrant=False)
            else:
                x, v_first, *after = block(*args)
            att_shift.append(after[0])
            wkv.append(after[1])
            ffn_shift.append(after[2])
        return self.ln_out(x), State(torch.stack(att_shift), torch.stack(wkv), torch.stack(ffn_shift))

    def initial_state(self, batch: int, like: Tensor) -> State:
        """The state before the first token: zeros, or the tuned `time_state` of a model that has one."""
        state = State.zeros(self.shape, batch, like.device, like.dtype)
        tuned = [block.att.time_state for block in self.blocks]
        if tuned[0] is not None:
            wkv = torch.stack([time_state.to(state.wkv.dtype) for time_state in tuned])
            state.wkv = wkv[:, None].expand(-1, batch, -1, -1, -1)
        return state

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set every parameter to its value in the reference's rwkv-init.pth."""
        V, C = self.emb.weight.shape
        self.emb.weight.uniform_(-1e-4, 1e-4, generator=generator)
        orthogonal_(self.head.weight, 0.5 * math.sqrt(V / C) if V > C else 0.5, generator)
        self.ln_out.reset_parameters()
        for block in self.blocks:
            block.initialise(generator)


class Block(nn.Module):
    """Time mixing, then channel mixing, each added to the residual stream."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(shape.n_embd)
        self.ln1 = nn.LayerNorm(shape.n_embd)
        self.ln2 = nn.LayerNorm(shape.n_embd)
        self.att = TimeMix(shape, layer)
        self.ffn = ChannelMix(shape, layer)

    def forward(
        self, x: Tensor, v_first: Tensor, att_shift: Tensor, wkv: Tensor, ffn_shift: Tensor, kernel: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        att_in = self.ln1(x)
        y, v_first, wkv = self.att(att_in, v_first, att_shift, wkv, kernel)
        x = x + y
        ffn_in = self.ln2(x)
        x = x + self.ffn(ffn_in, ffn_shift)
        return x, v_first, att_in[:, -1], wkv, ffn_in[:, -1]

    def initialise(self, generator: torch.Generator) -> None:
        for norm in (m for m in self.children() if isinstance(m, nn.LayerNorm)):
            norm.reset_parameters()
        self.att.initialise(generator)
        self.ffn.initialise(generator)


class TimeMix(nn.Module):
    """The recurrence with its gates: what a token takes from the tokens before it."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        C, H, N = shape.n_embd, shape.n_head, shape.head_size
        self.layer, self.n_layer = layer, shape.n_layer
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"):
            self.register_parameter(name, vector(C))
        self.w0, self.w1, self.w2 = vector(C), matrix(C, shape.ranks["w"]), matrix(shape.ranks["w"], C)
        self.a0, self.a1, self.a2 = vector(C), matrix(C, shape.ranks["a"]), matrix(shape.ranks["a"], C)
        self.v0, self.v1, self.v2 = vector(C), matrix(C, shape.ranks["v"]), matrix(shape.ranks["v"], C)
        self.g1, self.g2 = matrix(C, shape.ranks["g"]), matrix(shape.ranks["g"], C)
        self.k_k, self.k_a, self.r_k = vector(C), vector(C), matrix(H, N)
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.ln_x = nn.GroupNorm(H, C, eps=GROUP_NORM_EPS)
        self.register_parameter("time_state", None)

    def forward(
        self, x: Tensor, v_first: Tensor, shift: Tensor, wkv: Tensor, kernel: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T, C = x.shape
        heads = (B, T, *self.r_k.shape)
        xr, xw, xk, xv, xa, xg = token_shift(x, shift, self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)

        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = self.w0 + torch.tanh(xw @ self.w1) @ self.w2
        a = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)
        g = torch.sigmoid(xg @ self.g1) @ self.g2
        if self.layer == 0:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2))
        kappa = F.normalize((k * self.k_k).view(heads), dim=-1, eps=1e-12)
        k = k * (1 + (a - 1) * self.k_a)

        r, w, k, v, a = (z.view(heads) for z in (r, w, k, v, a))
        y, wkv = wkv7(r, w, k, v, -kappa, kappa * a, wkv, backend=kernel)
        bonus = (r * k * self.r_k).sum(dim=-1, keepdim=True) * v
        y = self.ln_x(y.view(B * T, C)).view(B, T, C) + bonus.view(B, T, C)
        return self.output(y * g), v_first, wkv

    def initialise(self, generator: torch.Generator) -> None:
        C, (H, N) = self.w0.numel(), self.r_k.shape
        depth, height = depth_ratio(self.layer, self.n_layer), 1 - self.layer / self.n_layer
        channel = torch.arange(C) / C
        for power, names in ((0.2, ("x_r", "x_g")), (0.9, ("x_w", "x_a")), (0.7, ("x_k", "x_v"))):
            for name in names:
                set_(self.get_parameter(name), 1 - channel ** (power * height))

        linear = torch.arange(C) / (C - 1) - 0.5
        centred = (torch.arange(C) % N - (N - 1) / 2) / ((N - 1) / 2)
        zigzag = centred * centred.abs()
        ramp = torch.arange(C) / (C - 1)
        set_(self.w0, -6 + 6 * ramp ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag)
        set_(self.a0, -0.19 + 0.3 * zigzag + 0.4 * linear)
        set_(self.v0, 0.73 - 0.4 * linear)
        set_(self.k_k, 0.71 - 0.1 * linear)
        nn.init.constant_(self.k_a, 1.02)
        nn.init.constant_(self.r_k, -0.04)
        for x in "wavg":
            down, up = self.get_parameter(f"{x}1"), self.get_parameter(f"{x}2")
            nn.init.zeros_(down)
            orthogonal_(up, 0.1 * max(1.0, math.sqrt(up.shape[0] / up.shape[1])), generator)

        orthogonal_(self.receptance.weight, 1.0, generator)
        orthogonal_(self.key.weight, 0.1, generator)
        orthogonal_(self.value.weight, 1.0, generator)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.ln_x.weight, ((1 + self.layer) / self.n_layer) ** 0.7)
        nn.init.zeros_(self.ln_x.bias)


class ChannelMix(nn.Module):
    """The feed-forward half of a block, with squared ReLU."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.layer, self.n_layer = layer, shape.n_layer
        self.x_k = vector(shape.n_embd)
        self.key = nn.Linear(shape.n_embd, shape.dim_ffn, bias=False)
        self.value = nn.Linear(shape.dim_ffn, shape.n_embd, bias=False)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        (xk,) = token_shift(x, shift, self.x_k)
        return self.value(torch.relu(self.key(xk)).square())

    def initialise(self, generator: torch.Generator) -> None:
        channel = torch.arange(self.x_k.numel()) / self.x_k.numel()
        set_(self.x_k, 1 - channel ** ((1 - self.layer / self.n_layer) ** 4))
        orthogonal_(self.key.weight, 1.0, generator)
        nn.init.zeros_(self.value.weight)


def token_shift(x: Tensor, before: Tensor, *mixes: Tensor) -> list[Tensor]:
    """For each mix m: x + m * (x_{t-1} - x_t). `x` is (B, T, C), `before` (B, C) what came before its first token."""
    previous = torch.cat([before[:, None], x[:, :-1]], dim=1)
    difference = previous - x
    return [torch.addcmul(x, difference, mix) for mix in mixes]


def vector(channels: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, channels))


def matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns))


def depth_ratio(layer: int, n_layer: int) -> float:
    """0 in the first block, 1 in the last; 0 for a model of one block."""
    return layer / max(1, n_layer - 1)


@torch.no_grad()
def set_(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values.view_as(parameter))


def orthogonal_(parameter: Tensor, gain: float, generator: torch.Generator) -> None:
    nn.init.orthogonal_(parameter, gain, generator=generator)
