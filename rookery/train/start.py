"""Where a run begins: at a checkpoint of its own, at a weight file, or at initial weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rookery.config import TrainConfig
from rookery.errors import UserError
from rookery.formats import read_weights, shape_of
from rookery.i18n import _
from rookery.models import ModelShape
from rookery.train import checkpoint
from rookery.train.rundir import RunFiles
from rookery.train.strategies.single import WEIGHTS_FILE


@dataclass(frozen=True)
class Start:
    """What a run goes on from. A new model has no file."""

    file: Path | None = None
    """The weights; of a checkpoint, its masters."""
    tensors: dict[str, Tensor] | None = None
    checkpoint: Path | None = None
    state: dict[str, Any] | None = None
    """The checkpoint's state.json."""
    epoch: int = 0
    """First mini-epoch, when there is no checkpoint."""

    @property
    def shape(self) -> ModelShape | None:
        return None if self.tensors is None else shape_of(self.tensors, str(self.file))

    def model_facts(self) -> dict[str, Any] | None:
        """What `rookery.config.resolve` wants to know of the weights."""
        shape = self.shape
        return None if shape is None else asdict(shape) | {"file": str(self.file)}


def find_start(config: TrainConfig, files: RunFiles, report: Callable[[str], None]) -> Start:
    """The newest sound checkpoint; else, from stage 2 on, the newest sound rwkv-N.pth of the run directory, where
    RWKV-LM's trainer goes on; else `load_model`; else rwkv-init.pth (stage 2 on); else nothing.

    Args:
        report: told about each file that had to be passed over.
    """
    for folder in checkpoint.newest_first(files.checkpoints):
        try:
            state = checkpoint.verify(folder)
        except checkpoint.CorruptCheckpoint as error:
            report(_("{folder} is damaged ({reason}) and is passed over", folder=folder, reason=error))
            continue
        file = folder / WEIGHTS_FILE
        return Start(file, read_weights(file), folder, state)

    if config.run.train_stage >= 2:
        for number, file in files.numbered_weights():
            if number < 0 and config.model.load_model:
                continue
            try:
                tensors = read_weights(file)
                shape_of(tensors, str(file))
            except UserError as error:
                report(_("{file} is passed over: {reason}", file=file, reason=error))
                continue
            return Start(file, tensors, epoch=number + 1 if number >= 0 else config.run.epoch_begin)

    if config.model.load_model:
        file = Path(config.model.load_model)
        return Start(file, read_weights(file), epoch=config.run.epoch_begin)
    return Start(epoch=config.run.epoch_begin)
