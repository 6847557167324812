"""Tiny real pieces for the tests of training: data, a model, flags that train in a second."""

from pathlib import Path

import numpy as np
import torch

from rookery.data import BinIdxWriter
from rookery.models import ModelShape, create, initialise
from rookery.tokenizer import Character

VOCAB = 32
CTX = 16
STEPS = 40
FLAGS = {
    "n_layer": 2,
    "n_embd": 32,
    "head_size": 16,
    "ctx_len": CTX,
    "micro_bsz": 2,
    "epoch_steps": 15,
    "my_exit_tokens": STEPS * 2 * CTX - 1,
    "lr_init": 3e-3,
    "lr_final": 3e-4,
    "weight_decay": 0.1,
    "accelerator": "cpu",
    "kernel": "chunked",
}


def write_data(prefix: Path, seed: int = 0) -> Path:
    """Random walks over a vocabulary of 32 characters, as binidx."""
    random = np.random.RandomState(seed)
    tokenizer = Character([chr(ord("A") + i) for i in range(VOCAB)])
    with BinIdxWriter(prefix, np.uint16, tokenizer) as writer:
        for _ in range(20):
            writer.add((random.randint(0, 4, 100).cumsum() % VOCAB).astype(np.uint16))
    return prefix


def tiny_shape() -> ModelShape:
    ranks = {"w": 32, "a": 32, "v": 32, "g": 32}
    return ModelShape("x070", 2, 32, VOCAB, 16, 32, 128, ranks)


def tiny_model(dtype: torch.dtype = torch.float32, *, kernel: str = "chunked") -> torch.nn.Module:
    """Initial weights, moved a little so that every parameter has a gradient."""
    model = create(tiny_shape(), kernel=kernel)
    initialise(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model.to(dtype)


def random_tokens(sequences: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (sequences, CTX + 1), generator=torch.Generator().manual_seed(seed))
