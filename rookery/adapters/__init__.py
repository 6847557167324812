"""Adapters: LoRA, rsLoRA, DoRA, PiSSA and MiSS on a frozen model."""

from rookery.adapters.attach import (
    Attached,
    adapter_tensors,
    attach,
    attached,
    check_tensors,
    detach,
    enable,
    find_targets,
    initial_factors,
)
from rookery.adapters.config import AdapterConfig, in_parts
from rookery.adapters.methods import Method, create

__all__ = [
    "AdapterConfig",
    "Attached",
    "Method",
    "adapter_tensors",
    "attach",
    "attached",
    "check_tensors",
    "create",
    "detach",
    "enable",
    "find_targets",
    "in_parts",
    "initial_factors",
]
