"""Ways to run a model for inference, behind one interface.

The states of all sequences lie in one `State` of S slots, and a form advances some of them in place. `PlainForm` is the
model's module itself, for every version, device and dtype; the others compute the same faster where they can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rookery.models import Model, State
from rookery.ops.backend import exact_dtype

PREFILL = 512
"""Tokens of a prompt read in one forward pass."""


class Form(Protocol):
    """A way to run a model. All calls are made under `torch.inference_mode`, from one thread at a time.

    Attributes:
        name: for reports.
    """

    name: str

    def slots(self, count: int) -> State:
        """Room for the states of `count` sequences, all zeros."""

    def initial(self) -> State:
        """The state before the first token, of one sequence, tuned states of the model included."""

    def read(self, slots: State, slot: int, tokens: Sequence[int]) -> Tensor:
        """Read T >= 1 tokens of one sequence in parallel form, at most PREFILL; returns (T, C), what the head takes."""

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V), fp32, of `hidden` (..., C)."""

    def step(self, slots: State, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Read one token of each of B sequences, those in slots `rows`; returns logits (B, V), fp32."""


class PlainForm:
    """The model's own module."""

    name = "plain"

    def __init__(self, model: Model) -> None:
        self.model = model
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def slots(self, count: int) -> State:
        return State.zeros(self.model.shape, count, self.device, exact_dtype(self.dtype))

    def initial(self) -> State:
        return self.model.initial_state(1, torch.empty(0, device=self.device, dtype=exact_dtype(self.dtype)))

    def read(self, slots: State, slot: int, tokens: Sequence[int]) -> Tensor:
        return self._advance(slots, [slot], torch.tensor([tokens], device=self.device))[0]

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden).float()

    def step(self, slots: State, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        return self.head(self._advance(slots, rows, torch.tensor(tokens, device=self.device)[:, None])[:, 0])

    def _advance(self, slots: State, rows: Sequence[int], tokens: Tensor) -> Tensor:
        places = torch.tensor(rows, device=self.device)
        before = slots.select(places)
        before = State(before.att_shift.to(self.dtype), before.wkv, before.ffn_shift.to(self.dtype))
        x, after = self.model.hidden(tokens, before)
        assign(slots, places, after)
        return x


def assign(slots: State, rows: Tensor | slice, state: State) -> None:
    """Put a batch of states into slots `rows`."""
    slots.att_shift[:, rows] = state.att_shift.to(slots.att_shift.dtype)
    slots.wkv[:, rows] = state.wkv.to(slots.wkv.dtype)
    slots.ffn_shift[:, rows] = state.ffn_shift.to(slots.ffn_shift.dtype)


def bytes_of(state: State) -> int:
    """Memory of a state."""
    return sum(part.numel() * part.element_size() for part in vars(state).values())
