"""Weights from one format to another, one tensor at a time: what `rookery convert` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rookery.config import parse
from rookery.errors import UserError
from rookery.formats import ai00, gguf, hf, states
from rookery.formats.adapter import read_adapter, write_adapter
from rookery.formats.adapter_old import split
from rookery.formats.adapter_peft import is_peft, write_peft
from rookery.formats.beside import carry_from
from rookery.formats.load import assign
from rookery.formats.source import Source
from rookery.formats.stream import AI00, Pending, Place, Progress, write_pth, write_weights
from rookery.formats.weights import read_weights, weight_file
from rookery.i18n import _
from rookery.models import ModelShape, create
from rookery.models.shape import VERSIONS
from rookery.tokenizer import Tokenizer

TARGETS = {
    "pth": (".pth",),
    "safetensors": (".safetensors",),
    "st": AI00,
    "gguf": (".gguf",),
    "hf": ("",),
    "rwkv": (),
}
"""Format -> endings of a path that ask for it; only `to` asks for rwkv, a tuned state for the package of that name."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Converted:
    """What was written."""

    path: Path
    kind: str
    """model, state or adapter"""
    target: str
    tensors: int
    bytes: int
    vocabulary: Path | None = None
    """Written beside it, where the format has no place for it."""


def convert(
    path: str | Path,
    out: str | Path,
    *,
    to: str | None = None,
    precision: str | None = None,
    tokenizer: Callable[[int], Tokenizer | None] = lambda size: None,
    version: str | None = None,
    alpha: float | None = None,
    pissa_init: str | Path | None = None,
    force: bool = False,
    shard_bytes: int = hf.SHARD_BYTES,
    progress: Progress | None = None,
) -> Converted:
    """Write what `path` holds in another format.

    Args:
        path: what `rookery.formats.read_weights` takes, a state of the `rwkv` package, or what `read_adapter` takes.
        out: the file, or for hf the directory, to write.
        to: one of `TARGETS`; without it the ending of `out` says.
        precision: fp32, bf16, fp16, or for GGUF also q8_0; without it that of the source, and for st always fp16.
        tokenizer: given the number of token ids of a model, its tokenizer, for the formats that carry one.
        version: of the model that a state belongs to, when `path` is or `out` becomes a state of the `rwkv` package;
            without it, what the configuration in the state's run directory says.
        alpha, pissa_init: of an adapter whose file does not say it, as for `rookery.formats.read_adapter`.
        force: replace what is at `out`.
        shard_bytes: size of the files into which hf divides a larger model.

    Raises:
        UserError: the source cannot be read, the target not written, or the one does not fit into the other.
    """
    path, out = Path(path), Path(out)
    target = _target(out, to)
    _check_precision(precision, target)
    file = path if is_peft(path) else weight_file(path)
    _check_place(path, file, out, target, force)
    if is_peft(path) or (target in ("hf", "safetensors") and _holds_adapter(file)):
        return _convert_adapter(path, out, target, DTYPES.get(precision or ""), alpha, pissa_init)
    if file.suffix == ".pth" and states.is_package(file):
        source = Source(file, partial(states.read_package, version=_version(version, file)))
    else:
        source = Source(path)
    kind = _kind(source)
    _check_fit(kind, target, source)
    out.parent.mkdir(parents=True, exist_ok=True)
    dtype = DTYPES.get(precision or "")
    if target == "rwkv":
        tuned = {name: source.tensor(name) for name in source.shapes}
        states.write_package(out, tuned, _version(version, file), dtype or torch.float32)
    elif target == "gguf":
        shape = _whole_model(source)
        gguf.check(shape, str(path))
        numbers = precision or _name(source.dtype())
        gguf.write(out, source, shape, numbers, tokenizer(shape.vocab_size), progress=progress)
    elif target == "hf":
        shape = _whole_model(source)
        hf.check(shape, str(path))
        tensors, kept = _pending(source, hf.place, dtype), dtype or source.dtype()
        vocabulary = tokenizer(shape.vocab_size)
        hf.write(out, tensors, shape, kept, vocabulary, shard_bytes=shard_bytes, progress=progress)
    elif target == "st":
        write_weights(out, _pending(source, ai00.place, torch.float16), progress=progress)
    else:
        write_weights(out, _pending(source, Place, dtype), metadata=source.metadata(), progress=progress)
    vocabulary_file = None
    if kind == "model" and target not in ("gguf", "hf"):
        vocabulary_file = carry_from(path, out)
    return Converted(out, kind, target, len(source.shapes), _size(out), vocabulary_file)


def _holds_adapter(file: Path) -> bool:
    names = read_weights(file)
    return "emb.weight" not in names and any(map(split, names))


def _convert_adapter(
    path: Path, out: Path, target: str, dtype: torch.dtype | None, alpha: float | None, pissa_init: str | Path | None
) -> Converted:
    """To a file that says what it is, to a folder of Hugging Face peft, or to the slim .pth of RWKV-PEFT."""
    adapter = read_adapter(path, alpha=alpha, pissa_init=pissa_init)
    if dtype is not None:
        adapter = replace(adapter, tensors={name: tensor.to(dtype) for name, tensor in adapter.tensors.items()})
    if target == "hf":
        write_peft(out, adapter)
    elif target == "safetensors":
        write_adapter(out, adapter.tensors, adapter.config, adapter.base)
    elif target == "pth":
        write_pth(out, adapter.tensors)
    else:
        raise UserError(
            _(
                "{path} is a folder of Hugging Face peft, which becomes a .pth or .safetensors; convert that to "
                "{target}",
                path=path,
                target=target,
            )
        )
    return Converted(out, "adapter", target, len(adapter.tensors), _size(out))


def _target(out: Path, to: str | None) -> str:
    if to is not None:
        if to not in TARGETS:
            raise UserError(_("--to {name}: expected one of {known}", name=to, known=", ".join(TARGETS)))
        return to
    for target, endings in TARGETS.items():
        if out.suffix.lower() in endings or (target == "hf" and out.is_dir()):
            return target
    raise UserError(
        _(
            "{path}: the ending says no format; end it with {endings}, or give --to",
            path=out,
            endings=", ".join(ending for endings in TARGETS.values() for ending in endings if ending),
        )
    )


def _check_precision(precision: str | None, target: str) -> None:
    allowed = {"gguf": list(gguf.TYPES), "st": ["fp16"]}.get(target, list(DTYPES))
    if precision is not None and precision not in allowed:
        raise UserError(
            _("--dtype {name}: {target} takes {known}", name=precision, target=target, known=", ".join(allowed))
        )


def _check_place(path: Path, file: Path, out: Path, target: str, force: bool) -> None:
    if any(out.exists() and out.samefile(place) for place in (path, file)):
        raise UserError(_("{path} would be read and written at once; write to another place", path=out))
    if target != "hf" and out.is_dir():
        raise UserError(_("{path} is a directory; {target} is a file", path=out, target=target))
    if target == "hf" and out.is_file():
        raise UserError(_("{path} is a file; the Hugging Face layout is a directory", path=out))
    taken = any(out.iterdir()) if out.is_dir() else out.exists()
    if taken and not force:
        raise UserError(_("{path} exists; --force replaces it", path=out))


def _version(version: str | None, state: Path) -> str:
    recipe = state.with_name("config.toml")
    if version is None and recipe.exists():
        version = str(parse([], recipe).config.model.version)
    if version not in VERSIONS:
        raise UserError(
            _(
                "a state file does not say to which version of RWKV it belongs, and the rwkv package wants x070 states "
                "the other way round: give --version, one of {known}",
                known=", ".join(VERSIONS),
            )
        )
    return version


def _kind(source: Source) -> str:
    names = source.shapes
    if "emb.weight" in names:
        return "model"
    if states.is_state(names):
        return "state"
    if any(name.startswith("blocks.") for name in names):
        return "adapter"
    if not names:
        raise UserError(_("{path} holds no tensors", path=source.path))
    raise UserError(
        _(
            "{path} holds no RWKV model, state or adapter; its first tensor is {name}",
            path=source.path,
            name=next(iter(names)),
        )
    )


def _check_fit(kind: str, target: str, source: Source) -> None:
    if target == "rwkv" and kind != "state":
        raise UserError(_("{path} is no state; the rwkv package reads a model as a .pth", path=source.path))
    parts = {found[1] for name in source.shapes if (found := split(name))} if target == "st" else set()
    if parts - {"lora_A", "lora_B"}:
        raise UserError(
            _(
                "{path} is more than a LoRA: Ai00 would leave out {parts} and answer wrongly; rookery merge puts it "
                "into its model",
                path=source.path,
                parts=", ".join(sorted(parts - {"lora_A", "lora_B"})),
            )
        )
    if target not in ("gguf", "hf"):
        return
    if kind != "model":
        raise UserError(
            _(
                "{path} holds no whole model, which {target} needs; rookery merge puts an adapter into its model",
                path=source.path,
                target=target,
            )
        )
    if any(name.endswith(".att.time_state") for name in source.shapes):
        raise UserError(
            _(
                "{path} holds a tuned state, for which {target} has no place; convert the model without it",
                path=source.path,
                target=target,
            )
        )


def _whole_model(source: Source) -> ModelShape:
    """The dimensions of the model, every tensor of which is there."""
    shape = source.model_shape()
    with torch.device("meta"):
        tensors = {name: torch.empty(size) for name, size in source.shapes.items()}
        assign(create(shape), tensors, str(source.path), share=True)
    return shape


def _pending(
    source: Source, place: Callable[[str, tuple[int, ...]], Place | None], dtype: torch.dtype | None
) -> list[Pending]:
    """The tensors of the source as they stand in a layout, in `dtype` if they are floating point and it is given."""
    items = []
    for name, shape in source.shapes.items():
        where = place(name, shape)
        if where is not None:
            own = source.dtypes[name]
            new = dtype if dtype is not None and own.is_floating_point else own
            items.append(Pending(where.name, where.shape, new, partial(_produce, source, name, where, new)))
    return items


def _produce(source: Source, name: str, where: Place, dtype: torch.dtype) -> Tensor:
    tensor = source.tensor(name)
    cast = (tensor.mT if where.transposed else tensor).reshape(where.shape).to(dtype)
    if dtype == torch.float16 != tensor.dtype and cast.numel():
        low, high = cast.aminmax()
        if (low.isinf() or high.isinf()) and not tensor.isinf().any():
            raise UserError(_("{name} has values beyond the range of fp16; --dtype bf16 keeps them", name=name))
    return cast


def _name(dtype: torch.dtype) -> str:
    """Our name of the precision of a model; of any other kind than ours, the next one that loses nothing."""
    return next((name for name, known in DTYPES.items() if known == dtype), "fp32")


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
