"""A new model made from an old one of other dimensions, as RWKV-LM's stage 1 combines weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rookery.errors import UserError
from rookery.i18n import _

BY_TOKEN = ("emb.weight", "head.weight")
"""Matrices with one row a token id."""


def combine(initial: Mapping[str, Tensor], loaded: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """`initial` with every tensor that is in `loaded` replaced by it, made to fit.

    Rows of `emb.weight` and `head.weight` keep their token id, and ids that the old model lacks keep their initial
    rows. Everything else is reshaped if the number of elements allows it, or else interpolated linearly along each axis
    that differs: element i of n lies at i/n of the old axis.

    The reference interpolates along the first axis only, so that it cannot change the width of a matrix, and does so
    to token rows as well, which then stand for other tokens.

    Args:
        initial: initial weights of the new model.
        loaded: weights of the old one.
        name: what to call its file in an error.

    Raises:
        UserError: the file holds what the new model has no place for.
    """
    unknown = sorted(key for key in loaded.keys() - initial.keys() if not key.endswith("_mask"))
    if unknown:
        raise UserError(
            _(
                "{name} holds {key}, for which the new model has no place ({count} such tensors)",
                name=name,
                key=unknown[0],
                count=len(unknown),
            )
        )
    combined = dict(initial)
    for key in loaded.keys() & initial.keys():
        new, old = initial[key], loaded[key].to(initial[key].dtype)
        if key in BY_TOKEN:
            rows = min(len(new), len(old))
            combined[key] = torch.cat([_resized(old[:rows], 1, new.shape[1]), new[rows:]])
        elif old.numel() == new.numel():
            combined[key] = old.reshape(new.shape)
        elif old.dim() != new.dim():
            raise UserError(
                _(
                    "{name}: {key} has shape {old}, which cannot become {new}",
                    name=name,
                    key=key,
                    old=tuple(old.shape),
                    new=tuple(new.shape),
                )
            )
        else:
            for axis, size in enumerate(new.shape):
                old = _resized(old, axis, size)
            combined[key] = old
    return combined


def _resized(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Linear interpolation of one axis to `size` elements."""
    old_size = tensor.shape[axis]
    if old_size == size:
        return tensor
    place = (torch.arange(size, dtype=torch.float64) / size * old_size).clamp(max=old_size - 1)
    below = place.long()
    above = (below + 1).clamp(max=old_size - 1)
    share = (place - below).to(tensor.dtype).view([-1 if i == axis else 1 for i in range(tensor.dim())])
    return torch.lerp(tensor.index_select(axis, below), tensor.index_select(axis, above), share)
