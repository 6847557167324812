"""Logits of a model that is read one matrix at a time: to compare models of any size before one is put in use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rookery.adapters import create as create_method
from rookery.formats.adapter import AdapterFile
from rookery.formats.adapter_old import split
from rookery.formats.source import Source
from rookery.models import Model, create
from rookery.models.common import Embedding
from rookery.ops.linear import Linear

TOKENS = 48
"""As many as show what a recurrent state does, and few enough to cost next to nothing."""


@torch.no_grad()
def probe(source: Source, adapter: AdapterFile | None = None, states: dict[str, Tensor] | None = None) -> Tensor:
    """Logits (1, 48, V) in fp32 of the model in a file, for tokens drawn by a fixed seed.

    In memory are, beside the mapped file, one matrix at a time and the vectors of one block.

    Args:
        adapter: added to the model, as `AdapterFile.fitted` gives it.
        states: tuned initial states, `blocks.N.att.time_state`.
    """
    shape = source.model_shape()
    with torch.device("meta"):
        model = create(shape)
    _Streamed(model, source, adapter, states or {}).prepare()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocab_size, (1, TOKENS), generator=generator)
    logits, _state = model.eval()(tokens)
    return logits


class _Streamed:
    """Gives each module of a model on the meta device its parameters when it is called, and takes them away after."""

    def __init__(self, model: Model, source: Source, adapter: AdapterFile | None, states: dict[str, Tensor]) -> None:
        self._model = model
        self._source = source
        self._adapter = adapter
        self._adapted = {found[0] for key in (adapter.tensors if adapter else ()) if (found := split(key))}
        self._states = states

    def prepare(self) -> None:
        for layer, block in enumerate(self._model.blocks):
            name = f"blocks.{layer}.att.time_state"
            if name in self._states or name in self._source.shapes:
                block.att.time_state = nn.Parameter(self._tensor(name))
            block.register_forward_pre_hook(partial(self._fill_vectors, f"blocks.{layer}"))
            block.register_forward_hook(_empty_vectors)
        for name, module in self._model.named_modules():
            if isinstance(module, Linear):
                module.register_forward_pre_hook(partial(self._fill_matrix, name))
                module.register_forward_hook(_empty)
            elif isinstance(module, Embedding):
                module.register_forward_pre_hook(partial(self._fill_embedding, name))
                module.register_forward_hook(_in_fp32)
        # What the model uses of block 0 before it calls that, and of what is in no block.
        self._fill_vectors("blocks.0", self._model.blocks[0])
        _set_own(self._model.ln_out, "ln_out", self._tensor)

    def _fill_vectors(self, name: str, block: nn.Module, *call: Any) -> None:
        for own, module in block.named_modules():
            if not isinstance(module, (Linear, nn.ModuleDict)):
                _set_own(module, f"{name}.{own}" if own else name, self._tensor)

    def _fill_matrix(self, name: str, matrix: Linear, *call: Any) -> None:
        _set_own(matrix, name, self._tensor)
        if self._adapter is None or name not in self._adapted:
            return
        method = create_method(self._adapter.config, matrix.in_features, matrix.out_features)
        method.assign({part: self._adapter.tensors[f"{name}.{part}"].float() for part in method.shapes()})
        method.bind(matrix.weight)
        matrix.adapters["probed"] = method.eval()

    def _fill_embedding(self, name: str, embedding: Embedding, *call: Any) -> None:
        """The mapped matrix itself: only the rows of the tokens are read."""
        whole = self._adapter.tensors if self._adapter else {}
        weight = whole.get(f"{name}.weight")
        weight = self._source.tensor(f"{name}.weight") if weight is None else weight
        embedding.weight = nn.Parameter(weight, requires_grad=False)

    def _tensor(self, name: str) -> Tensor:
        """In fp32. What a file may lack is read by nothing."""
        if name in self._states:
            return self._states[name].float()
        if self._adapter is not None and name in self._adapter.tensors:
            return self._adapter.tensors[name].float()
        if name not in self._source.shapes:
            return torch.zeros(self._model.get_parameter(name).shape)
        return self._source.tensor(name).float()


def _set_own(module: nn.Module, name: str, tensor: Callable[[str], Tensor]) -> None:
    for own, _parameter in list(module.named_parameters(recurse=False)):
        if own != "time_state":
            setattr(module, own, nn.Parameter(tensor(f"{name}.{own}"), requires_grad=False))


def _empty(module: nn.Module, *call: Any) -> None:
    """Back to the meta device, and without adapters."""
    for own, parameter in list(module.named_parameters(recurse=False)):
        if own != "time_state":
            setattr(module, own, nn.Parameter(parameter.to("meta"), requires_grad=False))
    if isinstance(module, Linear):
        module.adapters.clear()


def _empty_vectors(block: nn.Module, *call: Any) -> None:
    for module in block.modules():
        if not isinstance(module, nn.ModuleDict):
            _empty(module)


def _in_fp32(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    _empty(module)
    return output.float()
