"""RWKV-7 "Goose" (x070). Names, shapes, formulas and initial values are those of RWKV-LM's current trainer.

Architecture: arXiv:2503.14456. Shapes: B batch, T tokens, C width, H heads of N channels, V vocabulary.
"""

from __future__ import annotations

import math
import weakref
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rookery.models.common import (
    Block,
    ChannelMixing,
    Embedding,
    LanguageModel,
    TimeMixing,
    matrix,
    orthogonal_,
    set_,
    vector,
)
from rookery.models.shape import ModelShape
from rookery.ops import gates7, loss7, low_rank, mix7, relu_square, token_shift
from rookery.ops.context import Before, through
from rookery.ops.head_loss import L2WRAP
from rookery.ops.linear import Linear
from rookery.ops.packed import Packing


class RWKV7(LanguageModel):
    """The language model."""

    version = "x070"

    def __init__(self, shape: ModelShape, *, kernel: str = "auto", dropout: float = 0.0) -> None:
        super().__init__(shape, TimeMix, ChannelMix, kernel=kernel, dropout=dropout)

    def quick_loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        lengths: Tensor | None = None,
        trained: int | None = None,
    ) -> Tensor | None:
        if self.emb.weight.device.type != "cpu" or trained is None or "loss" in vars(self):
            return None
        if lengths is None:
            lengths = torch.full((len(tokens),), tokens.shape[1])
        wired = WIRED.get(self)
        if wired is None or not wired.unchanged():
            wired = WIRED[self] = Wired(self)
        reason = wired.refuses(tokens, targets, lengths)
        loss7.report(reason)
        if reason is not None:
            return None
        return wired.program.loss(wired.parameters, tokens, targets, lengths, trained=trained, l2wrap=L2WRAP)


class TimeMix(TimeMixing):
    """The recurrence with its gates: what a token takes from the tokens before it."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__(shape, layer)
        C, H, N = shape.n_embd, shape.n_head, shape.head_size
        self.x_r, self.x_w, self.x_k = vector(C), vector(C), vector(C)
        self.x_v, self.x_a, self.x_g = vector(C), vector(C), vector(C)
        self.w0, self.w1, self.w2 = vector(C), matrix(C, shape.ranks["w"]), matrix(shape.ranks["w"], C)
        self.a0, self.a1, self.a2 = vector(C), matrix(C, shape.ranks["a"]), matrix(shape.ranks["a"], C)
        self.v0, self.v1, self.v2 = vector(C), matrix(C, shape.ranks["v"]), matrix(shape.ranks["v"], C)
        self.g1, self.g2 = matrix(C, shape.ranks["g"]), matrix(shape.ranks["g"], C)
        self.k_k, self.k_a, self.r_k = vector(C), vector(C), matrix(H, N)
        self.receptance = Linear(C, C)
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.output = Linear(C, C)
        self.ln_x = nn.GroupNorm(H, C, eps=shape.group_norm_eps)

    def forward(
        self,
        x: Tensor,
        shift: Tensor,
        wkv: Before,
        kernel: str,
        v_first: Tensor | None = None,
        *,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What to add to the residual stream, the state after the last token, and block 0's values, which the other
        blocks mix into theirs."""
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        xr, xw, xk, xv, xa, xg = token_shift(x, shift, *mixes, kernel=kernel, packing=packing)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = low_rank(xw, self.w1, self.w2, "tanh", kernel=kernel)
        a = low_rank(xa, self.a1, self.a2, kernel=kernel)
        g = low_rank(xg, self.g1, self.g2, "sigmoid", kernel=kernel)
        gate = None if v_first is None else low_rank(xv, self.v1, self.v2, kernel=kernel)
        first = v if v_first is None else v_first
        w, a, v = gates7(w, a, v, gate, v_first, self.w0, self.a0, self.v0, kernel=kernel)
        y, wkv = through(wkv, lambda state: mix7(
            r, w, k, v, a, g, self.k_k, self.k_a, self.r_k, self.ln_x.weight, self.ln_x.bias, state,
            eps=self.ln_x.eps, kernel=kernel, packing=packing,
        ))  # fmt: skip
        return self.output(y), wkv, first

    def initialise(self, generator: torch.Generator) -> None:
        C, N = self.w0.numel(), self.r_k.shape[1]
        depth, height = self.depth(), self.height()
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


class ChannelMix(ChannelMixing):
    """The feed-forward half of a block, with squared ReLU."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__(shape, layer)
        self.x_k = vector(shape.n_embd)
        self.key = Linear(shape.n_embd, shape.dim_ffn)
        self.value = Linear(shape.dim_ffn, shape.n_embd)

    def forward(self, x: Tensor, shift: Tensor, kernel: str = "auto", *, packing: Packing | None = None) -> Tensor:
        (xk,) = token_shift(x, shift, self.x_k, kernel=kernel, packing=packing)
        return self.value(relu_square(self.key(xk), kernel=kernel))

    def initialise(self, generator: torch.Generator) -> None:
        channel = torch.arange(self.x_k.numel()) / self.x_k.numel()
        set_(self.x_k, 1 - channel ** (self.height() ** 4))
        orthogonal_(self.key.weight, 1.0, generator)
        nn.init.zeros_(self.value.weight)


class Wired:
    """A model together with the program that computes its loss, as long as nothing is added to it or exchanged in it.

    Attributes:
        program: with the memory that it keeps.
        parameters: those of the model, in the program's order; none if there is something that the program does not
            know, such as adapters, packed weights, a tuned state or hooks.
    """

    def __init__(self, model: RWKV7) -> None:
        modules = list(model.modules())
        hooks = [
            table
            for module in modules
            for table in (
                module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
            )
        ]  # fmt: skip
        self._tables: list[dict[Any, Any]] = [
            *hooks, *(table for module in modules for table in (module._parameters, module._modules)),
        ]  # fmt: skip
        self._contents = [[id(x) for x in table.values()] for table in self._tables]
        plain = all(type(module) in PLAIN for module in modules) and not any(hooks)
        plain = plain and not any(type(module) is nn.ModuleDict and len(module) for module in modules)
        plain = plain and all(block.att.time_state is None for block in model.blocks)
        self._model = weakref.proxy(model)
        shape, ranks = model.shape, model.shape.ranks
        self.program = loss7.Program(
            loss7.Sizes(
                shape.n_layer, shape.n_embd, shape.n_head, shape.dim_ffn, shape.vocab_size,
                ranks["w"], ranks["a"], ranks["v"], ranks["g"], model.ln_out.eps, shape.group_norm_eps,
            )
        )  # fmt: skip
        self.parameters = [model.get_parameter(name) for name in loss7.names_of(shape.n_layer)] if plain else []

    def unchanged(self) -> bool:
        return all(
            [id(x) for x in table.values()] == content
            for table, content in zip(self._tables, self._contents, strict=True)
        )

    def refuses(self, tokens: Tensor, targets: Tensor, lengths: Tensor) -> str | None:
        """Why the program cannot serve, or None."""
        model = self._model
        if not self.parameters:
            return "the model is not a plain one"
        if model.grad_cp or model.dropout:
            return "there is gradient checkpointing or dropout"
        return loss7.refuses(self.program.sizes, self.parameters, tokens, targets, lengths, model.kernel)


PLAIN = (RWKV7, Block, TimeMix, ChannelMix, Linear, Embedding, nn.LayerNorm, nn.GroupNorm, nn.ModuleList, nn.ModuleDict)
"""Modules that the program knows."""

WIRED: WeakKeyDictionary[RWKV7, Wired] = WeakKeyDictionary()
"""By model; with it goes the memory that its program keeps."""
