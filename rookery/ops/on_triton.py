"""What the Triton back-ends have in common. Importing this does not import Triton."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Collection
from functools import cache

import torch

from rookery.ops.backend import Call

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST_TRITON = (3, 4)
PROGRAMS = 8
"""Of a kernel that sums over tokens, for each multiprocessor: enough to keep it busy while some wait for memory."""


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets kernels, which then run on a CPU: for tests, and to look into them."""


def refuses_call(call: Call, head_sizes: Collection[int] = ()) -> str | None:
    """Why kernels for heads of `head_sizes` (empty: for anything) cannot serve `call` on any machine, or None."""
    if call.device != "cuda" and not INTERPRETED:
        return f"runs on a GPU, not on {call.device}"
    if call.dtype not in DTYPES:
        return f"dtype {call.dtype} is not bfloat16, float16 or float32"
    if head_sizes and call.head_size not in head_sizes:
        return f"head size {call.head_size} is not one of {', '.join(map(str, head_sizes))}"
    return None


def refuses_step(call: Call, head_sizes: Collection[int] = ()) -> str | None:
    """Why a kernel that does what several of PyTorch's operations would do cannot serve `call` here, or None."""
    reason = refuses_call(call, head_sizes)
    if reason:
        return reason
    if len(call.dtypes) > 1:
        return f"its tensors are of {' and '.join(sorted(map(str, call.dtypes)))}, not of one type"
    if call.autocast:
        return "autocast is on, under which PyTorch's operations choose their precision"
    return refuses_machine()


def refuses_machine(shared_memory: int = 0) -> str | None:
    """Why this GPU runs no kernel of which one program takes `shared_memory` bytes, or None."""
    if INTERPRETED:
        return None
    return _gpu_refuses(torch.cuda.current_device(), shared_memory)


@cache
def _gpu_refuses(device: int, shared_memory: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with PyTorch's CUDA builds for Linux)"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))} (PyTorch 2.8 brings it)"
    if torch.version.hip:
        return "its kernels were made for NVIDIA's GPUs and never tried on AMD's"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs an NVIDIA GPU of the Ampere generation (RTX 30, A100) or newer"
    offered = triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]
    if offered < shared_memory:
        return f"this GPU offers {offered // 1024} KiB of shared memory, {shared_memory // 1024} KiB are needed"
    return None


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 of a CPU, on which Triton's interpreter runs kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """In this context, Triton launches kernels on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def spans(rows: int, tile: int, columns: int, device: torch.device) -> tuple[int, int]:
    """How a kernel that sums over rows shares them out: programs, and tiles of `tile` rows for each, `columns` being
    the programs beside each other that see the same rows."""
    tiles = -(-rows // tile)
    programs = max(1, min(tiles, PROGRAMS * multiprocessors(device) // columns))
    per_program = -(-tiles // programs)
    return -(-tiles // per_program), per_program
