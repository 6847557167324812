"""The recurrence of RWKV-6 (x060).

For each head, with the state S of shape (value, key), starting from the initial state::

    d_t = exp(-exp(w_t))
    y_t = S_t r_t + v_t (u . k_t . r_t)
    S_{t+1} = S_t diag(d_t) + v_t k_t^T

The state that a token reads does not hold the token itself: its own key counts with the bonus u instead.

Source: "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence" (arXiv:2404.05892).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rookery.ops import fla, native, wkv6_native, wkv6_triton
from rookery.ops.backend import Backend, Call, Op, exact_dtype, never_refuses
from rookery.ops.packed import KEEP, Packing

CHUNK = 32


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    backend: str = "auto",
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a sequence.

    Args:
        r, k, v: receptance, key, value, each (B, T, H, N).
        w: raw pre-activation of the decay, (B, T, H, N), or (1, 1, H, N) when it is the same for all tokens.
        u: bonus of a token's own key (`time_faaaa`), (H, N).
        state: initial state (B, H, N, N), [value, key]; None means zeros.
        backend: "auto", "triton", "native", "chunked", "reference" or "fla".
        packing: the S sequences in the one row of the inputs; states are then (S, H, N, N).

    Returns:
        `y` (B, T, H, N) in the dtype of `r`, and the final state (B, H, N, N) in fp32 (fp64 for fp64 inputs). All
        arithmetic of decay and state is done in that precision. Gradients flow to every input and from both outputs.

    Raises:
        ValueError: `backend` is unknown or cannot serve this call.
    """
    chosen = OP.choose(Call.of(r, w, k, v, u, state, head_size=r.shape[-1]), backend)
    if packing is None:
        return chosen.run(r, w, k, v, u, state)
    if chosen.packs:
        return chosen.run(r, w, k, v, u, state, packing)

    def group(r: Tensor, w: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return chosen.run(r, w, k, v, u, state)

    return packing.in_groups(group, (r, w.expand_as(r), k, v), (0, KEEP, 0, 0), state)


def decay_of(w: Tensor) -> Tensor:
    """exp(-exp(w)). The clamp changes no value: the decay is 0 from far below it. It keeps the gradient there 0 and not
    0 * inf."""
    return torch.exp(-torch.exp(w.clamp(max=10)))


def wkv6_reference(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence written out, one token at a time. Shapes as in `wkv6`."""
    out_dtype = r.dtype
    r, w, k, v, u = (x.to(exact_dtype(out_dtype)) for x in (r, w, k, v, u))
    B, T, H, N = r.shape
    S = r.new_zeros(B, H, N, N) if state is None else state.to(r.dtype)
    decay = decay_of(w).expand_as(r)
    y = []
    for t in range(T):
        own = v[:, t, :, :, None] * k[:, t, :, None, :]
        y.append(((S + u[:, None, :] * own) @ r[:, t, :, :, None]).squeeze(-1))
        S = S * decay[:, t, :, None, :] + own
    return torch.stack(y, dim=1).to(out_dtype), S


def wkv6_chunked(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence as matrix products over chunks of tokens, on any device. Shapes as in `wkv6`.

    Decays of RWKV-6 may vanish, so they are only ever multiplied, never divided out: a chunk is built up from segments
    of one token by joining neighbours. Each segment has, for every token, the receptance times the decays from the
    segment's start to before the token (`r_in`) and the key times the decays from after the token to the segment's end
    (`k_out`). When two are joined, ``r_in k_out^T`` of the right and the left one are the weights between their tokens.
    """
    out_dtype = r.dtype
    B, T, H, N = r.shape
    chunks = -(-T // CHUNK)

    def split(x: Tensor, fill: float = 0.0) -> Tensor:
        x = F.pad(x.transpose(1, 2), (0, 0, 0, chunks * CHUNK - T), value=fill)
        return x.reshape(B, H, chunks, CHUNK, N)

    r, w, k, v, u = (x.to(exact_dtype(out_dtype)) for x in (r, w, k, v, u))
    y = (r * u * k).sum(dim=-1, keepdim=True) * v
    # A padded token has no key or value, and decay 1: it leaves the state as it is.
    r, k, v, y, decay = split(r), split(k), split(v), split(y), split(decay_of(w).expand(B, T, H, N), fill=1.0)

    r_in, k_out, whole = r, k, decay
    size = 1
    while size < CHUNK:
        r_left, r_right = _halves(r_in, size)
        k_left, k_right = _halves(k_out, size)
        v_left, _ = _halves(v, size)
        y_left, y_right = _halves(y, size)
        y_right = y_right + (r_right @ k_left.mT) @ v_left
        whole_left, whole_right = _halves(whole, 1)
        r_in, k_out = _join(r_left, r_right * whole_left), _join(k_left * whole_right, k_right)
        y, whole = _join(y_left, y_right), (whole_left * whole_right).flatten(3, 4)
        size *= 2

    S = r.new_zeros(B, H, N, N) if state is None else state.to(r.dtype)
    added = v.mT @ k_out
    before = []
    for c in range(chunks):
        before.append(S)
        S = torch.addcmul(added[:, :, c], S, whole[:, :, c])
    y = y + r_in @ torch.stack(before, dim=2).mT
    out = y.flatten(2, 3)[:, :, :T].transpose(1, 2)
    return out.to(out_dtype).contiguous(), S


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The left and the right one of each pair of segments of a chunk: (B, H, chunks, pairs, size, N)."""
    pairs = x.unflatten(3, (-1, 2, size))
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def _join(left: Tensor, right: Tensor) -> Tensor:
    return torch.stack([left, right], dim=4).flatten(3, 5)


OP = Op(
    "wkv6",
    [
        Backend("triton", wkv6_triton.refuses, wkv6_triton.wkv6_triton),
        Backend("native", native.refuses, wkv6_native.wkv6_native, packs=True),
        Backend("chunked", never_refuses, wkv6_chunked),
        Backend("reference", never_refuses, wkv6_reference),
        Backend("fla", fla.refuses, fla.wkv6_fla, packs=True),
    ],
)
