"""What the CPU back-ends compiled by Numba have in common. Importing this does not import Numba."""

from __future__ import annotations

import importlib.util
from functools import cache

import numpy as np
import torch
from torch import Tensor

from rookery.ops.backend import Call
from rookery.ops.packed import Packing

CACHED = 4 << 20
"""Bytes that, once written, are found in a cache later. From 5 MB on writing past the caches took less time, reading
included (one core of a Zen 5)."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@cache
def numba_installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def refuses_machine(call: Call) -> str | None:
    """Why no native back-end can run where `call` is, or None."""
    if call.device != "cpu":
        return f"runs on a CPU, not on {call.device}"
    if not numba_installed():
        return "Numba is not installed (pip install numba)"
    return None


def refuses_precision(call: Call) -> str | None:
    """Why loops that do what PyTorch's operations would do cannot serve `call`, or None."""
    if call.dtypes not in ({torch.float32}, {torch.bfloat16}):
        found = sorted(str(dtype).removeprefix("torch.") for dtype in call.dtypes)
        return f"its loops take float32 or bfloat16, not {' and '.join(found)}"
    if call.autocast:
        return "autocast is on, under which PyTorch's operations choose their precision"
    return None


def refuses(call: Call) -> str | None:
    """Why the native back-end of a recurrence cannot serve `call`, or None."""
    reason = refuses_machine(call)
    if reason:
        return reason
    if call.dtype not in DTYPES:
        return f"dtype {call.dtype} is not a floating-point type it knows"
    if call.head_size % 4:
        return f"head size {call.head_size} is not a multiple of 4"
    return None


def loop_dtype(dtype: torch.dtype) -> torch.dtype:
    """What compiled loops read where tensors of `dtype` come in: fp16 goes through fp32."""
    return torch.float32 if dtype == torch.float16 else dtype


def array_of(x: Tensor) -> np.ndarray:
    """The numbers of `x` for compiled loops: NumPy has no bf16, whose bits they get as uint16."""
    x = x.detach()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def copied(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy. Memory that NumPy has once seen cannot be given back while the tensor lives, as FSDP does with
    that of parameters."""
    return parameter.to(dtype, copy=True, memory_format=torch.contiguous_format)


def bounds_of(x: Tensor, packing: Packing | None) -> np.ndarray:
    """Sequence i of `x` (B, T, ...) is made of the tokens bounds[i] to bounds[i + 1] - 1 of all rows."""
    if packing is not None:
        return packing.bounds.numpy()
    B, T = x.shape[:2]
    return np.arange(B + 1, dtype=np.int64) * T


def chunks_of(bounds: np.ndarray, size: int) -> np.ndarray:
    """The sequences cut into chunks of `size` tokens: chunks[i] to chunks[i + 1] - 1 are those of sequence i."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(-(-np.diff(bounds) // size))])


def work_of(bounds: np.ndarray, heads: int) -> np.ndarray:
    """Tokens of each piece of work, a piece being one head of one sequence."""
    return np.diff(bounds).repeat(heads)


def transposed(states: Tensor) -> Tensor:
    """A contiguous copy of `states` (..., N, N) with the last two axes exchanged, for loops that work in place."""
    return states.mT.clone(memory_format=torch.contiguous_format)


def outgrow_caches(tensors: list[Tensor]) -> bool:
    return sum(x.nbytes for x in tensors) > CACHED
