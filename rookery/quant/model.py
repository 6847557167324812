"""Quantising a model, one matrix after the other, so that memory only falls."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from rookery.errors import UserError
from rookery.i18n import _
from rookery.models import Model
from rookery.ops.linear import Linear
from rookery.quant.codes import Kind
from rookery.quant.linear import QuantLinear

QUANTISED = re.compile(r"blocks\.\d+\.(att|ffn)\.\w+")
"""Matrices of time and channel mixing. Embedding, head, low-rank layers and vectors stay as they are."""


def quantise(
    model: Model,
    kind: Kind,
    *,
    weights: Mapping[str, Tensor] | None = None,
    low_rank: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    device: torch.device | str | None = None,
) -> list[str]:
    """Put a `QuantLinear` in the place of every matrix of time and channel mixing.

    Args:
        model: its matrices are set, or `weights` holds them.
        weights: the tensors of a checkpoint by name, to quantise instead of the model's own, which then need not be
            set. Memory-mapped, they are read a few rows at a time: no whole copy is ever made.
        low_rank: name of a matrix, such as "blocks.0.att.key" -> A0 and B0, as in `QuantLinear.of`.
        device: where the quantised matrices go; where the weights are when None.

    Returns:
        The names of the weights that are gone, such as "blocks.0.att.key.weight".

    Raises:
        UserError: a weight is missing, has another shape than the model's, or holds NaN or Inf.
    """
    low_rank = low_rank or {}
    device = None if device is None else torch.device(device)
    gone = []
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Linear) or isinstance(layer, QuantLinear) or not QUANTISED.fullmatch(name):
            continue
        weight = None if weights is None else _checked(weights, f"{name}.weight", layer)
        try:
            quantised = QuantLinear.of(layer, kind, low_rank.get(name), weight=weight, device=device)
        except ValueError as error:
            raise UserError(
                _("{name} cannot be quantised: {reason}. Use a sound checkpoint.", name=f"{name}.weight", reason=error)
            ) from error
        parent, _dot, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, quantised)
        gone.append(f"{name}.weight")
    return gone


def _checked(weights: Mapping[str, Tensor], name: str, layer: Linear) -> Tensor:
    if name not in weights:
        raise UserError(_("the checkpoint has no {name}", name=name))
    found, wanted = tuple(weights[name].shape), (layer.out_features, layer.in_features)
    if found != wanted:
        raise UserError(
            _("{name} of the checkpoint is {found}, the model's is {wanted}", name=name, found=found, wanted=wanted)
        )
    return weights[name]
