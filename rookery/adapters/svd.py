"""The dominant part of a matrix by a randomised SVD (Halko, Martinsson, Tropp, arXiv:0909.4061)."""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 16
"""Directions sought beyond the rank: they cost little and make the ones that are kept exact."""


@torch.no_grad()
def low_rank(weight: Tensor, rank: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), each with half of every singular value, so that B A is the part of `weight`
    (out, in) with the `rank` largest ones.

    Args:
        iterations: power iterations; 0 to 2 see only roughly where singular values fall off slowly.
        generator: of the CPU. The same one gives the same result on the same machine.

    Returns:
        fp32, or fp64 of an fp64 weight, on the weight's device.
    """
    W = weight if weight.dtype == torch.float64 else weight.float()
    width = min(rank + OVERSAMPLING, *W.shape)
    start = torch.randn(W.shape[1], width, dtype=W.dtype, generator=generator).to(W.device)
    Q = torch.linalg.qr(W @ start).Q
    for _iteration in range(iterations):
        Q = torch.linalg.qr(W.T @ Q).Q
        Q = torch.linalg.qr(W @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    root = S[:rank].sqrt()
    return (root[:, None] * Vh[:rank]).contiguous(), ((Q @ U[:, :rank]) * root).contiguous()
