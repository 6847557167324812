"""From the tensors of steps to numbers, without waiting for the device at every step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rookery.train.loop import Step
from rookery.train.strategies.engine import Engine

LONGEST_WAIT = 0.5
"""Seconds between two looks at a GPU's results; a CPU's are there at once."""

SMOOTHING = 0.05
"""Weight of the newest step in the smoothed loss and speed."""


@dataclass(frozen=True, slots=True)
class Record:
    """One optimiser step in numbers."""

    step: int
    """Steps done, this one included, over the whole training."""
    loss: float
    lr: float
    weight_decay: float
    grad_norm: float
    """Before clipping; not finite when fp16 gradients overflowed and the step was left out."""
    tokens: int
    """Tokens read so far."""
    tok_s: float
    time: float
    """Seconds since 1970."""
    smooth_loss: float
    eta: float | None
    """Seconds to the end at the smoothed speed; None at the first step, which tells nothing."""


class Diverged(Exception):
    """Loss or gradients of `step` were not finite; the model is as it was before it."""

    def __init__(self, step: Step) -> None:
        super().__init__(f"step {step.number} is not finite")
        self.step = step


class Monitor:
    """Called after each step; tells `observe` about each in order, once its numbers are known."""

    def __init__(
        self, engine: Engine, observe: Callable[[Record], None], *, tokens_per_step: int, total_steps: int
    ) -> None:
        self._engine = engine
        self._observe = observe
        self._tokens_per_step = tokens_per_step
        self._total_steps = total_steps
        self._waiting: list[Step] = []
        self._smooth_loss = math.nan
        self._smooth_seconds = math.nan
        self._warm = False
        self.restart_clock()

    def restart_clock(self) -> None:
        """What happened since the last step was no training: it does not count in the speed."""
        self._last = time.perf_counter()

    def __call__(self, step: Step) -> None:
        self._waiting.append(step)
        if self._engine.device.type == "cpu" or time.perf_counter() - self._last > LONGEST_WAIT:
            self.flush()

    def flush(self) -> None:
        """Reports every step made so far.

        Raises:
            Diverged: one of them was not finite; those before it have been reported.
        """
        if not self._waiting:
            return
        steps, self._waiting = self._waiting, []
        numbers = torch.stack([torch.stack((step.loss, step.grad_norm)).float() for step in steps]).tolist()
        now = time.perf_counter()
        seconds = max(now - self._last, 1e-9) / len(steps)
        self._last = now
        self._smooth_seconds = _smooth(self._smooth_seconds, seconds)
        if not self._warm:
            # The first step compiles kernels: it says nothing of the speed to come.
            self._warm, self._smooth_seconds = True, math.nan
        diverged = self._engine.diverged()
        for step, (loss, grad_norm) in zip(steps, numbers, strict=True):
            if diverged and not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise Diverged(step)
            self._smooth_loss = _smooth(self._smooth_loss, loss)
            self._observe(
                Record(
                    step=step.number,
                    loss=loss,
                    lr=step.rates.lr,
                    weight_decay=step.rates.weight_decay,
                    grad_norm=grad_norm,
                    tokens=step.number * self._tokens_per_step,
                    tok_s=self._tokens_per_step / seconds,
                    time=time.time(),
                    smooth_loss=self._smooth_loss,
                    eta=None
                    if math.isnan(self._smooth_seconds)
                    else (self._total_steps - step.number) * self._smooth_seconds,
                )
            )


def _smooth(average: float, value: float) -> float:
    return value if math.isnan(average) else average + SMOOTHING * (value - average)
