"""Adapter files that do not say what they are: the slim .pth of RWKV-PEFT and RWKV Runner, and those of web-rwkv."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rookery.adapters import AdapterConfig
from rookery.errors import UserError
from rookery.formats.adapter import AdapterFile
from rookery.formats.weights import read_weights
from rookery.i18n import _

PART = re.compile(r"(?P<module>.+)\.(?P<part>(init_)?lora_[AB]|lora_magnitude_vector|disha|bone|miss_block)(\.weight)?")

Factors = Mapping[str, Tensor]
"""`blocks.0.att.key.init_lora_A` and `.init_lora_B` of a PiSSA."""


def split(name: str) -> tuple[str, str] | None:
    """`blocks.0.att.key.lora_A` -> matrix and part; None for any other tensor."""
    match = PART.fullmatch(name)
    return (match["module"], match["part"]) if match else None


def read(path: Path, tensors: Mapping[str, Tensor], alpha: float | None, init: Factors | None) -> AdapterFile:
    """See `rookery.formats.adapter.read_adapter`."""
    parts = {name: found for name in tensors if (found := split(name))}
    if not parts:
        raise UserError(
            _("{path} holds no adapter; its first tensor is {name}", path=path, name=next(iter(tensors), "-"))
        )
    whole = {name: tensor for name, tensor in tensors.items() if name not in parts}
    own = {_name(*found): tensors[name] for name, found in parts.items()}
    kinds = {name.rsplit(".", 1)[1].removeprefix("init_") for name in own}
    if init is not None:
        own |= {name: tensor for name, tensor in init.items() if name.replace("init_", "") in own}
    settings = _settings(path, own, kinds, alpha)
    config = AdapterConfig(targets=targets_of({module for module, _part in parts.values()}), **settings)
    return AdapterFile(path, config, own | whole)


def _name(module: str, part: str) -> str:
    return f"{module}.{'disha' if part in ('bone', 'miss_block') else part}"


def _settings(path: Path, own: Mapping[str, Tensor], kinds: set[str], alpha: float | None) -> dict[str, Any]:
    """Method, rank and what goes with the method."""
    if kinds == {"disha"}:
        sizes = {(tensor.dim(), tensor.shape[-1] if tensor.dim() == 3 else tensor.shape[0]) for tensor in own.values()}
        if len(sizes) == 1:
            dimensions, r = sizes.pop()
            return {"method": "miss", "r": r, "alpha": float(r), "miss_mode": "bat" if dimensions == 3 else "bone"}
    if kinds in ({"lora_A", "lora_B"}, {"lora_A", "lora_B", "lora_magnitude_vector"}):
        ranks = {tensor.shape[0] for name, tensor in own.items() if name.endswith(".lora_A")}
        if len(ranks) == 1:
            r = ranks.pop()
            if any(name.endswith(".init_lora_A") for name in own):
                return {"method": "pissa", "r": r, "alpha": float(r)}
            if alpha is None:
                raise UserError(
                    _(
                        "{path} does not say its alpha, which decides how strong it is. Give the lora_alpha of its "
                        "training with --alpha (`rookery train`: --lora_alpha); if it is a PiSSA, which has none, give "
                        "--pissa-init its init_pissa.pth or init_lora.pth.",
                        path=path,
                    )
                )
            return {"method": "dora" if "lora_magnitude_vector" in kinds else "lora", "r": r, "alpha": float(alpha)}
    raise UserError(
        _(
            "{path} holds an adapter of parts that do not go together: {parts}",
            path=path,
            parts=", ".join(sorted(kinds)),
        )
    )


def initial_factors(path: Path) -> dict[str, Tensor]:
    """What a PiSSA began with, `blocks.0.att.key.init_lora_A` and `.init_lora_B`, from a file that holds it under these
    names or, as an untrained adapter of its own, without `init_`.

    Raises:
        UserError: the file cannot be read, or holds nothing of the kind.
    """
    from rookery.formats import adapter_peft

    tensors = adapter_peft.read_tensors(path) if adapter_peft.is_peft(path) else read_weights(path)
    found = {name: parts for name in tensors if (parts := split(name))}
    factors = {
        f"{module}.{part if part.startswith('init_') else f'init_{part}'}": tensors[name]
        for name, (module, part) in found.items()
        if part.removeprefix("init_") in ("lora_A", "lora_B")
    }
    if not factors:
        raise UserError(_("{path} does not hold what a PiSSA began with: no init_lora_A and init_lora_B", path=path))
    return factors


def targets_of(modules: set[str]) -> tuple[str, ...]:
    """`AdapterConfig.targets` that select these matrices, short where all blocks have the same."""
    short = sorted({re.sub(r"^blocks\.\d+\.", "", module) for module in modules})
    layers = {module.split(".")[1] for module in modules if module.startswith("blocks.")}
    everywhere = {f"blocks.{layer}.{name}" for layer in range(len(layers)) for name in short}
    return tuple(short if modules == everywhere else sorted(modules))
