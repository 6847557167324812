"""Reading weight files: .pth, .safetensors, .st (Ai00) and run directories.

Whatever wrote the file, `read_weights` returns tensors under RWKV-LM's names, in its axis order, each [1, 1, C] vector
unsqueezed. Nothing in a file is executed.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rookery.errors import UserError
from rookery.formats.stream import SAFETENSORS
from rookery.i18n import _

PREFIXES = ("_forward_module.", "module.", "model.")
"""What DeepSpeed, DDP and RWKV-PEFT put before a name."""

AI00_TRANSPOSED = re.compile(r"\.(time_mix_w[12]|time_decay_w[12]|[wagv][12]|time_state)$")
"""Tensors whose last two axes Ai00's converter swaps (rwkv-formats: its Python script, not the Rust one)."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a model, state or adapter file, on the CPU, memory-mapped where the format allows it.

    Args:
        path: a .pth, .safetensors or .st file, or a run directory, whose newest weights are meant.

    Raises:
        UserError: the file is missing, of an unknown kind, damaged, or holds something else than tensors.
    """
    file = weight_file(path)
    tensors = _read_safetensors(file) if file.suffix.lower() in SAFETENSORS else _read_pth(file)
    return normalise(tensors)


def weight_file(path: str | Path) -> Path:
    """The weight file meant by `path`: itself, or of a run directory the newest weights: rwkv-final.pth, else the last
    written of rwkv-N.pth and the checkpoints an unfinished run goes on from, else rwkv-init.pth."""
    path = Path(path)
    if not path.exists():
        raise UserError(_("{path} does not exist", path=path))
    if path.is_file():
        return path
    final = path / "rwkv-final.pth"
    if final.exists():
        return final
    numbered = [file for file in path.iterdir() if re.fullmatch(r"rwkv-\d+\.pth", file.name)]
    candidates = [*numbered, *path.glob("checkpoints/step-*/weights.safetensors")]
    if candidates:
        return max(candidates, key=lambda file: file.stat().st_mtime_ns)
    initial = path / "rwkv-init.pth"
    if initial.exists():
        return initial
    raise UserError(_("{path} is a directory without rwkv-final.pth, rwkv-N.pth or rwkv-init.pth", path=path))


def normalise(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under RWKV-LM's names and axis order."""
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if _is_ai00(tensors):
        mixes = "time_maa" if any(name.endswith(".time_mix_w1") for name in tensors) else "time_mix"
        tensors = {
            name.replace("time_first", "time_faaaa").replace("time_mix", mixes): tensor.mT
            if AI00_TRANSPOSED.search(name)
            else tensor
            for name, tensor in tensors.items()
        }
    return {name: _unsqueezed(name, tensor) for name, tensor in tensors.items()}


def _read_pth(file: Path) -> dict[str, Tensor]:
    damaged = _("{path} is damaged or not a PyTorch file; copy or download it again", path=file)
    try:
        # Files older than PyTorch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(
                _("{path} holds more than tensors and would run code when read; it is refused", path=file)
            ) from error
        raise UserError(damaged) from error
    except Exception as error:  # an unpickler that meets arbitrary bytes raises whatever they lead it to
        raise UserError(damaged) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(_("{path} is not a flat dictionary of tensors", path=file))
    return content


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as content:
            return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(_("{path} is damaged or no safetensors file ({error})", path=file, error=error)) from error


def _is_ai00(tensors: Mapping[str, Tensor]) -> bool:
    if any(name.endswith((".time_first", ".time_mix_w1")) for name in tensors):
        return True
    width = tensors["emb.weight"].shape[1] if "emb.weight" in tensors else None
    low_rank = tensors.get("blocks.0.att.w1")
    return low_rank is not None and low_rank.shape[0] != width


_VECTOR = re.compile(r"\.att\.(x_[rwkvag]|[wav]0|k_[ka]|time_mix_[kvrg]|time_maa_[xwkvrg]|time_decay)$|"
                     r"\.ffn\.(x_k|time_mix_[kr]|time_maa_[kr])$")  # fmt: skip


def _unsqueezed(name: str, tensor: Tensor) -> Tensor:
    return tensor.view(1, 1, -1) if tensor.dim() == 1 and _VECTOR.search(name) else tensor
