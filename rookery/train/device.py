"""The machine's device, as facts for the configuration and as the thing to train on."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import psutil
import torch

from rookery.train.memory import free_memory

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""

LARGEST_HEAP_BLOCK = 32 << 20
"""The most that glibc accepts as M_MMAP_THRESHOLD."""


def device_facts() -> dict[str, Any]:
    """What `rookery.config.resolve` wants to know of this machine."""
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return {
            "accelerator": "cuda",
            "name": torch.cuda.get_device_name(),
            "bf16": bf16,
            "free": free_memory("cuda"),
        }
    return {"accelerator": "cpu", "name": "CPU", "bf16": False, "free": free_memory("cpu")}


def describe(device: torch.device) -> str:
    """For people: the name of the GPU, or the CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU x {torch.get_num_threads()}"


def used_memory() -> int:
    """Bytes that training takes: on a GPU the most its tensors took so far, else what the process occupies now."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)


def keep_freed_memory() -> None:
    """Let the process keep the memory of freed tensors for the next ones.

    By default glibc hands every large block back to the kernel, which then clears each page anew: a fifth of a training
    step on a CPU. Elsewhere this does nothing.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # a Linux with another C library
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
