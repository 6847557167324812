"""Weights & Biases and TensorBoard: optional, and never a reason for a run to stop."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rookery.i18n import _
from rookery.train.callbacks import Callback, RunFacts, flat
from rookery.train.monitor import Record
from rookery.train.rundir import Phase

WANDB_ID_FILE = "wandb-id.txt"
TENSORBOARD_FOLDER = "tensorboard"

ONLINE_SECONDS = 30
"""How long Weights & Biases may take to answer before the run is recorded offline."""


class Tracker(Callback):
    """A callback whose failures end the tracking and not the run."""

    def __init__(self, name: str, report: Callable[[str], None]) -> None:
        self._name = name
        self._report = report
        self._works = True

    def open(self, facts: RunFacts) -> None:
        raise NotImplementedError

    def log(self, step: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def on_start(self, facts: RunFacts) -> None:
        self._try(self.open, facts)

    def on_record(self, record: Record) -> None:
        values = {
            "loss": record.loss,
            "lr": record.lr,
            "wd": record.weight_decay,
            "Gtokens": record.tokens / 1e9,
            "kt/s": record.tok_s / 1e3,
        }
        if math.isfinite(record.grad_norm):
            values["grad_norm"] = record.grad_norm
        self._try(self.log, record.step, values)

    def on_validation(self, step: int, loss: float) -> None:
        self._try(self.log, step, {"val_loss": loss})

    def on_end(self, phase: Phase, reason: str) -> None:
        self._try(self.close)

    def _try(self, call: Callable[..., None], *arguments: Any) -> None:
        if not self._works:
            return
        try:
            call(*arguments)
        except Exception as error:  # whatever a tracker's library does, the training goes on
            self._works = False
            self._report(_("{name} is off for the rest of this run: {reason}", name=self._name, reason=error))


class WandB(Tracker):
    """Sends RWKV-LM's keys to Weights & Biases; a run that is continued continues its curve."""

    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__("Weights & Biases", report)

    def open(self, facts: RunFacts) -> None:
        try:
            import wandb
        except ImportError:
            raise ModuleNotFoundError(_("it is not installed (pip install wandb)")) from None
        id_file = facts.proj_dir / WANDB_ID_FILE
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        log = facts.config.log
        settings = {"console": "off", "quiet": True, "init_timeout": ONLINE_SECONDS}
        init = partial(
            wandb.init,
            project=log.wandb,
            name=log.run_name or None,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            config=flat(facts.config),
            dir=str(facts.proj_dir),
        )
        try:
            self._run = init(settings=settings)
        except wandb.errors.Error:  # no network, or no login
            self._run = init(settings=settings | {"mode": "offline"})
        if self._run.offline:
            self._report(
                _(
                    "Weights & Biases is offline; upload later with: wandb sync {folder}",
                    folder=Path(self._run.dir).parent,
                )
            )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard(Tracker):
    """Writes event files into `tensorboard/` of the run directory."""

    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__("TensorBoard", report)

    def open(self, facts: RunFacts) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ModuleNotFoundError(_("it is not installed (pip install tensorboard)")) from None
        # Steps of an earlier session that were lost are hidden by those that replace them.
        self._writer = SummaryWriter(str(facts.proj_dir / TENSORBOARD_FOLDER), purge_step=facts.first_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()
