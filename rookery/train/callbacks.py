"""Who follows a run: the interface, and the observers that write its files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rookery.config import TrainConfig
from rookery.train.device import used_memory
from rookery.train.monitor import Record
from rookery.train.rundir import Phase, RunDir


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What is known when training begins."""

    config: TrainConfig
    proj_dir: Path
    first_step: int
    """Steps done before this session."""
    total_steps: int
    tokens_per_step: int
    epoch_steps: int
    parameters: int
    trained_parameters: int
    device: str
    """`cpu`, `cuda:0` …"""


def flat(config: TrainConfig) -> dict[str, Any]:
    """Leaf name -> value, without sections."""
    return {leaf: value for section in config.model_dump().values() for leaf, value in section.items()}


class Callback:
    """Follows a run. Every method does nothing here; a subclass overrides those it needs.

    The order of calls: `on_message` at any time, `on_start`, then `on_record` for each step and `on_validation` and
    `on_phase` in between, `on_end` once, also when the run fails.
    """

    def on_message(self, text: str) -> None:
        """A sentence for the user."""

    def on_phase(self, phase: Phase) -> None:
        """What the run does from now on."""

    def on_start(self, facts: RunFacts) -> None:
        """The first step comes next."""

    def on_record(self, record: Record) -> None:
        """A step was made."""

    def on_validation(self, step: int, loss: float) -> None:
        """Mean loss over the validation data after `step` steps."""

    def on_end(self, phase: Phase, reason: str) -> None:
        """The run has ended: `done`, `stopped` or `failed`, and why."""


class MetricsFile(Callback):
    """metrics.jsonl: a line every `every` steps, and one for each validation."""

    def __init__(self, file: Path, every: int = 1) -> None:
        # Line by line: what was reported is in the file, whatever happens to the process.
        self._stream = file.open("a", encoding="utf-8", buffering=1)
        self._every = every

    def on_record(self, record: Record) -> None:
        if record.step % self._every == 0:
            self._write(
                {
                    "step": record.step,
                    "loss": record.loss,
                    "lr": record.lr,
                    "grad_norm": record.grad_norm if math.isfinite(record.grad_norm) else None,
                    "tokens": record.tokens,
                    "tok_s": round(record.tok_s, 1),
                    "memory": used_memory(),
                    "time": round(record.time, 3),
                }
            )

    def on_validation(self, step: int, loss: float) -> None:
        self._write({"step": step, "val_loss": loss, "time": round(time.time(), 3)})

    def on_end(self, phase: Phase, reason: str) -> None:
        self._stream.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line) + "\n")


class StatusFile(Callback):
    """status.json, at most once a second while training."""

    EVERY = 1.0

    def __init__(self, rundir: RunDir) -> None:
        self._rundir = rundir
        self._total_steps = 0
        self._written = 0.0
        self._last: Record | None = None

    def on_phase(self, phase: Phase) -> None:
        self._rundir.write_status(phase=phase)

    def on_start(self, facts: RunFacts) -> None:
        self._total_steps = facts.total_steps
        self._rundir.write_status(
            phase="training",
            step=facts.first_step,
            total_steps=facts.total_steps,
            progress=facts.first_step / max(1, facts.total_steps),
            eta=None,
        )

    def on_record(self, record: Record) -> None:
        self._last = record
        if time.monotonic() - self._written > self.EVERY:
            self._written = time.monotonic()
            self._rundir.write_status(phase="training", **self._figures())

    def on_validation(self, step: int, loss: float) -> None:
        self._rundir.write_status(val_loss=loss)

    def on_end(self, phase: Phase, reason: str) -> None:
        self._rundir.write_status(phase=phase, exit_reason=reason, **self._figures())

    def _figures(self) -> dict[str, Any]:
        record = self._last
        if record is None:
            return {}
        return {
            "step": record.step,
            "progress": record.step / self._total_steps,
            "eta": None if record.eta is None else round(record.eta, 1),
            "loss": record.smooth_loss,
            "tok_s": round(record.tok_s, 1),
        }


class Observers(Callback):
    """Several callbacks as one."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self._callbacks = list(callbacks)

    def add(self, callback: Callback) -> None:
        self._callbacks.append(callback)

    def on_message(self, text: str) -> None:
        for callback in self._callbacks:
            callback.on_message(text)

    def on_phase(self, phase: Phase) -> None:
        for callback in self._callbacks:
            callback.on_phase(phase)

    def on_start(self, facts: RunFacts) -> None:
        for callback in self._callbacks:
            callback.on_start(facts)

    def on_record(self, record: Record) -> None:
        for callback in self._callbacks:
            callback.on_record(record)

    def on_validation(self, step: int, loss: float) -> None:
        for callback in self._callbacks:
            callback.on_validation(step, loss)

    def on_end(self, phase: Phase, reason: str) -> None:
        for callback in self._callbacks:
            callback.on_end(phase, reason)
