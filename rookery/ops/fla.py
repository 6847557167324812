"""The recurrences by flash-linear-attention (https://github.com/fla-org/flash-linear-attention), where it is installed.

Its kernels take the logarithm of the decay, not the raw value, and keep states as [key, value]. They know packed
sequences. Nothing chooses them but who asks for them.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rookery.ops.backend import Call
from rookery.ops.packed import Packing

DTYPES = (torch.bfloat16, torch.float16)


def refuses(call: Call) -> str | None:
    """Why this back-end cannot serve `call`, or None."""
    if call.device != "cuda":
        return f"runs on a GPU, not on {call.device}"
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed (pip install flash-linear-attention)"
    if call.dtype not in DTYPES:
        return f"its kernels are made for bfloat16 and float16, not for {str(call.dtype).removeprefix('torch.')}"
    return None


def wkv7_fla(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shapes and dtypes as in `rookery.ops.wkv7`. Called as fla's own RWKV-7 layer does: the decay has a lower bound,
    which lets it work on chunks of 64 tokens on tensor cores."""
    from fla.ops.rwkv7 import chunk_rwkv7

    lower_bound = -math.exp(-0.5)
    log_decay = lower_bound * torch.sigmoid(w.float())
    wanted = {"chunk_size": 64, "safe_gate": True, "lower_bound": lower_bound}
    return _called(chunk_rwkv7, {"r": r, "w": log_decay, "k": k, "v": v, "a": a, "b": b}, state, packing, wanted)


def wkv6_fla(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None, packing: Packing | None = None
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes as in `rookery.ops.wkv6`."""
    from fla.ops.rwkv6 import chunk_rwkv6

    # Clamped where the decay has long been 0, so that its gradient there is not 0 * inf.
    log_decay = -torch.exp(w.float().clamp(max=10)).expand_as(r)
    return _called(chunk_rwkv6, {"r": r, "k": k, "v": v, "w": log_decay.contiguous(), "u": u}, state, packing, {})


def _called(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    state: Tensor | None,
    packing: Packing | None,
    wanted: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Output and final state of `function`, which gets those options in `wanted` that its version knows."""
    if packing is not None:
        wanted = wanted | {"cu_seqlens": packing.borders, "cu_seqlens_cpu": packing.bounds}
    known = inspect.signature(function).parameters
    y, final = function(
        **inputs,
        scale=1.0,
        initial_state=None if state is None else state.float().mT.contiguous(),
        output_final_state=True,
        **{name: value for name, value in wanted.items() if name in known},
    )
    return y, final.mT
