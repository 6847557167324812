"""Samples read in chunks, the state passing from each to the next ("infctx"): how much memory a step takes depends on
the length of a chunk, not on that of a sample."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rookery.models import State
from rookery.train.loop import Batch, Part


def chunk_losses(
    model: nn.Module, batch: Batch, *, chunk_ctx: int, full: bool = False, head_chunk: int = 0
) -> Iterator[Part]:
    """The loss of a batch, chunk by chunk; together that of the whole batch. A `LossFunction` of the loop.

    Args:
        model: any generation.
        chunk_ctx: tokens of a chunk. When sequences are packed, a chunk is the next ``rows * chunk_ctx`` tokens of all
            rows one after another, and a sequence that crosses its border goes on in the next.
        full: False: gradients end at the start of each chunk, and so does what a chunk needs in memory. True: gradients
            are those of the whole sample. A first pass without them keeps the state before each chunk; then the losses
            come from the last chunk to the first, and each must be backpropagated before the next is asked for, because
            the state's gradient passes from chunk to chunk the other way. Without gradients there is no difference.
        head_chunk: tokens whose logits exist at one time; 0 chooses.
    """
    chunks = _cut(batch, chunk_ctx)
    if full and torch.is_grad_enabled():
        return _full(model, chunks, head_chunk)
    return _truncated(model, chunks, head_chunk)


@dataclass(frozen=True, slots=True)
class _Chunk:
    tokens: Tensor
    targets: Tensor
    trained: int
    lengths: Tensor | None
    """Of the packed sequences, as in a `Batch`."""
    continues: bool
    """Whether the first packed sequence, or each row, goes on from the chunk before."""

    def start(self, model: Any, carried: State | None) -> State | None:
        """The state before the chunk; None stands for that before a text."""
        if carried is None or self.lengths is None:
            return carried
        others = model.initial_state(len(self.lengths), model.emb.weight)
        return State(*(torch.cat([c, o[:, 1:]], dim=1) for c, o in zip(carried.tensors, others.tensors, strict=True)))

    def carried_on(self, after: State) -> State:
        """What the next chunk needs of the state after this one."""
        return after if self.lengths is None else after.select(slice(-1, None))

    def advance(self, model: Any, carried: State | None) -> State:
        """The state after the chunk, without gradients."""
        with torch.no_grad():
            _x, after = model.hidden(self.tokens, self.start(model, carried), lengths=self.lengths)
        return self.carried_on(after)

    def loss(self, model: Any, carried: State | None, head_chunk: int) -> tuple[Tensor, State]:
        start = self.start(model, carried)
        loss, after = model.loss(
            self.tokens, self.targets, start, lengths=self.lengths, trained=self.trained, chunk=head_chunk
        )
        return loss, self.carried_on(after)


def _cut(batch: Batch, size: int) -> list[_Chunk]:
    tokens, targets = batch.tokens, batch.targets
    if batch.lengths is not None:
        size *= len(tokens)
        tokens, targets = tokens.reshape(1, -1), targets.reshape(1, -1)
    xs, ys = tokens.split(size, dim=1), targets.split(size, dim=1)
    is_trained = targets != -100 if batch.is_trained is None else batch.is_trained.view_as(targets)
    trained = [int(part.sum()) for part in is_trained.split(size, dim=1)]
    lengths: Sequence[Tensor | None] = [None] * len(xs)
    continues = [False] + [True] * (len(xs) - 1)
    if batch.lengths is not None:
        lengths, continues = cut_lengths(batch.lengths, size)
    return list(map(_Chunk, xs, ys, trained, lengths, continues))


def cut_lengths(lengths: Tensor, size: int) -> tuple[Sequence[Tensor], list[bool]]:
    """Cut sequences that lie one after another: the lengths of the pieces in each chunk of `size` tokens, and whether
    its first piece goes on from the chunk before."""
    ends = lengths.cumsum(0)
    borders = torch.arange(1, -(-int(ends[-1]) // size)) * size
    continues = [False, *(~torch.isin(borders, ends)).tolist()]
    ends = torch.cat([ends, borders]).unique()
    chunk_of = (ends - 1) // size
    return ends.diff(prepend=ends.new_zeros(1)).split(chunk_of.bincount().tolist()), continues


def _truncated(model: nn.Module, chunks: list[_Chunk], head_chunk: int) -> Iterator[Part]:
    carried: State | None = None
    for i, chunk in enumerate(chunks):
        carried = carried if chunk.continues else None
        last = i == len(chunks) - 1
        if not chunk.trained and not last:
            carried = chunk.advance(model, carried)
            continue
        loss, after = chunk.loss(model, carried, head_chunk)
        carried = after.detach()
        del after
        yield Part(loss, chunk.trained, last)


def _full(model: nn.Module, chunks: list[_Chunk], head_chunk: int) -> Iterator[Part]:
    device = chunks[0].tokens.device
    starts: list[State | None] = []
    random_states: list[list[Tensor] | None] = []
    carried: State | None = None
    for i, chunk in enumerate(chunks):
        starts.append(carried if chunk.continues else None)
        if i < len(chunks) - 1:
            random_states.append(_random_state(device))
            carried = chunk.advance(model, starts[-1])
    random_states.append(None)  # the last chunk is read only once
    gradients: list[Tensor | None] | None = None
    while chunks:
        chunk, start, random_state = chunks.pop(), starts.pop(), random_states.pop()
        if start is not None:
            start = State(*(x.detach().requires_grad_() for x in start.tensors))
        with _replayed(random_state, device):
            loss, after = chunk.loss(model, start, head_chunk)
        if gradients is not None:
            loss = _WithGradients.apply(loss, *after.tensors, *gradients)
        del after
        yield Part(loss, chunk.trained, not chunks)
        gradients = None if start is None else [x.grad for x in start.tensors]


class _WithGradients(torch.autograd.Function):
    """The loss, unchanged; the backward pass also gives the three tensors of a state the gradients that follow them.

    They come from a backward pass that has been made, and already hold whatever factor its loss had.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *states_and_gradients: Tensor | None) -> Tensor:
        ctx.gradients = states_and_gradients[3:]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream, *ctx.gradients, None, None, None


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the generators that dropout draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextlib.contextmanager
def _replayed(random_state: list[Tensor] | None, device: torch.device) -> Iterator[None]:
    """Draw the same random numbers again that followed `random_state`, and go on after it as if nothing had been."""
    if random_state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(random_state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(random_state[1], device)
        yield
