"""The recurrence of RWKV-7 on a GPU, by Triton: forward and backward, initial and final state, any length.

The kernels (`wkv7_triton_kernels`, where the algebra is) work on chunks of tokens. There are two schedules:

* *sequential*: one program a head walks its chunks with the state in registers. Least memory traffic, but it takes as
  many heads in the batch as keep the GPU busy.
* *parallel*: one program a chunk computes the chunk's map of the state, a short scan joins the maps, and one program a
  chunk computes the outputs. For few heads, where walking the sequence would leave most of the GPU idle.

For the backward pass the forward keeps the state before each chunk and one small inverse per chunk; the rest is
computed again. bf16 inputs use bf16 tensor cores with fp32 sums; fp16 inputs TF32, because factors carry decays beyond
fp16's range; fp32 inputs fp32 arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rookery.ops import on_triton
from rookery.ops.backend import Call
from rookery.ops.packed import Packing

# Head sizes served, and the bytes of shared memory that one program of the largest kernel may take.
SHARED_MEMORY = {16: 96 * 1024, 32: 96 * 1024, 64: 96 * 1024, 128: 136 * 1024}


def refuses(call: Call) -> str | None:
    """Why this back-end cannot serve `call`, or None."""
    reason = on_triton.refuses_call(call, SHARED_MEMORY)
    if reason:
        return reason
    if call.head_size == 128 and call.dtype != torch.bfloat16:
        return "head size 128 fits in shared memory only in bfloat16"
    return on_triton.refuses_machine(SHARED_MEMORY[call.head_size])


@cache
def _heads_to_walk(device: torch.device) -> float:
    """Number of heads from which walking the sequence keeps `device` busy. Of the GPUs it was compiled for, only
    Hopper's matrix instructions take the walk without spilling many registers."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return math.inf
    return 2 * on_triton.multiprocessors(device)


@dataclass(frozen=True)
class Schedule:
    """How a call is cut into programs: tokens per chunk (16 or 32, or 64 where shared memory allows), and whether one
    program walks all chunks of a head."""

    chunk: int
    sequential: bool

    @classmethod
    def of(cls, r: Tensor, packing: Packing | None = None) -> Schedule:
        """The schedule for inputs like `r` (B, T, H, N) on its device."""
        B, T, H, N = r.shape
        chunk = 32 if r.dtype == torch.bfloat16 and N <= 64 else 16
        longest = T if packing is None else int(packing.bounds.diff().max())
        # Of sequences of different lengths, as many as there would be of the longest: the walk lasts as long as that.
        heads = B * T * H / longest
        return cls(chunk, sequential=chunk >= longest or heads >= _heads_to_walk(r.device))


def wkv7_triton(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None,
    packing: Packing | None = None, schedule: Schedule | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shapes and dtypes as in `rookery.ops.wkv7`; `schedule` overrides the choice made from the shapes."""
    schedule = schedule or Schedule.of(r, packing)
    inputs = tuple(x.contiguous() for x in (r, w, k, v, a, b))
    if state is None:
        B, _, H, N = r.shape
        state = r.new_zeros(B if packing is None else len(packing), H, N, N, dtype=torch.float32)
    state = state.float().contiguous()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state)):
        y, final = _WKV7.apply(*inputs, state, packing, schedule)
    else:
        y, final, _, _ = _forward(inputs, state, packing, schedule, keep=False)
    return y, final


class _WKV7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor,
        packing: Packing | None, schedule: Schedule,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        inputs = (r, w, k, v, a, b)
        y, final, states, inverses = _forward(inputs, state, packing, schedule, keep=True)
        ctx.save_for_backward(*inputs, states, inverses)
        ctx.packing, ctx.schedule = packing, schedule
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> Any:
        *inputs, states, inverses = ctx.saved_tensors
        given = dy.contiguous(), dfinal.contiguous(), ctx.packing, ctx.schedule
        return *_backward(tuple(inputs), states, inverses, *given), None, None


def _forward(
    inputs: tuple[Tensor, ...], state: Tensor, packing: Packing | None, schedule: Schedule, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, final state, and, with `keep`, the states before the chunks and the inverses."""
    from rookery.ops import wkv7_triton_kernels as kernels

    launch = _Launch(inputs[0], packing, schedule)
    _, w, k, v, a, b = inputs
    y, final = torch.empty_like(inputs[0]), torch.empty_like(state)
    keep = keep or not schedule.sequential
    states, inverses = launch.per_chunk(launch.N, keep=keep), launch.per_chunk(launch.C, keep=keep)
    if not schedule.sequential:
        maps = launch.maps()
        launch(kernels.prepare_forward, launch.chunks, w, k, v, a, b, *maps, inverses)
        launch.scan(state, *maps, states, final, reverse=False)
    grid = launch.heads if schedule.sequential else launch.chunks
    launch(kernels.forward, grid, *inputs, state, states, inverses, y, final, SEQUENTIAL=schedule.sequential, KEEP=keep)
    return y, final, states, inverses


def _backward(
    inputs: tuple[Tensor, ...], states: Tensor, inverses: Tensor, dy: Tensor, dfinal: Tensor,
    packing: Packing | None, schedule: Schedule,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the six inputs and of the initial state."""
    from rookery.ops import wkv7_triton_kernels as kernels

    launch = _Launch(inputs[0], packing, schedule)
    r, w, _, _, a, b = inputs
    gradients = tuple(torch.empty_like(x) for x in inputs)
    dinitial = torch.empty_like(dfinal)
    dstates = launch.per_chunk(launch.N, keep=not schedule.sequential)
    if not schedule.sequential:
        maps = launch.maps()
        launch(kernels.prepare_backward, launch.chunks, r, w, a, b, dy, inverses, *maps)
        launch.scan(dfinal, *maps, dstates, dinitial, reverse=True)
    grid = launch.heads if schedule.sequential else launch.chunks
    launch(
        kernels.backward, grid, *inputs, states, inverses, dy, dfinal, dstates, *gradients, dinitial,
        SEQUENTIAL=schedule.sequential,
    )  # fmt: skip
    return *gradients, dinitial


class _Launch:
    """Launches kernels, and allocates what passes between them, for inputs like `r`."""

    def __init__(self, r: Tensor, packing: Packing | None, schedule: Schedule) -> None:
        B, T, H, self.N = r.shape
        self.C = schedule.chunk
        NT = -(-T // self.C)
        self.heads, self.chunks = B * H, B * H * NT
        tables = (r, r, r)  # not read
        if packing is not None:
            self.heads, self.chunks = len(packing) * H, packing.chunks(self.C).count * H
            tables = (packing.borders, packing.chunks(self.C).first, packing.chunks(self.C).owner)
        self.places = (*tables, T, H, NT)
        self.device = r.device
        self.kept = torch.bfloat16 if r.dtype == torch.bfloat16 else torch.float32
        self.constants = constants(r.dtype, self.N) | {"PACKED": packing is not None}
        self.options = options(r.dtype, self.N)

    def per_chunk(self, size: int, *, keep: bool) -> Tensor:
        """A (size, size) matrix for each chunk, or nothing."""
        return torch.empty(self.chunks if keep else 0, size, size, dtype=self.kept, device=self.device)

    def maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """The affine map of each chunk: matrix, offset, decay."""
        square = (self.chunks, self.N, self.N)
        return (
            torch.empty(square, dtype=self.kept, device=self.device),
            torch.empty(square, dtype=torch.float32, device=self.device),
            torch.empty(self.chunks, self.N, dtype=torch.float32, device=self.device),
        )

    def scan(self, *tensors: Tensor, reverse: bool) -> None:
        from rookery.ops import wkv7_triton_kernels as kernels

        with on_triton.on(self.device):
            kernels.scan[(self.heads * (self.N // scan_rows(self.N)),)](
                *tensors,
                *self.places,
                REVERSE=reverse,
                ROWS=scan_rows(self.N),
                **self.constants,
                **scan_options(self.N),
            )

    def __call__(self, kernel: Any, programs: int, *tensors: Tensor, **constants: bool) -> None:
        with on_triton.on(self.device):
            kernel[(programs,)](*tensors, *self.places, C=self.C, **self.constants, **constants, **self.options)


def constants(dtype: torch.dtype, N: int) -> dict[str, Any]:
    """Compile-time constants of every kernel for inputs of `dtype` with head size `N`."""
    import triton.language as tl

    return {
        "N": N,
        "DOT": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def options(dtype: torch.dtype, N: int) -> dict[str, int]:
    """Launch options of every kernel but the scan: it fits in `SHARED_MEMORY` and spills few registers."""
    wide = N == 128 or (N == 64 and dtype == torch.float32)
    return {"num_warps": 8 if wide else 4, "num_stages": 2 if dtype == torch.bfloat16 and N <= 64 else 1}


def scan_rows(N: int) -> int:
    """Rows of the state that one program of the scan carries."""
    return min(N, 32)


def scan_options(N: int) -> dict[str, int]:
    """Launch options of the scan."""
    return {"num_warps": max(1, N // 32), "num_stages": 3}
