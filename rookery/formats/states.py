"""Tuned initial states as the `rwkv` package takes a state: a list of three tensors a layer.

The package wants the last input of time mixing (n_embd), the recurrent state (H, N, N) in fp32, and the last input of
channel mixing (n_embd). Its recurrent state is [head, key, value] for x052 and x060 but [head, value, key], as it
was trained, for x070. (It reads `time_state` by itself only from an x052 or x060 .pth that also holds the model.)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rookery.errors import UserError
from rookery.formats.stream import replacing
from rookery.formats.weights import is_plain, load_pth
from rookery.i18n import _

_NAME = re.compile(r"blocks\.(\d+)\.att\.time_state")


def is_state(names: Collection[str]) -> bool:
    """Whether a file with these tensors is a tuned state and nothing else."""
    return bool(names) and all(_NAME.fullmatch(name) for name in names)


def to_package(states: Mapping[str, Tensor], version: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The list that `rwkv.model.RWKV.forward` takes as its state, and writes into: give each conversation a copy.

    Args:
        states: `blocks.N.att.time_state` -> (H, N, N), [head, value, key].
        version: of the model.
        dtype: of the model's activations: what its strategy says.
    """
    state = []
    for layer in range(len(states)):
        tuned = states[f"blocks.{layer}.att.time_state"].float()
        shift = torch.zeros(tuned.shape[0] * tuned.shape[1], dtype=dtype)
        state += [shift, _turned(tuned, version).contiguous(), shift.clone()]
    return state


def write_package(path: Path, states: Mapping[str, Tensor], version: str, dtype: torch.dtype) -> None:
    """Write a state for `torch.load` and the `rwkv` package."""
    with replacing(path) as beside:
        torch.save(to_package(states, version, dtype), beside)


def is_package(file: Path) -> bool:
    """Whether the .pth is a state of the `rwkv` package.

    Raises:
        UserError: the file is damaged.
    """
    content = load_pth(file)
    return (
        isinstance(content, list)
        and len(content) % 3 == 0 < len(content)
        and all(is_plain(tensor) for tensor in content)
        and all(tensor.dim() == 3 for tensor in content[1::3])
    )


def read_package(file: Path, version: str) -> dict[str, Tensor]:
    """The inverse of `write_package`.

    Raises:
        UserError: the state is not an initial one.
    """
    content = load_pth(file)
    assert isinstance(content, list)
    if any(bool(tensor.any()) for tensor in [*content[::3], *content[2::3]]):
        raise UserError(
            _(
                "{path} is the state of a conversation: it also holds the last token's activations, for which a tuned "
                "state has no place",
                path=file,
            )
        )
    return {f"blocks.{layer}.att.time_state": _turned(wkv, version) for layer, wkv in enumerate(content[1::3])}


def _turned(state: Tensor, version: str) -> Tensor:
    return state if version == "x070" else state.mT
