"""A new model made from an old one of other dimensions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rookery.errors import UserError
from rookery.formats import combine


def reference_vector(source: Tensor, size: int) -> Tensor:
    """RWKV-LM's loop over the elements of a vector, restated."""
    result = torch.empty(size)
    for i in range(size):
        position = i / size * len(source)
        if position >= len(source) - 1:
            result[i] = source[-1]
        else:
            below = math.floor(position)
            share = position - below
            result[i] = source[below] * (1 - share) + source[below + 1] * share
    return result


@pytest.mark.parametrize("sizes", [(6, 9), (9, 6), (5, 10), (7, 7), (1, 4)])
def test_vectors_are_interpolated_as_in_the_reference(sizes: tuple[int, int]) -> None:
    old, new = sizes
    source = torch.randn(old)
    grown = combine({"ln_out.bias": torch.zeros(new)}, {"ln_out.bias": source}, "x")["ln_out.bias"]
    torch.testing.assert_close(grown, reference_vector(source, new))
    mix = combine({"m": torch.zeros(1, 1, new)}, {"m": source.view(1, 1, -1)}, "x")["m"]
    torch.testing.assert_close(mix.flatten(), reference_vector(source, new))


def test_matrices_grow_along_both_axes() -> None:
    source = torch.randn(4, 6)
    grown = combine({"key.weight": torch.zeros(8, 9)}, {"key.weight": source}, "x")["key.weight"]
    rows = torch.stack([reference_vector(column, 8) for column in source.T], 1)
    torch.testing.assert_close(grown, torch.stack([reference_vector(row, 9) for row in rows]))


def test_token_rows_keep_their_ids_and_new_ones_begin_fresh() -> None:
    old, fresh = torch.randn(5, 4), torch.randn(8, 4)
    grown = combine({"emb.weight": fresh}, {"emb.weight": old}, "x")["emb.weight"]
    assert torch.equal(grown, torch.cat([old, fresh[5:]]))
    assert torch.equal(combine({"head.weight": fresh[:3]}, {"head.weight": old}, "x")["head.weight"], old[:3])
    wider = combine({"emb.weight": torch.zeros(5, 8)}, {"emb.weight": old}, "x")["emb.weight"]
    torch.testing.assert_close(wider, torch.stack([reference_vector(row, 8) for row in old]))


def test_the_same_number_of_elements_is_reshaped_and_the_rest_stays_initial() -> None:
    initial = {"att.r_k": torch.zeros(2, 8), "new": torch.ones(3)}
    combined = combine(initial, {"att.r_k": torch.arange(16.0).view(4, 4), "tiny_mask": torch.zeros(1)}, "x")
    assert torch.equal(combined["att.r_k"], torch.arange(16.0).view(2, 8))
    assert torch.equal(combined["new"], torch.ones(3))
    assert combined.keys() == initial.keys()


def test_what_has_no_place_is_named() -> None:
    with pytest.raises(UserError, match=r"old\.pth holds blocks\.7\.ln1\.bias"):
        combine({"a": torch.zeros(2)}, {"blocks.7.ln1.bias": torch.zeros(2)}, "old.pth")
    with pytest.raises(UserError, match="cannot become"):
        combine({"a": torch.zeros(2, 2)}, {"a": torch.zeros(5)}, "old.pth")
