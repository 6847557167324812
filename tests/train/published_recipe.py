"""The published training recipe once more, as plainly as it can be said, for comparison with Rookery's.

Written from the published formulas alone and importing nothing from Rookery: one token at a time, one parameter at a
time. Names: C width, H heads of N channels, S the recurrent state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Weights = dict[str, Tensor]
Part = Callable[[str], Tensor]


@dataclass(frozen=True)
class Recipe:
    """The flags of a published script."""

    version: str
    steps: int
    ctx_len: int
    micro_bsz: int
    my_exit_tokens: int
    magic_prime: int
    lr_init: float
    lr_final: float
    warmup_steps: int
    weight_decay: float
    adam_eps: float
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0


def train(recipe: Recipe, weights: Weights, stream: np.ndarray) -> list[float]:
    """Train `weights` in place; the loss of every step."""
    for parameter in weights.values():
        parameter.requires_grad_()
    first = {name: torch.zeros_like(p) for name, p in weights.items()}
    second = {name: torch.zeros_like(p) for name, p in weights.items()}
    losses = []
    for step in range(recipe.steps):
        inputs, targets = batch(recipe, stream, step)
        logits = model(recipe.version, weights, inputs)
        loss = loss_with_l2wrap(logits, targets)
        for parameter in weights.values():
            parameter.grad = None
        loss.backward()
        losses.append(loss.item())
        update(recipe, weights, first, second, step)
    return losses


# Data


def batch(recipe: Recipe, stream: np.ndarray, step: int) -> tuple[Tensor, Tensor]:
    """Sample number ii (from 1) is the window (factor * ii^3) mod prime of the token stream."""
    factor = int(recipe.magic_prime * (math.sqrt(5) - 1) / 2)
    rows = []
    for i in range(recipe.micro_bsz):
        ii = 1 + step * recipe.micro_bsz + i
        start = (factor * ii * ii * ii) % recipe.magic_prime * recipe.ctx_len
        rows.append(stream[start : start + recipe.ctx_len + 1].astype(np.int64))
    windows = torch.from_numpy(np.stack(rows))
    return windows[:, :-1], windows[:, 1:]


# Loss


class L2Wrap(torch.autograd.Function):
    """Leaves the loss as it is and adds 1e-4/(B T) times each row's largest logit to that logit's gradient."""

    @staticmethod
    def forward(ctx, loss, logits):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        (logits,) = ctx.saved_tensors
        largest, where = torch.max(logits, -1, keepdim=True)
        added = torch.zeros_like(logits)
        added.scatter_(-1, where, largest * (1e-4 / (logits.shape[0] * logits.shape[1])))
        return upstream, added * upstream


def loss_with_l2wrap(logits: Tensor, targets: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, dim=-1)
    loss = -log_p.gather(-1, targets[..., None]).mean()
    return L2Wrap.apply(loss, logits)


# Optimiser


def group_of(version: str, name: str, parameter: Tensor) -> str:
    """ "1x", "2x" (twice the learning rate) or "decay" (weight decay)."""
    if version == "x070":
        if "att.w0" in name:
            return "2x"
    elif "_w1" in name or "_w2" in name or "time_mix" in name or "time_maa" in name or "time_faaaa" in name:
        return "1x"
    elif "time_decay" in name:
        return "2x"
    return "decay" if parameter.squeeze().dim() >= 2 and ".weight" in name else "1x"


def learning_rate(recipe: Recipe, step: int) -> float:
    tokens_of_a_step = recipe.ctx_len * recipe.micro_bsz
    warmup_tokens = recipe.warmup_steps * tokens_of_a_step
    progress = (step * tokens_of_a_step - warmup_tokens) / (recipe.my_exit_tokens - warmup_tokens)
    progress = min(1.0, max(0.0, progress))
    final = recipe.lr_final / recipe.lr_init
    lr = recipe.lr_init * ((0.5 + final / 2) + (0.5 - final / 2) * math.cos(math.pi * progress))
    if step < recipe.warmup_steps:
        lr *= 0.01 + 0.99 * step / recipe.warmup_steps
    return lr


@torch.no_grad()
def update(recipe: Recipe, weights: Weights, first: Weights, second: Weights, step: int) -> None:
    """Clip the gradients to a global norm, then AdamW."""
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in weights.values() if p.grad is not None))
    clip = min(1.0, recipe.grad_clip / (norm + 1e-6))
    for name, p in weights.items():
        if p.grad is None:
            continue
        group = group_of(recipe.version, name, p)
        lr = learning_rate(recipe, step) * (2 if group == "2x" else 1)
        grad = p.grad * clip
        if group == "decay":
            p -= lr * recipe.weight_decay * p
        m, v = first[name], second[name]
        m += (1 - recipe.beta1) * (grad - m)
        v += (1 - recipe.beta2) * (grad * grad - v)
        m_hat = m / (1 - recipe.beta1 ** (step + 1))
        v_hat = v / (1 - recipe.beta2 ** (step + 1))
        p -= lr * m_hat / (v_hat.sqrt() + recipe.adam_eps)


# Model


def model(version: str, weights: Weights, tokens: Tensor) -> Tensor:
    time_mix, channel_mix = {
        "x052": (time_mix_x052, channel_mix_x052),
        "x060": (time_mix_x060, channel_mix_x060),
        "x070": (time_mix_x070, channel_mix_x070),
    }[version]
    n_layer = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    shared: dict[str, Tensor] = {}
    x = weights["emb.weight"][tokens]
    x = layer_norm(x, weights["blocks.0.ln0.weight"], weights["blocks.0.ln0.bias"])
    for layer in range(n_layer):

        def block(name: str, prefix: str = f"blocks.{layer}.") -> Tensor:
            return weights[prefix + name]

        def att(name: str, block: Part = block) -> Tensor:
            return block("att." + name)

        def ffn(name: str, block: Part = block) -> Tensor:
            return block("ffn." + name)

        x = x + time_mix(layer_norm(x, block("ln1.weight"), block("ln1.bias")), att, shared)
        x = x + channel_mix(layer_norm(x, block("ln2.weight"), block("ln2.bias")), ffn)
    x = layer_norm(x, weights["ln_out.weight"], weights["ln_out.bias"])
    return x @ weights["head.weight"].T


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def head_norm(y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise each head of (B, T, H, N); weight and bias are (H N)."""
    one, zero = torch.ones(()), torch.zeros(())
    return layer_norm(y, one, zero, eps).flatten(2) * weight + bias


def previous(x: Tensor) -> Tensor:
    """Every token's predecessor, zero for the first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def with_bonus(r: Tensor, k: Tensor, v: Tensor, decay: Tensor, u: Tensor) -> Tensor:
    """y = r (u k v^T + S); S <- decay S + k v^T. All (B, T, H, N); S is [key, value]."""
    B, T, H, N = r.shape
    S = torch.zeros(B, H, N, N)
    y = []
    for t in range(T):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        y.append(((S + u[:, :, None] * kv) * r[:, t, :, :, None]).sum(2))
        S = decay[:, t, :, :, None] * S + kv
    return torch.stack(y, dim=1)


def time_mix_x052(x: Tensor, p: Part, shared: dict[str, Tensor]) -> Tensor:
    before = previous(x)

    def mixed(name: str) -> Tensor:
        return x * p(f"time_mix_{name}") + before * (1 - p(f"time_mix_{name}"))

    u = p("time_faaaa")
    heads = (*x.shape[:2], *u.shape)
    r = (mixed("r") @ p("receptance.weight").T).view(heads)
    k = (mixed("k") @ p("key.weight").T).view(heads)
    v = (mixed("v") @ p("value.weight").T).view(heads)
    g = silu(mixed("g") @ p("gate.weight").T)
    decay = torch.exp(-torch.exp(p("time_decay"))).expand(heads)
    y = with_bonus(r, k, v, decay, u) / 8
    return (head_norm(y, p("ln_x.weight"), p("ln_x.bias"), 1e-5) * g) @ p("output.weight").T


def channel_mix_x052(x: Tensor, p: Part) -> Tensor:
    before = previous(x)
    xk = x * p("time_mix_k") + before * (1 - p("time_mix_k"))
    xr = x * p("time_mix_r") + before * (1 - p("time_mix_r"))
    k = torch.relu(xk @ p("key.weight").T) ** 2
    return sigmoid(xr @ p("receptance.weight").T) * (k @ p("value.weight").T)


def time_mix_x060(x: Tensor, p: Part, shared: dict[str, Tensor]) -> Tensor:
    xx = previous(x) - x
    q = torch.tanh((x + xx * p("time_maa_x")) @ p("time_maa_w1"))
    width = q.shape[-1] // 5
    mixed = {}
    for j, name in enumerate("wkvrg"):
        m = q[..., j * width : (j + 1) * width] @ p("time_maa_w2")[j]
        mixed[name] = x + xx * (p(f"time_maa_{name}") + m)
    u = p("time_faaaa")
    heads = (*x.shape[:2], *u.shape)
    r = (mixed["r"] @ p("receptance.weight").T).view(heads)
    k = (mixed["k"] @ p("key.weight").T).view(heads)
    v = (mixed["v"] @ p("value.weight").T).view(heads)
    g = silu(mixed["g"] @ p("gate.weight").T)
    w = p("time_decay") + torch.tanh(mixed["w"] @ p("time_decay_w1")) @ p("time_decay_w2")
    y = with_bonus(r, k, v, torch.exp(-torch.exp(w)).view(heads), u)
    return (head_norm(y, p("ln_x.weight"), p("ln_x.bias"), 64e-5) * g) @ p("output.weight").T


def channel_mix_x060(x: Tensor, p: Part) -> Tensor:
    xx = previous(x) - x
    k = torch.relu((x + xx * p("time_maa_k")) @ p("key.weight").T) ** 2
    return sigmoid((x + xx * p("time_maa_r")) @ p("receptance.weight").T) * (k @ p("value.weight").T)


def time_mix_x070(x: Tensor, p: Part, shared: dict[str, Tensor]) -> Tensor:
    xx = previous(x) - x
    xr, xw, xk, xv, xa, xg = (x + xx * p(f"x_{name}") for name in "rwkvag")
    r, k, v = xr @ p("receptance.weight").T, xk @ p("key.weight").T, xv @ p("value.weight").T
    w = p("w0") + torch.tanh(xw @ p("w1")) @ p("w2")
    if "v_first" in shared:
        v = v + (shared["v_first"] - v) * sigmoid(p("v0") + xv @ p("v1") @ p("v2"))
    else:
        shared["v_first"] = v
    a = sigmoid(p("a0") + xa @ p("a1") @ p("a2"))
    g = sigmoid(xg @ p("g1")) @ p("g2")

    B, T, _ = x.shape
    H, N = p("r_k").shape
    heads = (B, T, H, N)
    kappa = (k * p("k_k")).view(heads)
    kappa = kappa / torch.clamp(torch.sqrt((kappa * kappa).sum(-1, keepdim=True)), min=1e-12)
    k = k * (1 + (a - 1) * p("k_a"))
    r, k, v, a = r.view(heads), k.view(heads), v.view(heads), a.view(heads)
    decay = torch.exp(-math.exp(-0.5) * sigmoid(w)).view(heads)

    S = torch.zeros(B, H, N, N)  # [value, key]
    y = []
    for t in range(T):
        removed = (S * -kappa[:, t, :, None, :]).sum(-1)
        S = (
            S * decay[:, t, :, None, :]
            + removed[..., None] * (kappa[:, t] * a[:, t])[:, :, None, :]
            + v[:, t, :, :, None] * k[:, t, :, None, :]
        )
        y.append((S * r[:, t, :, None, :]).sum(-1))
    out = head_norm(torch.stack(y, dim=1), p("ln_x.weight"), p("ln_x.bias"), 64e-5)
    out = out + ((r * k * p("r_k")).sum(-1, keepdim=True) * v).flatten(2)
    return (out * g) @ p("output.weight").T


def channel_mix_x070(x: Tensor, p: Part) -> Tensor:
    xx = previous(x) - x
    return (torch.relu((x + xx * p("x_k")) @ p("key.weight").T) ** 2) @ p("value.weight").T
