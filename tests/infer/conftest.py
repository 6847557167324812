"""A small random model with the World vocabulary."""

import pytest
import torch

from rookery.models import ModelShape, create, initialise
from rookery.tokenizer import World


@pytest.fixture(scope="session")
def world():
    return World()


@pytest.fixture(scope="session")
def model():
    """Random weights large enough that the outputs vary; the initial values of pretraining would repeat one token."""
    ranks = {"w": 8, "a": 8, "v": 8, "g": 8}
    model = create(ModelShape("x070", 2, 32, 65536, head_size=16, dim_att=32, dim_ffn=128, ranks=ranks))
    initialise(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "ln" not in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()
