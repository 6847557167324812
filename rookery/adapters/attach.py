"""Adapters on a model: adding, switching, taking away, and their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rookery.adapters.config import AdapterConfig, in_parts
from rookery.adapters.methods import PiSSA, create
from rookery.errors import UserError
from rookery.i18n import _
from rookery.models import Model
from rookery.ops.backend import exact_dtype
from rookery.ops.linear import Linear


@dataclass
class Attached:
    """An adapter on a model."""

    config: AdapterConfig
    enabled: bool = True
    other: dict[str, Tensor] = field(default_factory=dict)
    """Of each base parameter that the adapter has as a whole: the base's value, or while disabled the adapter's."""


def attached(model: Model) -> dict[str, Attached]:
    """The adapters on a model by name."""
    registry: dict[str, Attached] = model.__dict__.setdefault("attached_adapters", {})
    return registry


def attach(
    model: Model,
    config: AdapterConfig,
    name: str = "default",
    seed: int = 0,
    *,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Add an adapter to a model. From then on only it trains; what was there is frozen. Its parameters are fp32, or
    fp64 on an fp64 model, until the model is moved to another dtype.

    A new adapter changes nothing. To have a quantised base, quantise it after this call, with `initial_factors`: the
    adapter then begins with the unrounded weights.

    Args:
        name: letters, digits and underscores; the adapter's parameters are `blocks.0.att.key.adapters.NAME.lora_A`.
        seed: of a new adapter's initial values.
        tensors: values of a trained adapter, named as `adapter_tensors` names them. Base parameters among them are its
            own, whatever `train_parts` says.

    Raises:
        UserError: the model has no such matrices, the tensors do not fit it, or another adapter has the same name or
            the same base parameters.
    """
    registry = attached(model)
    if name in registry or not re.fullmatch(r"\w+", name):
        raise UserError(_("an adapter cannot be called {name}: the name is taken, or no plain word", name=name))
    targets = dict(find_targets(model, config.targets))
    methods = {path: create(config, linear.in_features, linear.out_features) for path, linear in targets.items()}
    given = tensors or {}
    whole = {k: p for k, p in model.named_parameters() if in_parts(k, config.train_parts) or k in given}
    taken = sorted(whole.keys() & {key for other in registry.values() for key in other.other})
    if taken:
        raise UserError(_("{parameter} belongs to an adapter of this model already", parameter=taken[0]))
    if tensors is not None:
        expected = {key: tuple(p.shape) for key, p in whole.items() if key in tensors}
        expected |= {f"{path}.{part}": shape for path, m in methods.items() for part, shape in m.shapes().items()}
        check_tensors(expected, tensors)

    like = model.emb.weight
    generator = torch.Generator().manual_seed(seed)
    for path, method in methods.items():
        linear = targets[path]
        weight = linear.dense()
        if tensors is None:
            method.to_empty(device="cpu")
            method.initialise(weight, generator)
        else:
            method.assign({part: tensors[f"{path}.{part}"].clone() for part in method.shapes()})
        method.bind(weight)
        linear.adapters[name] = method.to(like.device, exact_dtype(like.dtype)).train(linear.training)
    registry[name] = Attached(config)
    model.requires_grad_(False)
    for method in methods.values():
        method.requires_grad_(True)
    for key, parameter in whole.items():
        parameter.requires_grad_(True)
        # New memory for the adapter's values: the base's may be a mapped file.
        registry[name].other[key] = parameter.data
        parameter.data = given.get(key, parameter.data).to(parameter.device, parameter.dtype, copy=True)


def detach(model: Model, name: str = "default") -> None:
    """Take an adapter away; the base is as it was, and stays frozen."""
    enable(model, name, False)
    del attached(model)[name]
    for module in model.modules():
        if isinstance(module, Linear) and name in module.adapters:
            del module.adapters[name]


def enable(model: Model, name: str, enabled: bool = True) -> None:
    """Switch an adapter on or off. Without any adapter that is on, the model is its base."""
    adapter = attached(model)[name]
    if adapter.enabled == enabled:
        return
    adapter.enabled = enabled
    for module in model.modules():
        if isinstance(module, Linear) and name in module.adapters:
            module.adapters[name].enabled = enabled
    for key, value in adapter.other.items():
        parameter = model.get_parameter(key)
        adapter.other[key] = parameter.data
        parameter.data = value.to(parameter.device, parameter.dtype)


def adapter_tensors(
    model: Model, name: str = "default", weights: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What a file of the adapter holds, under RWKV-PEFT's names: `blocks.0.att.key.lora_A`, and the base parameters
    that it has as a whole.

    Args:
        weights: names and tensors as in the model's `state_dict`, to take instead of the model's own: the unrounded
            ones of a trainer.
    """
    adapter, place = attached(model)[name], f".adapters.{name}."
    tensors = model.state_dict() | dict(weights or {})
    own = {key.replace(place, "."): tensor for key, tensor in tensors.items() if place in key}
    return own | {key: tensors[key] if adapter.enabled else value for key, value in adapter.other.items()}


def initial_factors(model: Model, name: str = "default") -> dict[str, tuple[Tensor, Tensor]]:
    """Matrix -> the A (r, in) and B (out, r) that a pissa began with, for `rookery.quant.quantise`; of any other method
    none."""
    matrices = {path: m for path, m in model.named_modules() if isinstance(m, Linear) and name in m.adapters}
    methods = {path: matrix.adapters[name] for path, matrix in matrices.items()}
    return {path: (m.init_lora_A, m.init_lora_B) for path, m in methods.items() if isinstance(m, PiSSA)}


def find_targets(model: Model, targets: tuple[str, ...] | None) -> Iterator[tuple[str, Linear]]:
    """(name, matrix) of what `AdapterConfig.targets` selects.

    By default every matrix of the blocks: x052 and x060 have att.receptance, key, value, gate, output and ffn.key,
    receptance, value; x070 has att.receptance, key, value, output and ffn.key, value. RWKV-PEFT trains the same, and
    LoRA reaches full fine-tuning only when all of them take part (arXiv:2305.14314).

    Raises:
        UserError: a name that selects nothing.
    """
    matrices = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name.startswith("blocks.")
    }
    chosen: set[str] = set(matrices if targets is None else ())
    for target in targets or ():
        if target in ("emb", "head"):
            raise UserError(
                _("{target} gets no adapter; it can train as a whole: add it to train_parts", target=target)
            )
        found = {name for name in matrices if target in _names_of(name)}
        if not found:
            known = sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in matrices})
            raise UserError(
                _(
                    "the model has no matrix {target} for an adapter; it has {known}",
                    target=target,
                    known=", ".join(known),
                )
            )
        chosen |= found
    return ((name, matrix) for name, matrix in matrices.items() if name in chosen)


def _names_of(module: str) -> set[str]:
    """What selects `blocks.3.att.key`: that, `att.key`, `key` and `att`."""
    short = re.sub(r"^blocks\.\d+\.", "", module)
    return {module, short, *short.split(".")}


def check_tensors(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """
    Raises:
        UserError: the tensors of an adapter have other names or shapes than expected.
    """
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise UserError(
            _(
                "the adapter does not fit the model: it lacks {missing} tensors ({first_missing}) and has {unknown} "
                "that the model has no place for ({first_unknown})",
                missing=len(missing),
                first_missing=missing[0] if missing else "-",
                unknown=len(unknown),
                first_unknown=unknown[0] if unknown else "-",
            )
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                _(
                    "the adapter does not fit the model: its {name} has shape {found}, the model needs {needed}",
                    name=name,
                    found=tuple(tensors[name].shape),
                    needed=shape,
                )
            )
