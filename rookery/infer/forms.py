"""Ways to run a model for inference, behind one interface.

The states of all sequences lie in one `State` of S slots, and a form advances some of them in place. `PlainForm` is the
model's module itself, for every version, device and dtype; the others compute the same faster where they can (`form_of`
chooses).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from rookery.adapters import enable
from rookery.errors import UserError
from rookery.i18n import _
from rookery.infer.cpu7 import CPU7Form, refuses
from rookery.infer.matrix import UNIT, PackedLinear, Room, WideEmbedding, refused
from rookery.models import Model, ModelShape, Parts, State
from rookery.ops.backend import exact_dtype
from rookery.ops.linear import Linear

PREFILL = 512
"""Tokens of a prompt read in one forward pass."""


class Form(Protocol):
    """A way to run a model. All calls are made under `torch.inference_mode`, from one thread at a time.

    Attributes:
        name: for reports.
        model: the module it was made of.
    """

    name: str
    model: Model

    def again(self) -> Form | None:
        """The model as it is now, in this form, independent of what becomes of its adapters; None if this form keeps
        no weights of its own."""

    def slots(self, count: int) -> State:
        """Room for the states of at least `count` sequences, all zeros."""

    def initial(self) -> State:
        """The state before the first token, of one sequence, tuned states of the model included."""

    def read(self, slots: State, slot: int, tokens: Sequence[int]) -> Tensor:
        """Read T >= 1 tokens of one sequence in parallel form, at most PREFILL; returns (T, C), what the head takes."""

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V), fp32, of `hidden` (..., C)."""

    def step(self, slots: State, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Read one token of each of B sequences, those in slots `rows`; returns logits (B, V), fp32."""


class PlainForm:
    """The model's own module.

    Args:
        model: in evaluation mode.
        adapter: name of an adapter on the model that is switched on only while this form computes; None leaves all as
            they are.
    """

    name = "plain"

    def __init__(self, model: Model, adapter: str | None = None) -> None:
        self.model, self.adapter = model, adapter
        self.module = model
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def again(self) -> Form | None:
        return None

    def slots(self, count: int) -> State:
        return State.zeros(self.model.shape, count, self.device, exact_dtype(self.dtype))

    def initial(self) -> State:
        with self._switched():
            return self.module.initial_state(1, torch.empty(0, device=self.device, dtype=exact_dtype(self.dtype)))

    def read(self, slots: State, slot: int, tokens: Sequence[int]) -> Tensor:
        with self._switched():
            places = torch.tensor([slot], device=self.device)
            return self._advance(slots, places, torch.tensor([tokens], device=self.device))[0]

    def head(self, hidden: Tensor) -> Tensor:
        with self._switched():
            return self.module.head(hidden).float()

    def step(self, slots: State, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        with self._switched():
            places, column = torch.tensor([rows, tokens], device=self.device)
            return self._decoded(slots, places, column)

    def _decoded(self, slots: State, places: Tensor, tokens: Tensor) -> Tensor:
        return self.module.head(self._advance(slots, places, tokens[:, None])[:, 0]).float()

    def _advance(self, slots: State, places: Tensor, tokens: Tensor) -> Tensor:
        before = slots.select(places)
        before = State(before.att_shift.to(self.dtype), before.wkv, before.ffn_shift.to(self.dtype))
        x, after = self.module.hidden(tokens, before)
        assign(slots, places, after)
        return x

    @contextmanager
    def _switched(self) -> Iterator[None]:
        if self.adapter is None:
            yield
            return
        enable(self.model, self.adapter, True)
        try:
            yield
        finally:
            enable(self.model, self.adapter, False)


class PackedForm(PlainForm):
    """The model's module on a CPU with its large matrices packed (`rookery.infer.matrix`), all else in fp32: for what
    `CPU7Form` does not take.

    Args:
        model: its weights are shared where their format allows it. Adapters that are switched on are merged into what
            is packed.
        dtype: format of the matrices, fp32, bf16 or int8; None for the model's.

    Raises:
        ValueError: the model cannot be packed.
    """

    def __init__(self, model: Model, dtype: torch.dtype | None = None) -> None:
        reason = packing_refused(model)
        if reason:
            raise ValueError(reason)
        self.packed_dtype = dtype or model.emb.weight.dtype
        room = Room(model)
        # `deepcopy` takes what its memo holds in the place of a copy.
        stands_for: dict[int, object] = {id(model.emb): WideEmbedding(model.emb)}
        for module in model.modules():
            if isinstance(module, Linear):
                stands_for[id(module)] = PackedLinear(module, self.packed_dtype, room)
        module = copy.deepcopy(model, stands_for).float().requires_grad_(False)
        super().__init__(module)
        self.model = model
        self.name = f"packed {str(self.packed_dtype).removeprefix('torch.')}"

    def again(self) -> PackedForm:
        return PackedForm(self.model, self.packed_dtype)


def packing_refused(model: Model) -> str | None:
    """Why `PackedForm` cannot run `model`, or None."""
    return refused(model) or shape_refused(model.shape)


def shape_refused(shape: ModelShape) -> str | None:
    """Why a model of this shape cannot be packed, or None."""
    if shape.n_embd % UNIT or shape.dim_att % UNIT or shape.dim_ffn % UNIT:
        return "widths are no multiples of 16"
    return None if shape.parts == Parts() else "parts of old trainers are not packed"


class GraphForm(PlainForm):
    """The model's module on a CUDA GPU, its decoding step captured as a graph: launching the kernels of a small model
    one by one takes longer than they do.

    A graph is captured for each power of two of sequences, when first needed. Places left over work on a slot that
    nobody reads.
    """

    name = "graph"

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor, Tensor, State]] = {}

    def slots(self, count: int) -> State:
        return super().slots(count + 1)

    def step(self, slots: State, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        count, spare = len(rows), slots.wkv.shape[1] - 1
        size = 1 << (count - 1).bit_length()
        key = (slots.wkv.data_ptr(), size)
        if key not in self._captured:
            self._captured[key] = self._capture(slots, size, spare)
        graph, given, logits, _slots = self._captured[key]
        padding = [0] * (size - count)
        given.copy_(torch.tensor([[*rows, *(spare for _ in padding)], [*tokens, *padding]]))
        graph.replay()
        return logits[:count].clone()

    def _capture(self, slots: State, size: int, spare: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, State]:
        given = torch.tensor([[spare] * size, [0] * size], device=self.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Kernels are compiled and libraries set up before anything is recorded.
        with torch.cuda.stream(stream):
            for _n in range(2):
                self._decoded(slots, given[0], given[1])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._decoded(slots, given[0], given[1])
        return graph, given, logits, slots


def form_of(model: Model, dtype: torch.dtype | None = None, *, threads: int | None = None) -> Form:
    """The fastest way to run `model` where it is.

    Args:
        dtype: format of the weights; None for the model's. int8 (a scale for each row) is for packed forms only.
        threads: of a step of x070 on a CPU; None for as many as PyTorch uses.

    Raises:
        UserError: int8 was asked for and the model cannot be packed; the message says why.
    """
    if refuses(model) is None:
        return CPU7Form(model, dtype, threads)
    reason = packing_refused(model)
    if reason is None:
        return PackedForm(model, dtype)
    if dtype == torch.int8:
        raise UserError(_("int8 is not possible here: {reason}", reason=reason))
    return GraphForm(model) if model.emb.weight.is_cuda else PlainForm(model)


def assign(slots: State, rows: Tensor | slice, state: State) -> None:
    """Put a batch of states into slots `rows`."""
    slots.att_shift[:, rows] = state.att_shift.to(slots.att_shift.dtype)
    slots.wkv[:, rows] = state.wkv.to(slots.wkv.dtype)
    slots.ffn_shift[:, rows] = state.ffn_shift.to(slots.ffn_shift.dtype)


def bytes_of(state: State) -> int:
    """Memory of a state."""
    return sum(part.numel() * part.element_size() for part in vars(state).values())
