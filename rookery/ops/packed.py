"""Sequences of different lengths that lie one after another in a single row of tokens.

What works on each token alone does not notice. The token shift and the recurrences must not look across the border
between two sequences: the loops compiled for a CPU walk from border to border, and every other back-end reads the
sequences in groups of similar length, padded to the longest of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

KEEP = -80.0
"""Raw decay of a padded token. The decay is then exactly 1 in every precision, for RWKV-5 and 6, exp(-exp(w)), and for
RWKV-7, exp(-exp(-1/2) sigmoid(w)); with no key, value or removal the token leaves the state as it is."""


@dataclass(frozen=True)
class Packing:
    """Where the S sequences of one row of tokens lie."""

    bounds: Tensor
    """(S + 1,) int64 on the CPU: sequence i is made of the tokens bounds[i] to bounds[i + 1] - 1."""
    first: Tensor
    """(S,) int64 on the device: the first token of each sequence."""
    last: Tensor
    """(S,) int64 on the device: the last token of each sequence."""

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device) -> Packing:
        """Sequences of `lengths` (S,), int64 on the CPU, at least one token each, of a row of tokens on `device`."""
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return cls(bounds, _on(device, bounds[:-1]), _on(device, bounds[1:] - 1))

    def __len__(self) -> int:
        return len(self.first)

    def in_groups(
        self,
        recurrence: Callable[..., tuple[Tensor, Tensor]],
        inputs: Sequence[Tensor],
        padding: Sequence[float],
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run a recurrence that knows only rows of equal length.

        Args:
            recurrence: called with inputs (b, t, ...) and states (b, ...) or None, gives outputs (b, t, ...) and final
                states (b, ...).
            inputs: each (1, T, ...), T being the tokens of all sequences.
            padding: for each input, its value in padded tokens, which must leave the state as it is.
            state: initial states (S, ...); None is passed on.

        Returns:
            Outputs (1, T, ...) and final states (S, ...).
        """
        groups = self._groups
        padded = [
            _Scatter.apply(x.squeeze(0), groups.place, sum(groups.rows), value).split(groups.rows)
            for x, value in zip(inputs, padding, strict=True)
        ]
        states = (
            [None] * len(groups.sizes) if state is None else state.index_select(0, groups.order).split(groups.sizes)
        )
        outputs, finals = [], []
        for size, start, *tensors in zip(groups.sizes, states, *padded, strict=True):
            y, final = recurrence(*(x.unflatten(0, (size, -1)) for x in tensors), start)
            outputs.append(y.flatten(0, 1))
            finals.append(final)
        y = _Gather.apply(torch.cat(outputs), groups.place)
        return y.unsqueeze(0), torch.cat(finals).index_select(0, groups.order.argsort())

    @cached_property
    def borders(self) -> Tensor:
        """`bounds` on the device."""
        return _on(self.first.device, self.bounds)

    @cached_property
    def begins(self) -> Tensor:
        """(T,) int32 on the device: of each token the number of the sequence that begins with it, or -1."""
        numbers = torch.arange(len(self), dtype=torch.int32, device=self.first.device)
        tokens = int(self.bounds[-1])
        return numbers.new_full((tokens,), -1).index_copy_(0, self.first, numbers)

    def chunks(self, size: int) -> Chunks:
        """The sequences cut into chunks of `size` tokens, each beginning with its own."""
        if size not in self._chunks:
            counts = -(-self.bounds.diff() // size)
            first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            owner = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)
            device = self.first.device
            self._chunks[size] = Chunks(len(owner), _on(device, first), _on(device, owner))
        return self._chunks[size]

    @cached_property
    def _chunks(self) -> dict[int, Chunks]:
        return {}

    @cached_property
    def _groups(self) -> _Groups:
        """The sequences from the longest to the shortest; one that is at most half as long as the first of its group
        begins the next."""
        lengths = self.bounds.diff()
        descending, order = lengths.sort(descending=True, stable=True)
        starts = [0]
        for i, length in enumerate(descending.tolist()):
            if 2 * length <= descending[starts[-1]]:
                starts.append(i)
        sizes = [end - start for start, end in pairwise([*starts, len(lengths)])]
        longest = descending[starts]
        first_row = torch.empty_like(lengths)
        first_row[order] = torch.cat(
            [lengths.new_zeros(1), longest.repeat_interleave(torch.tensor(sizes)).cumsum(0)[:-1]]
        )
        place = torch.arange(int(self.bounds[-1])) + (first_row - self.bounds[:-1]).repeat_interleave(lengths)
        device = self.first.device
        rows = (longest * torch.tensor(sizes)).tolist()
        return _Groups(sizes, rows, _on(device, order), _on(device, place))


@dataclass(frozen=True)
class Chunks:
    """Sequences cut into chunks."""

    count: int
    """Chunks of all sequences."""
    first: Tensor
    """(S + 1,) int64 on the device: number of the first chunk of each sequence, and at last `count`."""
    owner: Tensor
    """(count,) int32 on the device: the sequence of each chunk."""


@dataclass(frozen=True)
class _Groups:
    sizes: list[int]
    """Sequences in each group."""
    rows: list[int]
    """Padded tokens of each group."""
    order: Tensor
    """(S,): numbers of the sequences, group by group."""
    place: Tensor
    """(T,): where each token is among the padded ones."""


def pack(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Packing | None]:
    """Tokens (B, T) read as sequences of `lengths` (S,), int64 on the CPU, one after another through all rows.

    Returns:
        Tokens (S, length) and None when all are equally long, which is the plain case; else tokens (1, B * T).

    Raises:
        ValueError: a sequence is empty, or the lengths do not add up to the tokens.
    """
    shortest, longest = (int(x) for x in lengths.aminmax())
    if shortest < 1 or int(lengths.sum()) != tokens.numel():
        raise ValueError(f"sequences of {lengths.tolist()} tokens do not make up {tuple(tokens.shape)} tokens")
    if shortest == longest:
        return tokens.reshape(len(lengths), longest), None
    return tokens.reshape(1, -1), Packing.of(lengths, tokens.device)


def previous(x: Tensor, before: Tensor, packing: Packing | None = None) -> Tensor:
    """`x` (B, T, C) one token later, each sequence beginning with its row of `before` (S, C)."""
    if packing is None:
        return torch.cat([before[:, None], x[:, :-1]], dim=1)
    return x.roll(1, dims=1).index_copy(1, packing.first, before[None])


def last(x: Tensor, packing: Packing | None = None) -> Tensor:
    """The last token (S, C) of each sequence of `x` (B, T, C)."""
    return x[:, -1] if packing is None else x[0].index_select(0, packing.last)


def _on(device: torch.device, index: Tensor) -> Tensor:
    """A copy on `device` that is not waited for."""
    return (index.pin_memory() if device.type == "cuda" else index).to(device, non_blocking=True)


class _Scatter(torch.autograd.Function):
    """Rows of `x` (T, ...) put at `place` among `rows` rows, the others holding `value`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, rows: int, value: float) -> Tensor:
        ctx.save_for_backward(place)
        return x.new_full((rows, *x.shape[1:]), value).index_copy_(0, place, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None, None


class _Gather(torch.autograd.Function):
    """The rows of `x` at `place`, each of which occurs once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.shape = x.shape
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (place,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, place, grad), None
