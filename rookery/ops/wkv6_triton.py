"""The recurrences of RWKV-5 and RWKV-6 on a GPU, by Triton: forward and backward, initial and final state, any length.

One program walks the chunks of a head with the state in registers (`wkv6_triton_kernels`, where the algebra is). With
fewer heads than keep the GPU busy, sequences are cut into segments: one program a segment sums up what it does to the
state, a short scan joins the sums, and the segments are walked in parallel.

The forward pass keeps its inputs only; the backward pass walks forward once more for the state before each chunk. bf16
inputs use bf16 tensor cores with fp32 sums, fp16 inputs TF32, fp32 inputs fp32 arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rookery.ops import on_triton, wkv7_triton
from rookery.ops.backend import Call

HEAD_SIZES = (16, 32, 64, 128)
CHUNK = 16
SHARED_MEMORY = 99 * 1024
"""Bytes that one program of the largest kernel may take: what every NVIDIA GPU since Ampere offers."""


def refuses(call: Call) -> str | None:
    """Why this back-end cannot serve `call`, or None."""
    return on_triton.refuses_call(call, HEAD_SIZES) or on_triton.refuses_machine(SHARED_MEMORY)


def segments_for(r: Tensor) -> int:
    """Into how many segments to cut sequences like `r` (B, T, H, N) on its device: four programs a multiprocessor keep
    it busy, and a segment of less than four chunks is not worth its share of the scan."""
    B, T, H, _ = r.shape
    return max(1, min(4 * on_triton.multiprocessors(r.device) // (B * H), T // (4 * CHUNK)))


def wkv6_triton(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None, segments: int | None = None
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes as in `rookery.ops.wkv6`; `segments` overrides the choice made from the shapes."""
    B, _, H, N = r.shape
    if state is None:
        state = r.new_zeros(B, H, N, N, dtype=torch.float32)
    inputs = (x.contiguous() for x in (r, w, k, v, u, state.float()))
    y, final = _WKV6.apply(*inputs, segments or segments_for(r))
    return y, final


class _WKV6(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, segments: int
    ) -> tuple[Tensor, Tensor]:
        from rookery.ops import wkv6_triton_kernels as kernels

        launch = _Launch(r, w, segments)
        y, final = torch.empty_like(r), torch.empty_like(state)
        starts = launch.starts(state, v, k, w, reverse=False)
        launch(kernels.forward, r, w, k, v, u, starts, launch.nothing, y, final, KEEP=False)
        ctx.save_for_backward(r, w, k, v, u, starts)
        ctx.segments = segments
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> Any:
        from rookery.ops import wkv6_triton_kernels as kernels

        r, w, k, v, u, starts = ctx.saved_tensors
        launch = _Launch(r, w, ctx.segments)
        dy, dfinal = dy.contiguous(), dfinal.contiguous()
        N = r.shape[-1]
        states = launch.empty(launch.chunks, N, N, dtype=launch.kept)
        launch(kernels.forward, r, w, k, v, u, starts, states, launch.nothing, launch.nothing, KEEP=True)

        dr, dk, dv = (torch.empty_like(x) for x in (r, k, v))
        du = launch.empty(len(r), r.shape[2], launch.segments, N)
        dw = torch.empty_like(w) if launch.per_token else torch.empty_like(du)
        dinitial = torch.empty_like(dfinal)
        ends = launch.starts(dfinal, dy, r, w, reverse=True)
        launch(kernels.backward, r, w, k, v, u, states, dy, ends, dr, dw, dk, dv, du, dinitial)
        if not launch.per_token:
            dw = dw.sum(dim=(0, 2)).view(w.shape).to(w.dtype)
        return dr, dw, dk, dv, du.sum(dim=(0, 2)).to(u.dtype), dinitial, None


class _Launch:
    """Launches kernels, and allocates what passes between them, for inputs like `r` and `w`."""

    def __init__(self, r: Tensor, w: Tensor, segments: int) -> None:
        B, self.T, self.H, self.N = r.shape
        self.device, self.dtype = r.device, r.dtype
        self.per_token = w.shape == r.shape
        self.chunks_per_segment = -(-self.T // (CHUNK * segments))
        self.segments = -(-self.T // (CHUNK * self.chunks_per_segment))
        self.heads = B * self.H
        self.chunks = self.heads * self.segments * self.chunks_per_segment
        self.kept = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        self.constants = constants(self.dtype, self.N) | {"PER_TOKEN": self.per_token}
        self.nothing = self.empty(0)

    def empty(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def starts(self, first: Tensor, values: Tensor, keys: Tensor, w: Tensor, *, reverse: bool) -> Tensor:
        """The state that each segment starts from, `first` being that of the first one; in reverse its gradient,
        `first` being that of the last one."""
        from rookery.ops import wkv6_triton_kernels as kernels

        if self.segments == 1:
            return first
        programs, N = self.heads * self.segments, self.N
        totals, decays, before = self.empty(programs, N, N), self.empty(programs, N), self.empty(programs, N, N)
        self(kernels.gather, values, keys, w, totals, decays, REVERSE=reverse)
        rows = scan_rows(N)
        with on_triton.on(self.device):
            kernels.scan[(self.heads * (N // rows),)](
                first, totals, decays, before, self.segments, N=N, ROWS=rows, REVERSE=reverse, **scan_options(N)
            )
        return before

    def __call__(self, kernel: Any, *tensors: Tensor, **own: bool) -> None:
        with on_triton.on(self.device):
            kernel[(self.heads * self.segments,)](
                *tensors, self.T, self.H, self.chunks_per_segment, self.segments, **self.constants, **own,
                **options(self.dtype, self.N),
            )  # fmt: skip


def constants(dtype: torch.dtype, N: int) -> dict[str, Any]:
    """Compile-time constants of the kernels for inputs of `dtype` with head size `N`."""
    return wkv7_triton.constants(dtype, N) | {"C": CHUNK}


def options(dtype: torch.dtype, N: int) -> dict[str, int]:
    """Launch options of every kernel but the scan, which spill few registers."""
    wide = N == 128 or (N == 64 and dtype != torch.bfloat16)
    return {"num_warps": 8 if wide else 4, "num_stages": 1}


def scan_rows(N: int) -> int:
    """Rows of the state that one program of the scan carries."""
    return min(N, 16)


def scan_options(N: int) -> dict[str, int]:
    """Launch options of the scan."""
    return {"num_warps": max(1, N // 32), "num_stages": 3}
