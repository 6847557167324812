"""The recurrence of RWKV-7 (x070).

For each head, with the state S of shape (value, key), starting from the initial state::

    d_t = exp(-exp(-1/2) * sigmoid(w_t))
    S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T
    y_t = S_t r_t

Source: "RWKV-7 Goose with Expressive Dynamic State Evolution" (arXiv:2503.14456), with the decay taken from the raw
pre-activation as RWKV-LM's current trainer does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rookery.ops import fla, native, wkv7_native, wkv7_triton
from rookery.ops.backend import Backend, Call, Op, exact_dtype, never_refuses
from rookery.ops.packed import KEEP, Packing
from rookery.ops.wkv7_native import LOG_DECAY_SCALE

CHUNK = 32


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    backend: str = "auto",
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a sequence.

    Args:
        r, k, v: receptance, key, value, each (B, T, H, N).
        w: raw pre-activation of the decay, (B, T, H, N).
        a, b: -kappa and kappa * iclr, (B, T, H, N), kappa being the normalised removal key.
        state: initial state (B, H, N, N), [value, key]; None means zeros.
        backend: "auto", "triton", "native", "chunked", "reference" or "fla".
        packing: the S sequences in the one row of the inputs; states are then (S, H, N, N).

    Returns:
        `y` (B, T, H, N) in the dtype of `r`, and the final state (B, H, N, N) in fp32 (fp64 for fp64 inputs). All
        arithmetic of decay and state is done in that precision. Gradients flow to every input and from both outputs.

    Raises:
        ValueError: `backend` is unknown or cannot serve this call.
    """
    chosen = OP.choose(Call.of(r, w, k, v, a, b, state, head_size=r.shape[-1]), backend)
    if packing is None:
        return chosen.run(r, w, k, v, a, b, state)
    if chosen.packs:
        return chosen.run(r, w, k, v, a, b, state, packing)
    return packing.in_groups(chosen.run, (r, w, k, v, a, b), (0, KEEP, 0, 0, 0, 0), state)


def wkv7_reference(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence written out, one token at a time. Shapes as in `wkv7`."""
    out_dtype = r.dtype
    r, w, k, v, a, b = (x.to(exact_dtype(out_dtype)) for x in (r, w, k, v, a, b))
    B, T, H, N = r.shape
    S = r.new_zeros(B, H, N, N) if state is None else state.to(r.dtype)
    decay = torch.exp(LOG_DECAY_SCALE * torch.sigmoid(w))
    y = []
    for t in range(T):
        removed = S @ a[:, t, :, :, None]
        S = S * decay[:, t, :, None, :] + removed * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
        y.append((S @ r[:, t, :, :, None]).squeeze(-1))
    return torch.stack(y, dim=1).to(out_dtype), S


def wkv7_chunked(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence as matrix products over chunks of tokens, on any device. Shapes as in `wkv7`.

    With P_t the product of decays from the chunk's start through t, dividing S_t by P_t turns the decayed recurrence
    into a plain one. The vectors u_t = S_{t-1} a_t of a chunk then solve a unit lower-triangular system (the WY form of
    the delta rule), after which outputs and the next chunk's state are sums of outer products.
    """
    out_dtype = r.dtype
    B, T, H, N = r.shape
    chunks = -(-T // CHUNK)
    pad = chunks * CHUNK - T

    def split(x: Tensor, fill: float = 0.0) -> Tensor:
        x = x.to(exact_dtype(out_dtype)).transpose(1, 2)
        if pad:
            x = torch.nn.functional.pad(x, (0, 0, 0, pad), value=fill)
        return x.reshape(B, H, chunks, CHUNK, N)

    # A padded token has no key, value or removal, and log decay 0: it leaves the state as it is.
    r, k, v, a, b = (split(x) for x in (r, k, v, a, b))
    log_decay = LOG_DECAY_SCALE * torch.sigmoid(split(w, fill=-math.inf))
    log_P = log_decay.cumsum(dim=3)
    P, inverse_P = log_P.exp(), (-log_P).exp()
    r_in, a_in = r * P, a * (log_P - log_decay).exp()
    k_out, b_out = k * inverse_P, b * inverse_P

    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=r.device).tril()
    strict = causal.tril(-1)
    a_b = (a_in @ b_out.mT).masked_fill(~strict, 0)
    a_k = (a_in @ k_out.mT).masked_fill(~strict, 0)
    r_b = (r_in @ b_out.mT).masked_fill(~causal, 0)
    r_k = (r_in @ k_out.mT).masked_fill(~causal, 0)
    eye = torch.eye(CHUNK, dtype=r.dtype, device=r.device)
    solved = torch.linalg.solve_triangular(
        eye - a_b, torch.cat([a_in, a_k @ v], dim=-1), upper=False, unitriangular=True
    )
    u_of_state, u_of_values = solved.split(N, dim=-1)
    y_of_values = r_k @ v
    P_end = P[:, :, :, -1:]
    k_end, b_end = k_out * P_end, b_out * P_end
    S_of_values = v.mT @ k_end

    S = r.new_zeros(B, H, N, N) if state is None else state.to(r.dtype)
    y = []
    # Taken apart once: each slice of its own would have a gradient of the whole size, which is quadratic in the length.
    parts = (u_of_state, u_of_values, r_in, r_b, y_of_values, P_end, b_end, S_of_values)
    for us, uv, r_c, rb, yv, end, b_c, Sv in zip(*(part.unbind(2) for part in parts), strict=True):
        u = us @ S.mT + uv
        y.append(r_c @ S.mT + rb @ u + yv)
        S = S * end + u.mT @ b_c + Sv
    out = torch.cat(y, dim=2)[:, :, :T].transpose(1, 2)
    return out.to(out_dtype).contiguous(), S


OP = Op(
    "wkv7",
    [
        Backend("triton", wkv7_triton.refuses, wkv7_triton.wkv7_triton, packs=True),
        Backend("native", native.refuses, wkv7_native.wkv7_native, packs=True),
        Backend("chunked", never_refuses, wkv7_chunked),
        Backend("reference", never_refuses, wkv7_reference),
        Backend("fla", fla.refuses, fla.wkv7_fla, packs=True),
    ],
)
