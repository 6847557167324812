"""A small model of each generation, none of whose parameters is zero, for tests of how its loss is computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rookery.config import rules
from rookery.models import Model, ModelShape, Parts, create, initialise
from rookery.train.loop import Batch

VERSIONS = ("x052", "x060", "x070")
VOCAB = 40


def model_of(
    version: str,
    dtype: torch.dtype = torch.float64,
    *,
    kernel: str = "chunked",
    tuned: bool = False,
    dropout: float = 0.0,
    parts: Parts | None = None,
) -> Model:
    """Two layers, 32 channels in heads of 16; `tuned`: with initial states that train."""
    ranks = rules.ranks(version, 2, 32)
    shape = ModelShape(version, 2, 32, VOCAB, 16, 32, rules.dim_ffn(version, 32), ranks, parts or Parts())
    model = create(shape, kernel=kernel, dropout=dropout)
    initialise(model, 0)
    generator = torch.Generator().manual_seed(1)
    if tuned:
        for block in model.blocks:
            block.att.time_state = nn.Parameter(torch.zeros(shape.n_head, 16, 16))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.to(dtype)


def batch_of(
    sequences: int, length: int, *, masked: float = 0.3, lengths: list[int] | None = None, seed: int = 0
) -> Batch:
    """Random tokens and targets, of which a part `masked` is not trained."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (2, sequences, length), generator=generator)
    untrained = torch.rand((sequences, length), generator=generator) < masked
    targets = tokens[1].masked_fill(untrained, -100)
    packed = None if lengths is None else torch.tensor(lengths)
    return Batch(tokens[0], targets, int((~untrained).sum()), 0, packed)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter, by name; zeros where there is none. They are cleared."""
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()
    }
    model.zero_grad()
    return found


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor within `tolerance`, relative to its largest element or 1."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        scale = max(1.0, float(tensor.abs().max()))
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")
