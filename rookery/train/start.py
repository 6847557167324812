"""Where a run begins: at a checkpoint of its own, at a weight file, or at initial weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rookery.config import TrainConfig
from rookery.errors import UserError
from rookery.formats import AdapterFile, read_adapter, read_weights, shape_of
from rookery.formats.adapter import read_own
from rookery.formats.load import sources_of
from rookery.formats.pieces import WEIGHTS, Pieces
from rookery.i18n import _
from rookery.models import ModelShape
from rookery.train import checkpoint
from rookery.train.ranks import Ranks
from rookery.train.rundir import RunFiles


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
    adapter: AdapterFile | None = None
    """Of an adapter's training: the adapter it goes on with, fitted to the base, which is `file`."""

    @property
    def shape(self) -> ModelShape | None:
        return None if self.tensors is None else shape_of(self.tensors, str(self.file))

    def model_facts(self) -> dict[str, Any] | None:
        """What `rookery.config.resolve` wants to know of the weights."""
        shape = self.shape
        return None if shape is None else asdict(shape) | {"file": str(self.file)}

    def adapter_facts(self) -> dict[str, Any] | None:
        """What `rookery.config.resolve` wants to know of the adapter."""
        if self.adapter is None:
            return None
        found = self.adapter.config
        return {
            "file": str(self.adapter.path),
            "peft": found.method,
            "lora_r": found.r,
            "lora_alpha": found.alpha,
            "rslora": found.rslora,
            "miss_mode": found.miss_mode,
            "target_modules": None if found.targets is None else list(found.targets),
            "train_parts": list(found.train_parts),
        }


def find_start(config: TrainConfig, files: RunFiles, report: Callable[[str], None], ranks: Ranks) -> Start:
    """The newest sound checkpoint; else, from stage 2 on, the newest sound rwkv-N.pth of the run directory, where
    RWKV-LM's trainer goes on; else `load_model`; else rwkv-init.pth (stage 2 on); else nothing.

    Stage 1 begins with `load_model` or with nothing. In fine-tuning with `peft`, checkpoints, rwkv-N.pth of states and
    adapter-N.safetensors hold only what trains, and are put over the weights of `load_model` or rwkv-init.pth.

    Args:
        report: told about each file that had to be passed over.
        ranks: read the checkpoints' files together.

    Raises:
        UserError: no file of the run directory can be read, or fine-tuning has no model to begin with.
    """
    load_model, stage = config.model.load_model, config.run.train_stage
    if (config.adapter.peft != "none" or config.adapter.adapter_load) and stage != 1:
        return _find_fine_tuning(config, files, report, ranks)
    if stage != 1:
        for found in _checkpoints(files, report, ranks):
            return found
    damaged = ""
    if stage >= 2:
        for number, file in files.numbered_weights():
            if number < 0 and load_model:
                continue
            try:
                tensors = _merged_init_state(read_weights(file), files)
                shape_of(tensors, str(file))
            except UserError as error:
                damaged = damaged or str(error)
                report(_("{file} is passed over: {reason}", file=file, reason=error))
                continue
            return Start(file, tensors, epoch=number + 1 if number >= 0 else config.run.epoch_begin)
    if load_model:
        file = Path(load_model)
        return Start(file, _merged_init_state(_whole_model(file), files), epoch=config.run.epoch_begin)
    if damaged:
        raise UserError(
            _(
                "{folder} holds weights, but none that can be used ({reason}); repair or remove them",
                folder=files.path,
                reason=damaged,
            )
        )
    return Start(epoch=config.run.epoch_begin)


def _find_fine_tuning(config: TrainConfig, files: RunFiles, report: Callable[[str], None], ranks: Ranks) -> Start:
    """The start of a training that leaves the model's weights as they are."""
    base = Path(config.model.load_model or files.weights_file("init"))
    if not config.model.load_model and not base.exists():
        raise UserError(_("peft {peft} begins with a trained model: give --load_model", peft=config.adapter.peft))
    tensors = _merged_init_state(_whole_model(base), files)
    if config.adapter.peft == "state":
        return _find_states(config, files, report, Start(base, tensors, epoch=config.run.epoch_begin), ranks)
    new = Start(base, tensors, epoch=config.run.epoch_begin)
    for found in _checkpoints(files, report, ranks):
        return replace(
            _with_adapter(new, files.adapter_file("init"), config), checkpoint=found.checkpoint, state=found.state
        )
    numbered = files.numbered_adapters()
    if config.run.train_stage >= 2 and numbered:
        number, file = numbered[0]
        return replace(_with_adapter(new, file, config), epoch=number + 1)
    return _with_adapter(new, Path(config.adapter.adapter_load), config) if config.adapter.adapter_load else new


def _whole_model(path: Path) -> dict[str, Tensor]:
    """The weights to begin with.

    Raises:
        UserError: they are only what was trained beside a model.
    """
    if path.is_dir():
        sources = sources_of(path)
        base, part = sources.base, sources.state or sources.adapter
    else:
        own = path.suffix == ".safetensors" and path.exists() and read_own(path)
        base, part = Path("MODEL"), path if own else None
    if part is None:
        return read_weights(path)
    raise UserError(
        _(
            "{path} holds only what was trained beside {base}. To train all of both: rookery merge {base} {path} -o "
            "merged.pth, and --load_model merged.pth. To go on with an adapter: --load_model {base} --adapter_load "
            "{path} and its --peft.",
            path=path,
            base=base,
        )
    )


def _with_adapter(new: Start, path: Path, config: TrainConfig) -> Start:
    # What a file of another tool leaves open, the default does not answer.
    alpha = config.adapter.lora_alpha if "lora_alpha" in config.adapter.model_fields_set else None
    found = read_adapter(path, alpha=alpha, pissa_init=config.adapter.pissa_init or None)
    return replace(new, adapter=found.fitted(new.tensors or {}, new.file or Path()))


def _find_states(
    config: TrainConfig, files: RunFiles, report: Callable[[str], None], new: Start, ranks: Ranks
) -> Start:
    """The start of a state tuning; `new` is that of its first session."""
    tensors = new.tensors or {}
    for found in _checkpoints(files, report, ranks):
        return replace(found, file=new.file, tensors=tensors | (found.tensors or {}))
    for number, file in files.numbered_weights():
        if number < 0:
            continue
        try:
            states = read_weights(file)
        except UserError as error:
            report(_("{file} is passed over: {reason}", file=file, reason=error))
            continue
        if all(name.endswith(".att.time_state") for name in states):
            return replace(new, tensors=tensors | states, epoch=number + 1)
    return new


def _checkpoints(files: RunFiles, report: Callable[[str], None], ranks: Ranks) -> Iterator[Start]:
    """The sound checkpoints of a run, newest first."""
    for folder in checkpoint.newest_first(files.checkpoints):
        try:
            state = checkpoint.verify(folder, ranks)
        except checkpoint.CorruptCheckpoint as error:
            report(_("{folder} is damaged ({reason}) and is passed over", folder=folder, reason=error))
            continue
        file, *others = sorted(folder.glob(f"{WEIGHTS}*.safetensors"))
        yield Start(file, _sizes(folder) if others else read_weights(file), folder, state)


def _sizes(folder: Path) -> dict[str, Tensor]:
    """Weights that lie in pieces, of which the engine reads later what its rank needs: tensors of their sizes, which
    take no memory as long as nobody writes into them."""
    with Pieces(folder, WEIGHTS) as pieces:
        return {name: torch.empty(shape) for name, shape in pieces.shapes.items()}


def _merged_init_state(tensors: dict[str, Tensor], files: RunFiles) -> dict[str, Tensor]:
    """With what rwkv-init-state.pth in the run directory adds, initial states above all, as RWKV-LM does it."""
    file = files.weights_file("init-state")
    return tensors | read_weights(file) if file.exists() else tensors
