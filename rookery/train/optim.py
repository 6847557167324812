"""Parameter groups by name, and the optimiser over them.

Source: `configure_optimizers` of RWKV-LM: RWKV-v7/train_temp for x070, RWKV-v5 for x052 and x060.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rookery.train.lean_adamw import LeanAdamW
from rookery.train.schedule import Rates


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share a learning rate scale and decide together whether they decay."""

    lr_scale: float
    decays: bool
    names: list[str]


def parameter_groups(
    parameters: Iterable[tuple[str, Tensor]],
    version: str,
    *,
    weight_decay: bool,
    layerwise_lr: bool = True,
    second_stage: bool = False,
    lora_plus_ratio: float = 1.0,
) -> list[Group]:
    """The reference's groups, names sorted within each; a group may be empty.

    Args:
        parameters: names and tensors of what is trained.
        version: "x052", "x060" or "x070".
        weight_decay: whether anything decays; then the last group holds emb, head and the large matrices.
        layerwise_lr: whether decay parameters learn faster than the rest.
        second_stage: `train_stage 2`, where x052 and x060 raise all time-mixing parameters to scale 5.
        lora_plus_ratio: scale of the matrices `lora_B` (LoRA+, arXiv:2402.12354).
    """
    tensors = dict(parameters)
    if lora_plus_ratio != 1:
        fast = sorted(name for name in tensors if name.endswith(".lora_B"))
        slow = [(name, tensor) for name, tensor in tensors.items() if name not in fast]
        groups = parameter_groups(
            slow, version, weight_decay=weight_decay, layerwise_lr=layerwise_lr, second_stage=second_stage
        )
        return [*groups, Group(lora_plus_ratio, weight_decay, fast)]
    kind = _x070_kind if version == "x070" else _x052_x060_kind
    raised = second_stage and version != "x070"
    group_of = {"mix": "2x", "decay rate": "3x"} if raised else {"mix": "1x", "decay rate": "2x"}
    members: dict[str, list[str]] = {"1x": [], "2x": [], "3x": [], "decay": []}
    for name, tensor in sorted(tensors.items()):
        kind_of_name = kind(name) if layerwise_lr else None
        if kind_of_name is None:
            matrix = tensor.squeeze().dim() >= 2 and (".weight" in name or ".adapters." in name)
            matrix = matrix or "time_state" in name
            kind_of_name = "decay" if weight_decay and matrix else "1x"
        members[group_of.get(kind_of_name, kind_of_name)].append(name)

    groups = [Group(1.0, False, members["1x"])]
    if layerwise_lr:
        groups.append(Group(5.0 if raised else 2.0, False, members["2x"]))
        if version != "x070":
            groups.append(Group(5.0 if raised else 3.0, False, members["3x"]))
    if weight_decay:
        groups.append(Group(1.0, True, members["decay"]))
    return groups


def _x070_kind(name: str) -> str | None:
    return "decay rate" if "att.w0" in name else None


def _x052_x060_kind(name: str) -> str | None:
    if "_w1" in name or "_w2" in name:
        return "1x"
    if "time_mix" in name or "time_maa" in name or "time_faaaa" in name:
        return "mix"
    if "time_decay" in name or "time_daaaa" in name:
        return "decay rate"
    return "3x" if "time_first" in name else None


class AdamW:
    """PyTorch's fused AdamW, with the attributes, groups and state of `torch.optim.AdamW`.

    It is called without that class, which imports PyTorch's compiler, a second of every start, and whose bookkeeping is
    half of a small model's update.
    """

    grad_scale: Tensor | None = None
    """0-dim: what gradients were multiplied by."""
    found_inf: Tensor | None = None
    """0-dim: if it is not 0, the step changes nothing."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        """`groups`: as of PyTorch's optimisers; the tensors of one have a dtype and a device in common."""
        self.param_groups = [{"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0, **group} for group in groups]
        self.state: dict[Tensor, dict[str, Any]] = defaultdict(dict)

    @torch.no_grad()
    def step(self) -> None:
        found_inf = self.found_inf
        if found_inf is not None and found_inf.device.type == "cpu":  # which need not be waited for
            if found_inf:
                return
            found_inf = None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states = [self.state[p] or self._begin(p) for p in parameters]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                parameters,
                [p.grad for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=False, grad_scale=self.grad_scale, found_inf=found_inf,
            )  # fmt: skip
            if found_inf is not None:
                torch._foreach_sub_(steps, [found_inf] * len(steps))

    def _begin(self, p: Tensor) -> dict[str, Tensor]:
        self.state[p] |= {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
        }
        return self.state[p]

    def as_torch(self) -> torch.optim.AdamW:
        """PyTorch's own with the same groups, for those who ask for one."""
        groups = [dict(group) for group in self.param_groups]
        return torch.optim.AdamW(groups, lr=0.0, fused=True)

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


Optimizer = AdamW | LeanAdamW


def build_optimizer(
    tensors: Mapping[str, Tensor],
    groups: Iterable[Group],
    *,
    betas: tuple[float, float],
    eps: float,
    eight_bit: bool = False,
) -> Optimizer:
    """AdamW over `tensors`: with PyTorch's fused kernel, which CPU and CUDA both have, or `LeanAdamW`.

    Every group keeps its `lr_scale`, `decays` and `names` beside PyTorch's keys.

    Args:
        tensors: fp32 or fp64; in bf16, they are rounded by chance (`LeanAdamW`).
        eight_bit: keep the moments of large matrices in 8 bits.
    """
    made = [
        {
            "params": [tensors[name] for name in group.names],
            "names": group.names,
            "lr_scale": group.lr_scale,
            "decays": group.decays,
        }
        for group in groups
        if group.names
    ]
    if eight_bit or any(tensor.dtype == torch.bfloat16 for tensor in tensors.values()):
        return LeanAdamW(made, betas=betas, eps=eps, eight_bit=eight_bit)
    return AdamW(made, betas=betas, eps=eps)


def apply_rates(optimizer: Optimizer | torch.optim.Optimizer, rates: Rates) -> None:
    """Sets each group's learning rate and weight decay for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rates.lr * group["lr_scale"]
        group["weight_decay"] = rates.weight_decay if group["decays"] else 0.0
