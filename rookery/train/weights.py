"""The weights a run begins with, and those it writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rookery.config import TrainConfig
from rookery.formats import assign, combine, write_pth
from rookery.models import Model, ModelShape, create, initialise
from rookery.train.precision import DTYPES
from rookery.train.start import Start
from rookery.train.strategies import Engine


def build_model(config: TrainConfig, start: Start, init_file: Path) -> Model:
    """The model on the CPU with fp32 weights; what does not train has no gradient.

    A new one, and one that stage 1 makes of another, is written to `init_file` and begins as that file says.
    """
    shape = ModelShape.of_config(config.model)
    is_new = start.shape is None or config.run.train_stage == 1
    if start.shape is not None and not is_new:
        # Some ranks have no leaf, and those of a released model follow no rule.
        shape = replace(start.shape, parts=shape.parts, head_size_divisor=shape.head_size_divisor)
    model = create(shape, kernel=config.run.kernel, dropout=config.optim.dropout)
    model.grad_cp = bool(config.run.grad_cp)
    tensors = start.tensors or {}
    if is_new:
        initialise(model, config.run.random_seed)
        dtype = DTYPES[str(config.run.precision)]
        initial = combine(model.state_dict(), tensors, str(start.file))
        initial = {name: tensor.to(dtype) for name, tensor in initial.items()}
        write_pth(init_file, initial)
        model.load_state_dict(initial)
    else:
        if config.model.load_partial:
            initialise(model, config.run.random_seed)
            tensors = model.state_dict() | tensors
        assign(model, tensors, str(start.file))
    if config.adapter.peft == "state":
        _train_states_only(model)
    return model.train()


def _train_states_only(model: Model) -> None:
    model.requires_grad_(False)
    H, N = model.shape.n_head, model.shape.head_size
    for block in model.blocks:
        if block.att.time_state is None:
            block.att.time_state = nn.Parameter(torch.zeros(H, N, N))
        block.att.time_state.requires_grad_(True)


def trained_weights(engine: Engine, config: TrainConfig) -> dict[str, Tensor]:
    """What rwkv-N.pth and rwkv-final.pth hold: the whole model, or of a state-tuned one the states alone."""
    weights = engine.weights()
    if config.adapter.peft == "state":
        return {name: tensor for name, tensor in weights.items() if name.endswith(".att.time_state")}
    return weights
