"""The machine's device, as facts for the configuration and as the thing to train on."""

from __future__ import annotations

from typing import Any

import torch


def device_facts() -> dict[str, Any]:
    """What `rookery.config.resolve` wants to know of this machine."""
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return {"accelerator": "cuda", "name": torch.cuda.get_device_name(), "bf16": bf16}
    return {"accelerator": "cpu", "name": "CPU", "bf16": False}


def describe(device: torch.device) -> str:
    """For people: the name of the GPU, or the CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU x {torch.get_num_threads()}"
