"""Small models with adapters for the tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import rookery
from rookery.adapters import AdapterConfig, adapter_tensors, attach, attached
from rookery.models import Model

GOLDEN = Path(__file__).parent.parent / "golden"
VERSIONS = ("x052", "x060", "x070")

CONFIGS = {
    "lora": AdapterConfig("lora", r=8, alpha=16.0),
    "rslora": AdapterConfig("lora", r=8, alpha=16.0, rslora=True),
    "dora": AdapterConfig("dora", r=8, alpha=16.0),
    "pissa": AdapterConfig("pissa", r=8),
    "bone": AdapterConfig("miss", r=8),
    "padded": AdapterConfig("miss", r=20),
    "bat": AdapterConfig("miss", r=8, miss_mode="bat"),
    "bat_rows": AdapterConfig("miss", r=8, miss_mode="bat_rows"),
}


def checkpoint(version: str) -> Path:
    return GOLDEN / f"{version}_ckpt.safetensors"


def base_model(version: str, dtype: torch.dtype = torch.float32) -> Model:
    return rookery.load(checkpoint(version), device="cpu", dtype=dtype)


@cache
def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def tokens(version: str) -> Tensor:
    return golden(f"{version}_io")["dix"][:, :24]


@torch.no_grad()
def logits(model: Model) -> Tensor:
    """Of tokens that every golden model knows."""
    return model.eval()(tokens(model.shape.version))[0]


@torch.no_grad()
def pretend_training(model: Model, name: str = "default", amount: float = 0.02) -> None:
    """Move everything that an adapter trains."""
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if f".adapters.{name}." in key or key in attached(model)[name].other:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((amount * noise).to(parameter.dtype))


def trained(version: str, config: AdapterConfig, dtype: torch.dtype = torch.float32) -> tuple[Model, dict[str, Tensor]]:
    """A model with an adapter that has been somewhere, and the adapter's tensors."""
    model = base_model(version, dtype)
    attach(model, config)
    pretend_training(model)
    return model, {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
