"""Putting an adapter or a tuned state into the weights of its base, tensor by tensor, and proving that it is there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rookery.adapters import check_tensors, create
from rookery.errors import UserError
from rookery.formats.adapter import AdapterFile, read_adapter
from rookery.formats.adapter_old import split
from rookery.formats.beside import carry_from
from rookery.formats.load import read_state, sources_of
from rookery.formats.probe import probe
from rookery.formats.source import Source
from rookery.formats.states import is_state
from rookery.formats.stream import Pending, Progress, pending, write_weights
from rookery.formats.weights import read_weights, weight_file
from rookery.i18n import _

ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Dtype of the weights -> part of the largest logit that rounding the merged weights to it may move a logit by."""

MISSED = 0.1
"""Part of what an adapter does to the logits that may be lost on the way, where that is more than rounding."""


@dataclass(frozen=True)
class Merged:
    """What was written, and how far it can be told from its parts."""

    path: Path
    kind: str
    """"adapter" or "state"."""
    bytes: int
    difference: float | None
    """Largest difference of a logit between the merged model and the base with the adapter; None when not checked."""
    effect: float | None
    """Largest change of a logit by the adapter."""
    vocabulary: Path | None
    """Written beside it; None if it is World, or lies there already."""


def merge(
    base: str | Path,
    adapter: str | Path | AdapterFile,
    out: str | Path,
    *,
    alpha: float | None = None,
    pissa_init: str | Path | None = None,
    any_base: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> Merged:
    """Write the model of `base` with an adapter or a tuned state in it.

    One tensor is in memory at a time, beside the adapter. Sums are taken as the merge scripts of RWKV-PEFT take them,
    in the wider dtype of the two, and rounded to that of the base. A state is copied as it is. The file appears only
    when the logits of a few tokens agree with those of the base with the adapter beside it.

    Args:
        base: the model that was trained on, as a file; of a quantised training too, the unquantised one.
        adapter: what `rookery.formats.read_adapter` reads, or gave; or a state.
        out: a .pth or .safetensors file.
        alpha, pissa_init: as for `read_adapter`.
        any_base: accept a base with other weights than the adapter was trained on.
        check: compare logits.

    Raises:
        UserError: a file is missing or damaged, the adapter belongs to another model, the result cannot be written, or
            it is not what it should be.
    """
    out = Path(out)
    source = Source(base)
    if out.suffix.lower() not in (".pth", ".safetensors"):
        raise UserError(
            _("{path}: a merged model is a .pth or .safetensors; `rookery convert` makes others of it", path=out)
        )
    if out.exists() and out.samefile(weight_file(base)):
        raise UserError(_("{path} is the base itself; name another file", path=out))
    found, states, file = _read(adapter, source, alpha, pissa_init, any_base)
    if out.exists() and file.exists() and out.samefile(file):
        raise UserError(_("{path} is what is to be merged; name another file", path=out))
    tensors = _with_states(source, states) if found is None else _with_adapter(source, found)
    # Beside its place, so that it can take it at once, and under its ending, which says its format.
    unchecked = out.with_name(f"{out.stem}.{os.getpid()}.unchecked{out.suffix}")
    try:
        write_weights(unchecked, tensors, progress=progress, called=out)
        seen = _compare(source, found, states, unchecked, out) if check else (None, None)
        os.replace(unchecked, out)
    except OSError as error:
        raise UserError(_("cannot write {path}: {error}", path=out, error=error.strerror or error)) from error
    finally:
        unchecked.unlink(missing_ok=True)
    kind = "state" if found is None else "adapter"
    difference, effect = seen
    return Merged(out, kind, out.stat().st_size, difference, effect, carry_from(base, out))


def _read(
    adapter: str | Path | AdapterFile,
    source: Source,
    alpha: float | None,
    pissa_init: str | Path | None,
    any_base: bool,
) -> tuple[AdapterFile | None, dict[str, Tensor], Path]:
    """The adapter, or the states; and the file that it was read from."""
    if not isinstance(adapter, AdapterFile):
        path = sources_of(adapter).state or Path(adapter)
        if _holds_states(path):
            return None, read_state(path, source.model_shape()), weight_file(path)
        adapter = read_adapter(path, alpha=alpha, pissa_init=pissa_init)
    # A mapping of its own, let go of at once: the samples of the fingerprint are all over the file.
    return adapter.fitted(read_weights(source.path), source.path, any_base=any_base), {}, adapter.path


def _holds_states(path: Path) -> bool:
    file = weight_file(path) if path.is_file() or (path / "config.toml").exists() else None
    return file is not None and is_state(list(read_weights(file)))


def _with_states(source: Source, states: Mapping[str, Tensor]) -> list[Pending]:
    """As RWKV-PEFT's merge_state.py: the states as they are, in the place of the model's or behind its tensors."""
    kept = [_kept(source, name) for name in source.shapes if name not in states]
    return kept + pending(states)


def _with_adapter(source: Source, adapter: AdapterFile) -> list[Pending]:
    modules = {found[0] for name in adapter.tensors if (found := split(name))}
    methods = {
        f"{module}.weight": create(adapter.config, *reversed(source.shapes[f"{module}.weight"]))
        for module in modules
        if len(source.shapes.get(f"{module}.weight", ())) == 2
    }
    own = {name: {part: f"{name.removesuffix('weight')}{part}" for part in m.shapes()} for name, m in methods.items()}
    expected = {name: shape for name, shape in source.shapes.items() if name in adapter.tensors}
    for name, method in methods.items():
        expected |= {own[name][part]: shape for part, shape in method.shapes().items()}
    check_tensors(expected, adapter.tensors)
    for name, method in methods.items():
        method.assign({part: adapter.tensors[key] for part, key in own[name].items()})

    def merged(name: str) -> Tensor:
        return methods[name].merged(source.tensor(name))

    def whole(name: str) -> Tensor:
        return adapter.tensors[name].to(source.dtypes[name])

    def one(name: str) -> Pending:
        if name in methods:
            return Pending(name, source.shapes[name], source.dtypes[name], partial(merged, name))
        if name in adapter.tensors:
            return Pending(name, source.shapes[name], source.dtypes[name], partial(whole, name))
        return _kept(source, name)

    return [one(name) for name in source.shapes]


def _kept(source: Source, name: str) -> Pending:
    return Pending(name, source.shapes[name], source.dtypes[name], partial(source.tensor, name))


def _compare(
    source: Source, adapter: AdapterFile | None, states: dict[str, Tensor], merged: Path, out: Path
) -> tuple[float, float]:
    """(largest difference of a logit, largest change of a logit by the adapter).

    Raises:
        UserError: the difference is more than rounding explains.
    """
    # The mapping of the merged file goes with the call: Windows could not move or remove the file else.
    got, wanted = probe(Source(merged)), probe(source, adapter, states)
    difference = float((got - wanted).abs().max())
    effect = float((probe(source) - wanted).abs().max())
    allowed = max(ROUNDING[source.dtype()] * float(wanted.abs().max()), MISSED * effect)
    if not difference <= allowed:
        raise UserError(
            _(
                "the merged model is not what it should be: a logit differs by {difference}, and rounding explains "
                "{allowed} (the adapter changes logits by {effect}). {path} was not written.",
                difference=f"{difference:.3g}",
                allowed=f"{allowed:.3g}",
                effect=f"{effect:.3g}",
                path=out,
            )
        )
    return difference, effect
