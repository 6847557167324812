"""Learning rate and weight decay of every optimiser step, as RWKV-LM computes them.

Source: `train_callback.on_train_batch_start` of RWKV-LM/RWKV-v5, which is the general form; the x070 trainer
(RWKV-v7/train_temp) knows only the case `exit_tokens > 0`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rates:
    """What the optimiser uses in one step."""

    lr: float
    """Base learning rate; a parameter group multiplies it by its own scale."""
    weight_decay: float
    """Decoupled weight decay of the groups that decay."""
    progress: float
    """Part of the schedule that lies behind, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Cosine over tokens (`exit_tokens > 0`), exponential or linear over mini-epochs (0), or their average (< 0)."""

    lr_init: float
    lr_final: float
    warmup_steps: int
    """Steps at the beginning of this run with a reduced rate: 0.01 + 0.99 * step / warmup_steps."""
    tokens_per_step: int
    exit_tokens: int
    """Tokens to train on; the sign selects the form."""
    epoch_steps: int
    epoch_count: int
    first_step: int = 0
    """Step at which this run began: warm-up counts from here, everything else from step 0."""
    weight_decay: float = 0.0
    weight_decay_final: float = -1.0
    """Weight decay that is approached exponentially; not positive = constant."""
    edecay: int = 0
    """Mini-epochs before the exponential or linear decay begins (the reference's `my_pile_edecay`)."""
    last_epoch: int | None = None
    """Mini-epoch after which to stop, wherever the schedule stands then (the reference's `my_exit`)."""

    @property
    def total_steps(self) -> int:
        """Number of the step before which training stops: all tokens are used, or all mini-epochs done."""
        steps = self.epoch_count * self.epoch_steps
        if self.exit_tokens:
            steps = -(-abs(self.exit_tokens) // self.tokens_per_step)
        return steps if self.last_epoch is None else min(steps, (self.last_epoch + 1) * self.epoch_steps)

    def at(self, step: int) -> Rates:
        """The rates of optimiser step `step`, counted from 0 over the whole training, earlier runs included."""
        warmup = self.warmup_steps
        lr, progress = self.lr_init, 0.0

        if self.epoch_count > 0:
            decay_steps = (self.epoch_count - self.edecay) * self.epoch_steps - warmup
            progress = _clamp((step - self.edecay * self.epoch_steps - warmup + 1) / max(decay_steps, 1))
            if self.lr_final == self.lr_init:
                lr = self.lr_init
            elif self.lr_final == 0 or self.lr_init == 0:
                lr = self.lr_init + (self.lr_final - self.lr_init) * progress
            else:
                lr = self.lr_init * (self.lr_final / self.lr_init) ** progress

        if self.exit_tokens:
            warmup_tokens = warmup * self.tokens_per_step
            decay_tokens = abs(self.exit_tokens) - warmup_tokens
            progress = _clamp((step * self.tokens_per_step - warmup_tokens) / max(decay_tokens, 1))
            mean, half_range = (self.lr_init + self.lr_final) / 2, (self.lr_init - self.lr_final) / 2
            cosine = mean + half_range * math.cos(math.pi * progress)
            lr = cosine if self.exit_tokens > 0 else (lr + cosine) / 2

        if step - self.first_step < warmup:
            lr *= 0.01 + 0.99 * (step - self.first_step) / warmup

        weight_decay = self.weight_decay
        if self.weight_decay > 0 and self.weight_decay_final > 0:
            weight_decay *= (self.weight_decay_final / self.weight_decay) ** progress
        return Rates(lr, weight_decay, progress)


def _clamp(value: float) -> float:
    return min(1.0, max(0.0, value))
