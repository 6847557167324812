"""What `precision` means: the dtype of the model, and the scaling that fp16 gradients need."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""dtype of the model's parameters and activations, and of the .pth files a run writes."""


def set_matmul_precision(name: str) -> None:
    """tf32 lets CUDA round the inputs of fp32 matrix products to 10 bits of mantissa; the others forbid it."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")


class LossScale:
    """Keeps fp16 gradients in range: halves when one overflows, doubles after 2000 steps without.

    Lives on the device, so that nothing waits for it. The rule and the constants are those of `torch.amp.GradScaler`.
    """

    GROWTH_INTERVAL = 2000
    SMALLEST = 2.0**-14
    """Below this, gradients overflow for another reason than the scale."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(2.0**16, device=device)
        self.good_steps = torch.tensor(0.0, device=device)

    def update(self, overflow: Tensor) -> None:
        """`overflow`: 0-dim bool, whether this step's gradients were not finite."""
        good_steps = torch.where(overflow, 0.0, self.good_steps + 1)
        grow = good_steps >= self.GROWTH_INTERVAL
        self.scale = torch.where(overflow, self.scale * 0.5, torch.where(grow, self.scale * 2, self.scale))
        self.good_steps = torch.where(grow, 0.0, good_steps)

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale.item(), "good_steps": self.good_steps.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale.fill_(state["scale"])
        self.good_steps.fill_(state["good_steps"])
