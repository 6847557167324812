"""What happens between steps: validation, RWKV-LM's log line and weights each mini-epoch, checkpoints, the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rookery.config import TrainConfig
from rookery.errors import Interrupted, UserError
from rookery.i18n import _
from rookery.train import checkpoint
from rookery.train.callbacks import Callback
from rookery.train.interrupt import StopRequest
from rookery.train.loop import Step
from rookery.train.monitor import Monitor, Record
from rookery.train.ranks import Ranks
from rookery.train.rundir import RunFiles
from rookery.train.strategies.engine import Engine

SAVE_SECONDS = 600.0
"""Time between full checkpoints when `save_every` is not given."""

SAVE_SECONDS_AT_EPOCH = 60.0
"""The end of a mini-epoch also brings a checkpoint, unless the last one is younger than this."""


@dataclass
class Progress:
    """What a checkpoint remembers of the training beside weights and generators."""

    run_first_step: int
    """Step at which this run began, in whatever session: 0, or that after the rwkv-N.pth it went on from."""
    step: int
    """Steps done."""
    epoch_loss: float = 0.0
    """Sum of the losses of the current mini-epoch."""
    epoch_count: int = 0
    """Steps of the current mini-epoch."""
    smooth_loss: float = math.nan
    val_loss: float | None = None
    best_val_loss: float | None = None
    worse_validations: int = 0
    """Validations since the best one."""
    validation_owed: bool = False
    """Whether a stop cut the validation of this step short: it comes first when the run goes on."""
    engine: dict[str, Any] = field(default_factory=dict)


class StoppedEarly(Exception):
    """The validation loss has not become better for `early_stop` validations; everything is saved."""


class Keeper(Callback):
    """Called after each step and told about each record."""

    def __init__(
        self,
        config: TrainConfig,
        progress: Progress,
        *,
        engine: Engine,
        ranks: Ranks,
        rundir: RunFiles,
        monitor: Monitor,
        observers: Callback,
        stop: StopRequest,
        validate: Callable[[], float | None] | None,
        save_weights: Callable[[str | int], Path],
        epoch_steps: int,
        total_steps: int,
    ) -> None:
        """
        Args:
            config: resolved.
            progress: where the training stands; kept up to date here.
            ranks: all of which decide, save and validate together; rank 0 alone writes the log.
            monitor: flushed before anything is saved, so that a diverged model is never saved.
            validate: computes the validation loss; None when interrupted.
            save_weights: writes the weights for others to use, under a name such as 3, "best" or "final".
        """
        self.progress = progress
        self._config = config
        self._engine = engine
        self._ranks = ranks
        self._rundir = rundir
        self._monitor = monitor
        self._observers = observers
        self._stop = stop
        self._validate = validate
        self._write_weights = save_weights
        self._epoch_steps = epoch_steps
        self._total_steps = total_steps
        self._saved_at = time.monotonic()
        self._lr = 0.0

    def on_record(self, record: Record) -> None:
        self._lr = record.lr
        self.progress.step = record.step
        self.progress.epoch_loss += record.loss
        self.progress.epoch_count += 1
        self.progress.smooth_loss = record.smooth_loss

    def __call__(self, step: Step) -> None:
        epoch_ends = step.number % self._epoch_steps == 0
        finished = step.number == self._total_steps
        # What one rank alone knows, signals and its clock, all must act upon at the same step.
        stopping, checkpoint_due = self._ranks.any(
            self._stop.made, self._ranks.main and self._checkpoint_due(step.number, epoch_ends)
        )
        validation_due = self._validate is not None and self._validation_due(step.number, epoch_ends or finished)
        if not (epoch_ends or finished or checkpoint_due or validation_due or stopping):
            return
        self._monitor.flush()
        if validation_due:
            self._run_validation()
        early = not finished and self.stopped_early()
        if epoch_ends or finished or early:
            self._end_epoch(step.number, whole=epoch_ends)
        if finished or early:
            self._save_weights("final")
        (stopping,) = self._ranks.any(self._stop.made)  # validation may have taken long
        if checkpoint_due or finished or early or stopping:
            self.save_checkpoint()
        if early:
            raise StoppedEarly
        if stopping and not finished:
            raise self._interrupted(step.number)
        if not finished:
            self._observers.on_phase("training")
        self._monitor.restart_clock()

    def _interrupted(self, step: int) -> Interrupted:
        return Interrupted(_("Stopped and saved at step {step}. The same command goes on from here.", step=step))

    def _checkpoint_due(self, step: int, epoch_ends: bool) -> bool:
        every = self._config.run.save_every
        if every is not None:
            return every > 0 and step % every == 0
        age = time.monotonic() - self._saved_at
        return age > SAVE_SECONDS or (epoch_ends and age > SAVE_SECONDS_AT_EPOCH)

    def _validation_due(self, step: int, epoch_ends: bool) -> bool:
        every = self._config.data.val_every
        return epoch_ends or (every > 0 and step % every == 0)

    def _run_validation(self) -> None:
        assert self._validate is not None
        self._observers.on_phase("evaluating")
        loss = self._validate()
        self.progress.validation_owed = loss is None
        if loss is None:
            return
        if not math.isfinite(loss):
            self.progress.worse_validations += 1
            self._observers.on_message(_("the validation loss is not finite at step {step}", step=self.progress.step))
            return
        self.progress.val_loss = loss
        self._observers.on_validation(self.progress.step, loss)
        if self.progress.best_val_loss is None or loss < self.progress.best_val_loss:
            self.progress.best_val_loss, self.progress.worse_validations = loss, 0
            self._save_weights("best")
        else:
            self.progress.worse_validations += 1

    def catch_up(self) -> None:
        """Before the first step: the validation that a stop cut short.

        Raises:
            StoppedEarly: by that one, `early_stop` would have ended the run.
            Interrupted: it was cut short again.
        """
        if not self.progress.validation_owed or self._validate is None:
            return
        self._run_validation()
        if self.progress.validation_owed:
            raise self._interrupted(self.progress.step)
        if self.stopped_early():
            self._save_weights("final")
            raise StoppedEarly
        self._observers.on_phase("training")

    def stopped_early(self) -> bool:
        """Whether `early_stop` ends the run here."""
        return 0 < self._config.data.early_stop <= self.progress.worse_validations

    def _end_epoch(self, step: int, *, whole: bool) -> None:
        """Log line and weights of the mini-epoch that ended; of the last one also when it is not whole."""
        epoch = (step - 1) // self._epoch_steps
        epoch_of_run = epoch - self.progress.run_first_step // self._epoch_steps
        loss = self.progress.epoch_loss / max(1, self.progress.epoch_count)
        perplexity = math.exp(min(loss, 700.0))
        if self._ranks.main:
            with self._rundir.log_file.open("a", encoding="utf-8") as log:
                log.write(f"{epoch} {loss:.6f} {perplexity:.4f} {self._lr:.8f} {datetime.now()} {epoch_of_run}\n")
        self.progress.epoch_loss, self.progress.epoch_count = 0.0, 0
        every = self._config.run.epoch_save
        last = step + self._epoch_steps > self._total_steps
        if whole and (last or (every > 0 and epoch_of_run % every == 0)):
            self._save_weights(epoch)
        self._observers.on_message(_("mini-epoch {epoch}: loss {loss}", epoch=epoch, loss=f"{loss:.4f}"))

    def _save_weights(self, name: str | int) -> None:
        self._observers.on_phase("saving")
        with self._ranks.patience():
            self._write_weights(name)

    def save_checkpoint(self) -> None:
        """Saves everything needed to go on exactly from here.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        self._observers.on_phase("saving")
        self.progress.engine = self._engine.state_dict()
        try:
            checkpoint.write(
                self._rundir.checkpoints, self.progress.step, vars(self.progress), self._engine.save, self._ranks
            )
        except OSError as error:
            raise UserError(
                _(
                    "cannot save a checkpoint in {folder}: {reason}. Earlier checkpoints are untouched; "
                    "make room and run the same command again.",
                    folder=self._rundir.checkpoints,
                    reason=error,
                )
            ) from error
        self._saved_at = time.monotonic()
