"""What the CPU back-ends compiled by Numba have in common. Importing this does not import Numba."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from rookery.ops.backend import Call

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@cache
def numba_installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def refuses(call: Call) -> str | None:
    """Why the native back-end of a recurrence cannot serve `call`, or None."""
    if call.device != "cpu":
        return f"runs on a CPU, not on {call.device}"
    if not numba_installed():
        return "Numba is not installed (pip install numba)"
    if call.dtype not in DTYPES:
        return f"dtype {call.dtype} is not a floating-point type it knows"
    if call.head_size % 4:
        return f"head size {call.head_size} is not a multiple of 4"
    return None


def transposed(states: Tensor) -> Tensor:
    """A contiguous copy of `states` (..., N, N) with the last two axes exchanged, for loops that work in place."""
    return states.mT.clone(memory_format=torch.contiguous_format)
