"""What the generations of RWKV have in common: the skeleton around time mixing and channel mixing, and small parts.

Shapes: B batch, T tokens, C width, H heads of N channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rookery.models.offload import InputOnHost
from rookery.models.shape import ModelShape
from rookery.models.state import State
from rookery.ops import head_loss
from rookery.ops.context import Before, Passage, exchange
from rookery.ops.linear import Linear
from rookery.ops.packed import Packing, last, pack

LayerState = tuple[Before, Before, Before]
"""State of one layer: att_shift (B, C), wkv (B, H, N, N), ffn_shift (B, C)."""


class Mixing(nn.Module):
    """Time mixing or channel mixing of one layer."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.layer, self.n_layer = layer, shape.n_layer

    def initialise(self, generator: torch.Generator) -> None:
        """Set every parameter to its initial value for pretraining."""
        raise NotImplementedError

    def depth(self) -> float:
        """0 in the first layer, 1 in the last; 0 for a model of one layer."""
        return self.layer / max(1, self.n_layer - 1)

    def height(self) -> float:
        """1 in the first layer, falling by 1/n_layer."""
        return 1 - self.layer / self.n_layer


class TimeMixing(Mixing):
    """Called with the input (B, T, C), its last row before this call (B, C), the recurrent state (B, H, N, N), the
    kernel to use, what the time mixing of the block below carried on, and where sequences lie that are packed in one
    row; returns what to add to the residual stream, the new recurrent state, and what to carry on."""

    time_state: nn.Parameter | None
    """Tuned initial state (H, N, N), [value, key], of a state-tuned model."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__(shape, layer)
        self.register_parameter("time_state", None)


class ChannelMixing(Mixing):
    """Called with the input (B, T, C), its last row before this call (B, C), the kernel to use, and where sequences lie
    that are packed in one row; returns what to add to the residual stream."""


class LanguageModel(nn.Module):
    """Embedding, blocks, head. The same module trains and infers.

    Parameters are allocated but not set: load a checkpoint, or call `rookery.models.initialise`.

    Sequences of different lengths can be read in one call, packed one after another into rows of tokens: `lengths`,
    (S,) int64 on the CPU, are then those of the sequences in the order of the flattened rows, all of whose tokens they
    cover. Each is read as if it were alone, from its own initial state; the batch of a `State` is then S.
    """

    version: str

    def __init__(
        self,
        shape: ModelShape,
        time_mix: Callable[[ModelShape, int], TimeMixing],
        channel_mix: Callable[[ModelShape, int], ChannelMixing],
        *,
        kernel: str = "auto",
        dropout: float = 0.0,
    ) -> None:
        """
        Args:
            kernel: back-end of the recurrence.
            dropout: probability; applied in training to the embedding and to the residual stream after every addition.
        """
        super().__init__()
        self.shape = shape
        self.kernel = kernel
        self.dropout = dropout
        self.grad_cp = False
        self.offload_activations = False
        self.emb = Embedding(shape.vocab_size, shape.n_embd)
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]  # no element type
            Block(time_mix(shape, layer), channel_mix(shape, layer), shape, layer, dropout)
            for layer in range(shape.n_layer)
        )
        self.ln_out = nn.LayerNorm(shape.n_embd)
        self.head = Linear(shape.n_embd, shape.vocab_size)

    def forward(
        self, tokens: Tensor, state: State | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Logits (B, T, V) of `tokens` (B, T), int64, T >= 1, and the state after the last token of each sequence."""
        x, state = self.hidden(tokens, state, lengths=lengths)
        return self.head(x), state

    def hidden(
        self, tokens: Tensor, state: State | Passage | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Everything before the head: (B, T, C) after the last LayerNorm, and the state after the last token of each
        sequence."""
        size, packing = tokens.shape, None
        if lengths is not None:
            tokens, packing = pack(tokens, lengths)
        x, carried = self.embed(tokens)
        begins = state if isinstance(state, State) else self.initial_state(len(packing or tokens), x)
        layers = state.begin(*begins.tensors) if isinstance(state, Passage) else zip(*begins.tensors, strict=True)
        states = []
        for block, before in zip(self.blocks, layers, strict=True):
            if self.grad_cp and self.training:
                with InputOnHost(x) if self.offload_activations else nullcontext():
                    x, after, *carried = checkpoint(
                        block, x, before, self.kernel, *carried, packing=packing, use_reentrant=False
                    )
            else:
                x, after, *carried = block(x, before, self.kernel, *carried, packing=packing)
            states.append(after)
        att_shift, wkv, ffn_shift = (torch.stack(part) for part in zip(*states, strict=True))
        return self.ln_out(x).view(*size, -1), State(att_shift, wkv, ffn_shift)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: State | Passage | None = None,
        *,
        lengths: Tensor | None = None,
        trained: int | None = None,
        l2wrap: bool = True,
        chunk: int = 0,
    ) -> tuple[Tensor, State]:
        """Mean loss over the trained targets, and the state after the last token of each sequence.

        Args:
            tokens, targets: (B, T), int64.
            state: before the first token of each sequence; it may come from another rank.
            trained, l2wrap, chunk: as in `rookery.ops.head_loss`.
        """
        x, after = self.hidden(tokens, state, lengths=lengths)
        loss = head_loss(x, self.head.weight, targets, trained=trained, chunk=chunk, l2wrap=l2wrap, kernel=self.kernel)
        return loss, after

    def quick_loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        lengths: Tensor | None = None,
        trained: int | None = None,
    ) -> Tensor | None:
        """`loss` of sequences from their beginning, whose final states nobody asks for, by a program for small models;
        None where there is none that serves, as without `trained`."""
        return None

    def embed(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What enters the first block, (B, T, C), and what blocks carry on beside it."""
        return self.blocks[0].ln0(F.dropout(self.emb(tokens), self.dropout, self.training)), []

    def initial_state(self, batch: int, like: Tensor) -> State:
        """The state before the first token: zeros, or the tuned `time_state` of a model that has one."""
        state = State.zeros(self.shape, batch, like.device, like.dtype)
        tuned = [block.att.time_state for block in self.blocks]
        if any(time_state is not None for time_state in tuned):
            state.wkv = torch.stack(
                [
                    zero if time_state is None else zero + time_state
                    for zero, time_state in zip(state.wkv, tuned, strict=True)
                ]
            )
        return state

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set every parameter to its value in the reference's rwkv-init.pth."""
        for _part, initialise in self.parts():
            initialise(generator)

    def parts(self) -> Iterator[tuple[nn.Module, Callable[[torch.Generator], object]]]:
        """All modules with parameters, in the order in which they are initialised, each with what does it."""
        V, C = self.emb.weight.shape
        yield self.emb, lambda generator: self.emb.weight.uniform_(-1e-4, 1e-4, generator=generator)
        gain = 0.5 * math.sqrt(V / C) if V > C else 0.5
        yield self.head, lambda generator: orthogonal_(self.head.weight, gain, generator)
        yield self.ln_out, lambda generator: self.ln_out.reset_parameters()
        for block in self.blocks:
            yield block, block.initialise


class Block(nn.Module):
    """Time mixing, then channel mixing, each added to the residual stream."""

    def __init__(self, att: TimeMixing, ffn: ChannelMixing, shape: ModelShape, layer: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        if layer == 0:
            self.ln0 = nn.LayerNorm(shape.n_embd)
        self.ln1 = nn.LayerNorm(shape.n_embd)
        self.ln2 = nn.LayerNorm(shape.n_embd)
        self.att = att
        self.ffn = ffn

    def forward(
        self, x: Tensor, before: LayerState, kernel: str, *carried: Tensor, packing: Packing | None = None
    ) -> tuple[Tensor, LayerState, *tuple[Tensor, ...]]:
        """The residual stream after this block, the layer's state after the last token of each sequence, and what time
        mixing carries to the next block (the first values, in RWKV-7)."""
        att_shift, wkv, ffn_shift = before
        att_in = self.ln1(x)
        att_last = last(att_in, packing)
        att_shift = exchange(att_shift, att_last)
        y, wkv, *carried_on = self.att(att_in, att_shift, wkv, kernel, *carried, packing=packing)
        x = F.dropout(x + y, self.dropout, self.training)
        ffn_in = self.ln2(x)
        ffn_last = last(ffn_in, packing)
        ffn_shift = exchange(ffn_shift, ffn_last)
        x = F.dropout(x + self.ffn(ffn_in, ffn_shift, kernel, packing=packing), self.dropout, self.training)
        return x, (att_last, wkv, ffn_last), *carried_on

    def initialise(self, generator: torch.Generator) -> None:
        for norm in (m for m in self.children() if isinstance(m, nn.LayerNorm)):
            norm.reset_parameters()
        self.att.initialise(generator)
        self.ffn.initialise(generator)


class Embedding(nn.Embedding):
    """`nn.Embedding` whose weight is not set."""

    def reset_parameters(self) -> None:
        """Values come from a checkpoint or from the model's own rules."""


def vector(channels: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, channels))


def matrix(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*size))


@torch.no_grad()
def set_(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values.view_as(parameter))


def orthogonal_(parameter: Tensor, gain: float, generator: torch.Generator) -> None:
    nn.init.orthogonal_(parameter, gain, generator=generator)
