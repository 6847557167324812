"""Loading a model for use: what `rookery.load` does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rookery.config import parse
from rookery.errors import UserError
from rookery.formats.weights import read_weights, weight_file
from rookery.i18n import _
from rookery.models import Model, ModelShape, create


def load(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    state: str | Path | None = None,
    kernel: str = "auto",
) -> Model:
    """Load a model from a .pth, .safetensors or .st file or a run directory. All dimensions are read from the file.

    Args:
        device: "auto" is the GPU if there is one.
        dtype: of the parameters; "auto" is the file's on a GPU and fp32 on a CPU.
        state: file with tuned initial states (`blocks.N.att.time_state`) to mount.
        kernel: back-end of the recurrence.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: a file is missing, damaged, of an unsupported version, or does not fit.
    """
    tensors = read_weights(path)
    file = weight_file(path)
    shape = replace(shape_of(tensors, str(path)), head_size_divisor=divisor_beside(file))
    device = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(dtype, str):
        if dtype != "auto":
            raise ValueError(f"dtype {dtype!r} is neither 'auto' nor a torch dtype")
        dtype = torch.float32 if device.type == "cpu" else tensors["head.weight"].dtype
    model = create(shape, kernel=kernel)
    if state is not None:
        tensors |= read_state(state, shape)
    assign(model, tensors, str(file))
    return model.to(device=device, dtype=dtype).eval()


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


def assign(model: Model, tensors: dict[str, Tensor], name: str) -> None:
    """Copy checkpoint tensors into the model; both must hold exactly the same parameters.

    Tuned states in the file are mounted. What no forward pass reads may be missing (the value residual of block 0 of
    x070) or left over (buffers of old trainers).

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
