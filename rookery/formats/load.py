"""Loading a model for use: what `rookery.load` does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rookery.adapters import attach
from rookery.config import parse
from rookery.errors import UserError
from rookery.formats.adapter import AdapterFile, read_adapter
from rookery.formats.weights import read_weights, weight_file
from rookery.i18n import _
from rookery.models import Model, ModelShape, create


def load(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    state: str | Path | None = None,
    adapter: str | Path | AdapterFile | Sequence[str | Path | AdapterFile] | None = None,
    any_base: bool = False,
    kernel: str = "auto",
) -> Model:
    """Load a model from a .pth, .safetensors or .st file or a run directory. All dimensions are read from the file.

    The run directory of a state tuning or of an adapter stands for the model it began with and what it trained.

    Args:
        device: "auto" is the GPU if there is one.
        dtype: of the parameters; "auto" is the file's on a GPU and fp32 on a CPU. Those of adapters are fp32.
        state: file with tuned initial states (`blocks.N.att.time_state`) to mount.
        adapter: one or several, which add up: what `rookery.formats.read_adapter` reads, or what it gave (for an old
            file that does not say its alpha). `rookery.adapters` calls the first "default", the others "2", "3" …
        any_base: accept adapters that were trained on other weights of the same dimensions.
        kernel: back-end of the recurrence.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: a file is missing, damaged, of an unsupported version, or does not fit.
    """
    sources = sources_of(path)
    state = sources.state if state is None else state
    adapters = [adapter] if isinstance(adapter, (str, Path, AdapterFile)) else list(adapter or ())
    adapters = adapters or ([] if sources.adapter is None else [sources.adapter])

    tensors = read_weights(sources.base)
    file = weight_file(sources.base)
    divisor = sources.head_size_divisor or divisor_beside(file)
    shape = replace(shape_of(tensors, str(sources.base)), head_size_divisor=divisor)
    place = _device(device)
    if isinstance(dtype, str):
        if dtype != "auto":
            raise ValueError(f"dtype {dtype!r} is neither 'auto' nor a torch dtype")
        dtype = torch.float32 if place.type == "cpu" else tensors["head.weight"].dtype
    model = create(shape, kernel=kernel)
    if state is not None:
        tensors |= read_state(state, shape)
    assign(model, tensors, str(file))
    model.to(device=place, dtype=dtype)
    for number, one in enumerate(adapters, start=1):
        content = one if isinstance(one, AdapterFile) else read_adapter(one)
        content = content.fitted(tensors, file, any_base=any_base)
        attach(model, content.config, "default" if number == 1 else str(number), tensors=content.tensors)
    return model.eval()


def _device(name: str | torch.device) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    present = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    with suppress(RuntimeError):  # PyTorch knows no device of this name
        device = torch.device(name)
        if device.type in present:
            return device
    known = ", ".join(["auto", *present])
    raise UserError(_("There is no device {name} here that PyTorch can use, only {known}.", name=name, known=known))


@dataclass(frozen=True)
class Sources:
    """The files that a model is loaded from."""

    base: Path
    state: Path | None = None
    adapter: Path | None = None
    head_size_divisor: int | None = None
    """That of the run, where there is one."""


def sources_of(path: str | Path) -> Sources:
    """What `path` stands for: itself, or, if it is the run directory of a state tuning or of an adapter, the model that
    the run began with and what it trained.

    Raises:
        UserError: that model is not where it was.
    """
    path = Path(path)
    recipe = path / "config.toml"
    if not recipe.exists():
        return Sources(path)
    try:
        config = parse([], recipe).config
    except UserError:  # not a configuration of ours, or one of a later version
        return Sources(path)
    tuned = config.adapter.peft
    if tuned == "none":
        return Sources(path)
    base = Path(config.model.load_model) if config.model.load_model else path / "rwkv-init.pth"
    places = [_begun_in(path, config.run.proj_dir) / base, base, path / base]
    base = next((place for place in places if place.exists()), base)
    if not base.exists():
        raise UserError(
            _(
                "{folder} holds only what was trained on {base}, which is no longer there; give that model itself, and "
                "{folder} as its adapter or state",
                folder=path,
                base=config.model.load_model or base,
            )
        )
    divisor = config.model.head_size_divisor
    return Sources(base, path, None, divisor) if tuned == "state" else Sources(base, None, path, divisor)


def files_of(path: str | Path) -> list[Path]:
    """The files that `load` takes for `path`: of a run directory its newest weights, or the model that it began with
    and the newest that it trained.

    Raises:
        UserError: as `load`.
    """
    sources = sources_of(path)
    files = [weight_file(sources.base)]
    if sources.state is not None:
        files.append(weight_file(sources.state))
    if sources.adapter is not None:
        files.append(read_adapter(sources.adapter).path)
    return files


def _begun_in(run: Path, proj_dir: str) -> Path:
    """The folder that the paths in a run's configuration start from: its run directory is `proj_dir` from there."""
    own, relative = run.resolve().parts, Path(proj_dir).parts
    return Path(*own[: -len(relative)]) if relative and own[-len(relative) :] == relative else Path()


def divisor_beside(file: Path) -> int:
    """`head_size_divisor`, which no weight file records, from the configuration in its run directory."""
    recipe = file.with_name("config.toml")
    try:
        return parse([], recipe).config.model.head_size_divisor if recipe.exists() else 8
    except UserError:  # not a configuration of ours, or one of a later version
        return 8


def shape_of(tensors: dict[str, Tensor], name: str) -> ModelShape:
    """The dimensions of a checkpoint; `name` is what to call it in an error."""
    return ModelShape.of_checkpoint({key: tuple(tensor.shape) for key, tensor in tensors.items()}, name)


def read_state(path: str | Path, shape: ModelShape) -> dict[str, Tensor]:
    """The tuned initial states in a file, checked against a model's dimensions.

    Returns:
        `blocks.N.att.time_state` -> (H, N, N), [head, value, key].
    """
    tensors = {name: tensor for name, tensor in read_weights(path).items() if name.endswith(".att.time_state")}
    expected = {f"blocks.{layer}.att.time_state" for layer in range(shape.n_layer)}
    sizes = {tuple(tensor.shape) for tensor in tensors.values()}
    if set(tensors) != expected or sizes != {(shape.n_head, shape.head_size, shape.head_size)}:
        raise UserError(
            _(
                "{path} holds {found} states of shape {sizes}; the model needs {layers} of {heads} x {size} x {size}",
                path=path,
                found=len(tensors),
                sizes=sorted(sizes),
                layers=shape.n_layer,
                heads=shape.n_head,
                size=shape.head_size,
            )
        )
    return tensors


def assign(model: Model, tensors: dict[str, Tensor], name: str, *, share: bool = False) -> None:
    """Copy checkpoint tensors into the model; both must hold exactly the same parameters.

    Tuned states in the file are mounted. What no forward pass reads may be missing (the value residual of block 0 of
    x070) or left over (buffers of old trainers).

    Args:
        share: put the tensors themselves into the model, which may be on the meta device: memory-mapped ones stay so.

    Raises:
        UserError: tensors are missing, unknown, or of another shape.
    """
    for layer, block in enumerate(model.blocks):
        tuned = tensors.get(f"blocks.{layer}.att.time_state")
        if tuned is not None:
            block.att.time_state = nn.Parameter(torch.empty(tuned.shape))
    parameters = dict(model.named_parameters())
    unused = {f"blocks.0.att.{x}" for x in ("v0", "v1", "v2")}
    missing = parameters.keys() - tensors.keys() - unused
    unknown = {key for key in tensors.keys() - parameters.keys() if not key.endswith("_mask")}
    wrong = {key for key in parameters.keys() & tensors.keys() if parameters[key].shape != tensors[key].shape}
    if missing or unknown or wrong:
        raise UserError(
            _(
                "{name} does not fit the model: missing {missing}; unknown {unknown}; other shape {wrong}",
                name=name,
                missing=_some(missing),
                unknown=_some(unknown),
                wrong=_some(wrong),
            )
        )
    if share:
        dtype = tensors["emb.weight"].dtype
        absent = {key: torch.zeros(parameters[key].shape, dtype=dtype) for key in parameters.keys() - tensors.keys()}
        model.load_state_dict(tensors | absent, strict=False, assign=True)
        return
    with torch.no_grad():
        for key, parameter in parameters.items():
            if key in tensors:
                parameter.copy_(tensors[key])
            else:
                parameter.zero_()


def _some(names: set[str]) -> str:
    if not names:
        return "-"
    first = sorted(names)[:3]
    return ", ".join(first) + (f" (+{len(names) - 3})" if len(names) > 3 else "")
