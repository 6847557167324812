"""The weights a run begins with, and those it writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from rookery.adapters import AdapterConfig, adapter_tensors, attach, attached, initial_factors
from rookery.config import TrainConfig
from rookery.formats import Base, assign, read_weights, write_adapter, write_initial, write_weights
from rookery.formats.merge import merge
from rookery.models import Model, ModelShape, create, initialise
from rookery.quant import quantise
from rookery.train.precision import DTYPES
from rookery.train.ranks import Ranks
from rookery.train.rundir import RunFiles
from rookery.train.start import Start
from rookery.train.strategies import Engine


def build_model(config: TrainConfig, start: Start, files: RunFiles, ranks: Ranks) -> Model:
    """The model on the CPU. Weights lie in the mapped file, of which every rank reads what its engine takes; what does
    not train has no gradient.

    A new one, and one that stage 1 makes of another, is written to rwkv-init.pth by rank 0, block by block, and begins
    as that file says; so it is with a new adapter and adapter-init.safetensors.
    """
    shape = ModelShape.of_config(config.model)
    is_new = start.shape is None or config.run.train_stage == 1
    if start.shape is not None and not is_new:
        # Some ranks have no leaf, and those of a released model follow no rule.
        shape = replace(start.shape, parts=shape.parts, head_size_divisor=shape.head_size_divisor)
    if config.adapter.peft != "none" and not is_new:
        model = _fine_tuned_model(config, start, shape, files, ranks)
    else:
        model = _whole_model(config, start, shape, is_new, files.weights_file("init"), ranks)
    model.grad_cp = bool(config.run.grad_cp)
    model.offload_activations = bool(config.run.offload_activations)
    return model.train()


def _whole_model(
    config: TrainConfig, start: Start, shape: ModelShape, is_new: bool, init_file: Path, ranks: Ranks
) -> Model:
    """A model all of which trains."""
    kernel, dropout = config.run.kernel, config.optim.dropout
    tensors, name = start.tensors or {}, str(start.file)
    if is_new:
        if ranks.main:
            dtype = DTYPES[str(config.run.precision)]
            with ranks.patience():
                write_initial(init_file, shape, config.run.random_seed, dtype, tensors, name)
        ranks.barrier()
        tensors, name = read_weights(init_file), str(init_file)
    elif config.model.load_partial:
        model = create(shape, kernel=kernel, dropout=dropout)
        initialise(model, config.run.random_seed)
        assign(model, model.state_dict() | tensors, name)
        return model
    with torch.device("meta"):
        model = create(shape, kernel=kernel, dropout=dropout)
    assign(model, tensors, name, share=True)
    return model


def _fine_tuned_model(config: TrainConfig, start: Start, shape: ModelShape, files: RunFiles, ranks: Ranks) -> Model:
    """A frozen model with states or an adapter that train. Its weights stay those of the mapped file as long as they
    can, so that even the base of a quantised training is never in memory as a whole."""
    tensors = start.tensors or {}
    with torch.device("meta"):
        model = create(shape, kernel=config.run.kernel, dropout=config.optim.dropout)
    assign(model, tensors, str(start.file), share=True)
    model.requires_grad_(False)
    if config.adapter.peft == "state":
        _add_states(model)
    else:
        _add_adapter(model, config, start, files, ranks)
    if config.adapter.quant != "none":
        device = "cpu" if config.device.accelerator == "cpu" else "cuda"
        quantise(model, config.adapter.quant, low_rank=initial_factors(model), device=device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Memory of its own: what trains must not write into the mapped file.
            parameter.data = parameter.data.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return model


def _add_states(model: Model) -> None:
    H, N = model.shape.n_head, model.shape.head_size
    for block in model.blocks:
        if block.att.time_state is None:
            block.att.time_state = nn.Parameter(torch.zeros(H, N, N))
        block.att.time_state.requires_grad_(True)


def _add_adapter(model: Model, config: TrainConfig, start: Start, files: RunFiles, ranks: Ranks) -> None:
    wanted = AdapterConfig.of_section(config.adapter)
    if start.adapter is None:
        attach(model, wanted, seed=config.run.random_seed)
    else:
        attach(model, replace(start.adapter.config, dropout=wanted.dropout), tensors=start.adapter.tensors)
        for name in attached(model)["default"].other:
            # As training left it, in fp32: the base's dtype would round it.
            model.get_parameter(name).data = start.adapter.tensors[name]
    if start.checkpoint is None and ranks.main:
        base = Base.of(start.tensors or {}, start.file or Path())
        write_adapter(files.adapter_file("init"), adapter_tensors(model), attached(model)["default"].config, base)


class WeightFiles:
    """Writes what a run has trained, for other tools: rwkv-N.pth with the whole model or, of a state-tuned one, the
    states alone; adapter-N.safetensors of an adapter, and with `merge` rwkv-N.pth beside it."""

    def __init__(self, config: TrainConfig, start: Start, files: RunFiles, engine: Engine, ranks: Ranks) -> None:
        self._config = config
        self._files = files
        self._engine = engine
        self._ranks = ranks
        self._base_file = start.file
        self._base = None
        if config.adapter.peft not in ("none", "state"):
            self._base = Base.of(start.tensors or {}, start.file or Path())

    def file(self, name: str | int) -> Path:
        """Where the weights called `name` are written."""
        return self._files.weights_file(name) if self._base is None else self._files.adapter_file(name)

    def write(self, name: str | int) -> Path:
        """Write the weights as they are now. All ranks call this together, and rank 0 writes, tensor by tensor."""
        file = self.file(name)
        tensors = self._engine.trained_weights()
        if not self._ranks.main:
            for tensor in tensors:
                tensor.produce()
            return file
        if self._base is None:
            write_weights(file, tensors)
            return file
        model: Model = self._engine.model  # type: ignore[assignment]
        weights = {tensor.name: tensor.produce().cpu() for tensor in tensors}
        write_adapter(file, adapter_tensors(model, weights=weights), attached(model)["default"].config, self._base)
        if self._config.adapter.merge and self._base_file is not None:
            merge(self._base_file, file, self._files.weights_file(name))
        return file
