"""RWKV-7 in plain PyTorch operations, without anything of `rookery.ops` but the recurrence's chunked form: what
Rookery is compared with as "torch"."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rookery.models import RWKV7, State
from rookery.models.rwkv7 import ChannelMix, TimeMix
from rookery.ops.wkv7 import wkv7_chunked, wkv7_reference


def hidden(model: RWKV7, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """As `RWKV7.hidden`, with the same parameters: (B, T, C) after the last LayerNorm, and the state after it."""
    x = model.blocks[0].ln0(F.embedding(tokens, model.emb.weight))
    v_first: Tensor | None = None
    states = []
    for layer, block in enumerate(model.blocks):
        att_in = block.ln1(x)
        y, wkv, v_first = _time_mix(block.att, att_in, state.att_shift[layer], state.wkv[layer], v_first)  # type: ignore[arg-type]
        x = x + y
        ffn_in = block.ln2(x)
        x = x + _channel_mix(block.ffn, ffn_in, state.ffn_shift[layer])  # type: ignore[arg-type]
        states.append((att_in[:, -1], wkv, ffn_in[:, -1]))
    att_shift, wkv, ffn_shift = (torch.stack(part) for part in zip(*states, strict=True))
    return model.ln_out(x), State(att_shift, wkv, ffn_shift)


def loss(model: RWKV7, tokens: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of whole logits where a target is not -100, with RWKV's L2Wrap in the gradient."""
    state = State.zeros(model.shape, len(tokens), tokens.device, model.emb.weight.dtype)
    x, _state = hidden(model, tokens, state)
    logits = F.linear(x, model.head.weight).float().flatten(0, 1)
    penalty = logits[targets.flatten() != -100].amax(dim=-1).square().mean() * 0.5e-4
    return F.cross_entropy(logits, targets.flatten()) + (penalty - penalty.detach())


def _shifted(x: Tensor, before: Tensor) -> Tensor:
    return torch.cat([before[:, None].to(x.dtype), x[:, :-1]], dim=1) - x


def _time_mix(
    att: TimeMix, x: Tensor, shift: Tensor, wkv: Tensor, v_first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, C = x.shape
    H, N = att.r_k.shape
    step = _shifted(x, shift)
    xr, xw, xk, xv, xa, xg = (x + step * mix for mix in (att.x_r, att.x_w, att.x_k, att.x_v, att.x_a, att.x_g))
    r, k, v = F.linear(xr, att.receptance.weight), F.linear(xk, att.key.weight), F.linear(xv, att.value.weight)
    w = att.w0 + torch.tanh(xw @ att.w1) @ att.w2
    a = torch.sigmoid(att.a0 + (xa @ att.a1) @ att.a2)
    g = torch.sigmoid(xg @ att.g1) @ att.g2
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(att.v0 + (xv @ att.v1) @ att.v2)
    kappa = F.normalize((k * att.k_k).view(B, T, H, N), dim=-1)
    k = k * (1 + (a - 1) * att.k_a)
    r, w, k, v, a = (z.view(B, T, H, N) for z in (r, w, k, v, a))
    recurrence = wkv7_reference if T == 1 else wkv7_chunked
    y, wkv = recurrence(r, w, k, v, -kappa, kappa * a, wkv)
    normal = F.group_norm(y.reshape(B * T, C), H, att.ln_x.weight, att.ln_x.bias, att.ln_x.eps).view(B, T, C)
    bonus = ((r * k * att.r_k).sum(dim=-1, keepdim=True) * v).view(B, T, C)
    return F.linear((normal + bonus) * g, att.output.weight), wkv, v_first


def _channel_mix(ffn: ChannelMix, x: Tensor, shift: Tensor) -> Tensor:
    k = F.linear(x + _shifted(x, shift) * ffn.x_k, ffn.key.weight)
    return F.linear(torch.relu(k) ** 2, ffn.value.weight)
