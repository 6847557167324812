"""What a person sees of a run: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from rookery.i18n import _
from rookery.train.callbacks import Callback, RunFacts
from rookery.train.monitor import Record
from rookery.train.rundir import Phase

REFRESH = 0.5
"""Seconds between two updates of the live line."""

PLAIN_EVERY = 10.0
"""Seconds between two plain lines."""


def display() -> Callback:
    """The display that fits standard output."""
    return LiveDisplay() if sys.stdout.isatty() else PlainDisplay()


class PlainDisplay(Callback):
    """One line at the first step, then every ten seconds, and at the last step."""

    def __init__(self) -> None:
        self._next = 0.0
        self._total_steps = 0

    def on_message(self, text: str) -> None:
        print(text, flush=True)

    def on_start(self, facts: RunFacts) -> None:
        self._total_steps = facts.total_steps

    def on_record(self, record: Record) -> None:
        now = time.monotonic()
        if now >= self._next or record.step == self._total_steps:
            self._next = now + PLAIN_EVERY
            line = _("step {step}/{total}", step=record.step, total=self._total_steps) + "  " + figures(record)
            if record.eta is not None and record.step < self._total_steps:
                line += "  " + _("{time} left", time=duration(record.eta))
            print(line, flush=True)

    def on_validation(self, step: int, loss: float) -> None:
        print(_("step {step}: validation loss {loss}", step=step, loss=f"{loss:.4f}"), flush=True)


class LiveDisplay(Callback):
    """A bar with the latest figures that stays at the bottom of the terminal; messages scroll above it."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._progress = Progress(
            TextColumn("{task.fields[phase]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            _Times(),
            console=self._console,
            # Drawn from the training thread: a thread of its own would take turns with it for the interpreter.
            auto_refresh=False,
            expand=True,
        )
        self._drawn = 0.0
        self._task: Task | None = None
        self._phase = ""
        self._record: Record | None = None

    def on_message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_start(self, facts: RunFacts) -> None:
        self._phase = phase_name("training")
        number = self._progress.add_task(
            "",
            total=facts.total_steps,
            completed=facts.first_step,
            phase=self._phase,
            figures=_("the first step also compiles"),
            eta=None,
            started=time.monotonic(),
        )
        self._task = self._progress.tasks[number]
        self._progress.start()
        self._progress.refresh()

    def on_phase(self, phase: Phase) -> None:
        self._phase = phase_name(phase)
        self._draw()

    def on_record(self, record: Record) -> None:
        self._record = record
        if time.monotonic() - self._drawn > REFRESH:
            self._draw()

    def on_validation(self, step: int, loss: float) -> None:
        self.on_message(_("step {step}: validation loss {loss}", step=step, loss=f"{loss:.4f}"))

    def on_end(self, phase: Phase, reason: str) -> None:
        self.on_phase(phase)
        self._progress.stop()

    def _draw(self) -> None:
        if self._task is None:
            return
        self._drawn = time.monotonic()
        fields: dict[str, Any] = {"phase": self._phase}
        if self._record is not None:
            fields |= {
                "completed": self._record.step,
                "figures": figures(self._record),
                "eta": self._record.eta,
            }
        self._progress.update(self._task.id, refresh=True, **fields)


class _Times(ProgressColumn):
    """Elapsed time and time left."""

    def render(self, task: Task) -> Text:
        elapsed = duration(time.monotonic() - task.fields["started"])
        eta = task.fields["eta"]
        left = duration(eta) if eta is not None else "-:--:--"
        return Text(_("{elapsed}, {left} left", elapsed=elapsed, left=left))


def figures(record: Record) -> str:
    """Loss, learning rate, speed and memory of one step, in one line."""
    parts = [
        _("loss {loss}", loss=f"{record.smooth_loss:.4f}"),
        _("lr {lr}", lr=f"{record.lr:.2e}"),
        _("{speed} tokens/s", speed=_short(record.tok_s)),
    ]
    if torch.cuda.is_initialized():
        parts.append(_("{memory} GB", memory=f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"))
    return "  ".join(parts)


def phase_name(phase: Phase) -> str:
    """The phase in the user's language."""
    return {
        "preparing": _("preparing"),
        "training": _("training"),
        "evaluating": _("validating"),
        "saving": _("saving"),
        "done": _("done"),
        "stopped": _("stopped"),
        "failed": _("failed"),
    }[phase]


def duration(seconds: float) -> str:
    """`1:02:03`."""
    seconds = round(max(0.0, seconds))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _short(number: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
