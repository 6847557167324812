"""Context parallelism: a sequence cut into parts, each read by a rank of its own.

Of all tokens before its own part a layer needs only its state after them: the recurrent state and, for the two token
shifts, one row each. Each rank gets these from the rank that has the part before, and hands its own on as soon as they
are known; gradients take the same way back. What is computed is what one device computes, by the same kernels.

The update of the recurrent state by a part is affine, S_out = S_in M + P, so that ranks could also compute their pairs
(M, P) at the same time, exchange them and join them. In RWKV-7 M costs about a second recurrence in every layer, on
every rank; in RWKV-5 and 6 it is a product of decays. Handing the state on costs waiting instead: the rank with part i
starts i recurrences of one layer late, once in a pass, because while it reads layer l, the rank before it is on its
way to the state of layer l + 1. In RWKV-7 that is less for as long as there are no more ranks than layers; and it is
half the bytes, to one neighbour in place of all, through kernels that know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Neighbours:
    """The ranks that have the parts before and after this rank's."""

    def __init__(self, group: Any, before: int | None, after: int | None) -> None:
        """
        Args:
            group: process group of the ranks that share a sequence.
            before, after: ranks in `group`; None where the sequence begins or ends.
        """
        self.group, self.before, self.after = group, before, after
        self._sent: list[tuple[Any, Tensor]] = []

    def passage(self, *, arrives: bool, leaves: bool) -> Passage:
        """For one forward pass and its backward pass. All ranks of the group must make the same passes.

        Args:
            arrives: whether the first sequence of this rank's part goes on from the part before.
            leaves: whether the last one goes on in the part after.
        """
        # What is sent stays in memory until it has been taken; all of the pass before has been, or soon will be.
        for work, _tensor in self._sent:
            work.wait()
        self._sent.clear()
        return Passage(self, arrives, leaves)

    def send(self, tensor: Tensor, to: int | None, number: int) -> None:
        """Hand `tensor`, which nobody may change any more, on to a rank; not waited for."""
        self._sent.append((dist.isend(tensor, group=self.group, group_dst=to, tag=number), tensor))

    def expect(self, like: Tensor, sender: int | None, number: int) -> _Expected:
        """What a rank sends under `number`, of the shape and dtype of `like`; not waited for."""
        buffer = torch.empty_like(like, memory_format=torch.contiguous_format)
        return _Expected(buffer, dist.irecv(buffer, group=self.group, group_src=sender, tag=number))


@dataclass
class _Expected:
    """A tensor on its way here."""

    buffer: Tensor
    work: Any

    def take(self) -> Tensor:
        """Wait for it, the first time."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.buffer


class Passage:
    """What goes between neighbours in one forward pass and its backward pass. A model takes it in place of a state."""

    def __init__(self, neighbours: Neighbours, arrives: bool, leaves: bool) -> None:
        self._neighbours = neighbours
        self._arrives, self._leaves = arrives, leaves
        self._like: list[Tensor] = []
        self._expected: list[_Expected] = []
        self._gradients: dict[int, _Expected] = {}
        self._marks: list[Tensor] = []
        self._ended = False

    def begin(self, *initial: Tensor) -> list[tuple[Slot, ...]]:
        """Begin the forward pass.

        Args:
            initial: tensors of the state before a sequence that begins here, each (L, S, ...).

        Returns:
            For each of the L layers, its tensors, in the order in which the layer uses them.
        """
        layers = list(zip(*initial, strict=True))
        self._like = [tensor[:1] for layer in layers for tensor in layer]
        self._start = torch.empty(0, device=initial[0].device, requires_grad=True)
        if self._arrives:
            before = self._neighbours.before
            self._expected = [self._neighbours.expect(like, before, i) for i, like in enumerate(self._like)]
        slots = iter(range(len(self._like)))
        return [tuple(Slot(self, next(slots), tensor) for tensor in layer) for layer in layers]

    def end(self, loss: Tensor) -> Tensor:
        """End the forward pass. The backward pass of the result, which is `loss`, also exchanges gradients: every rank
        must make it, or none. Those that arrive already hold whatever factor the loss of their rank was multiplied
        with."""
        self._ended = True
        if not (torch.is_grad_enabled() and self._marks):
            return loss
        if self._leaves:
            after = self._neighbours.after
            for number, like in reversed(list(enumerate(self._like))):
                self._gradients[number] = self._neighbours.expect(like, after, number)
        marks, self._marks = self._marks, []  # which know this passage
        return _End.apply(loss, *marks)

    def receive(self, number: int, initial: Tensor) -> Tensor:
        """Tensor `number` before the first token of each sequence, of which only the first is on its way."""
        if not self._arrives:
            return initial
        value, mark = _Arrive.apply(self._start, self, number)
        self._mark(mark)
        return value if len(initial) == 1 else torch.cat([value, initial[1:]])

    def send(self, number: int, last: Tensor) -> None:
        """Hand on tensor `number` after the last token of the last sequence.

        With `grad_cp` the forward pass of a block is made again after the end of the pass: it then gets what had
        arrived, and sends nothing.
        """
        if self._leaves and not self._ended:
            self._mark(_Leave.apply(last[-1:], self._start, self, number))

    def _mark(self, mark: Tensor) -> None:
        if not self._ended:
            self._marks.append(mark)

    def arrived(self, number: int) -> Tensor:
        """What the rank before sent; waits for it, but not again when a block is repeated."""
        return self._expected[number].take()

    def depart(self, number: int, tensor: Tensor) -> None:
        """Send `tensor` to the rank after."""
        tensor = tensor.detach().to(self._like[number].dtype).contiguous()
        self._neighbours.send(tensor, self._neighbours.after, number)

    def gradient_arrived(self, number: int) -> Tensor:
        """The gradient of what was sent to the rank after; waits for it."""
        return self._gradients.pop(number).take()

    def gradient_departs(self, number: int, gradient: Tensor) -> None:
        """Send the gradient of what arrived back to the rank before."""
        gradient = gradient.to(self._like[number].dtype).contiguous()
        self._neighbours.send(gradient, self._neighbours.before, number)


class Slot:
    """One tensor of a layer's state, (S, ...), before the first token of each sequence. Nothing waits for it before it
    is used."""

    def __init__(self, passage: Passage, number: int, initial: Tensor) -> None:
        self._passage, self._number, self._initial = passage, number, initial

    def exchange(self, last: Tensor) -> Tensor:
        """As the function of this name."""
        self._passage.send(self._number, last)
        return self._passage.receive(self._number, self._initial)

    def through(self, recurrence: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """As the function of this name."""
        y, last = recurrence(self._passage.receive(self._number, self._initial))
        self._passage.send(self._number, last)
        return y, last


Before = Tensor | Slot
"""A tensor of a layer's state before the first token: it is there, or comes from another rank."""


def exchange(before: Before, last: Tensor) -> Tensor:
    """What comes before the first token of each sequence. The last token, which is known already, is handed on."""
    return before if isinstance(before, Tensor) else before.exchange(last)


def through(before: Before, recurrence: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What `recurrence` gives for the state `before`: outputs, and the state after the last token, which is handed
    on."""
    return recurrence(before) if isinstance(before, Tensor) else before.through(recurrence)


# Autograd works backward from what was made last. So each of these two, whose place among a layer's operations is that
# of the value that it stands for, waits or sends just there. Their empty second outputs, the marks, tie them to the
# loss, which may not depend on what leaves, nor on what arrives.


class _Arrive(torch.autograd.Function):
    """A value from the rank before; its gradient goes back there."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, passage: Passage, number: int) -> Any:
        ctx.passage, ctx.number = passage, number
        value = passage.arrived(number)
        return value.view_as(value), torch.empty_like(start)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _mark: Tensor) -> Any:
        ctx.passage.gradient_departs(ctx.number, gradient)
        return None, None, None


class _Leave(torch.autograd.Function):
    """A value for the rank after; its gradient comes from there."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, start: Tensor, passage: Passage, number: int) -> Tensor:
        ctx.passage, ctx.number, ctx.dtype = passage, number, value.dtype
        passage.depart(number, value)
        return torch.empty_like(start)

    @staticmethod
    def backward(ctx: Any, _mark: Tensor) -> Any:
        return ctx.passage.gradient_arrived(ctx.number).to(ctx.dtype), None, None, None


class _End(torch.autograd.Function):
    """The loss, unchanged; the backward pass begins everywhere that a mark was made."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *marks: Tensor) -> Tensor:
        ctx.marks = len(marks)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream, *(upstream.new_empty(0) for _ in range(ctx.marks))
