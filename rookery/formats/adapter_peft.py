"""Adapter folders of Hugging Face peft: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rookery.adapters import AdapterConfig
from rookery.errors import UserError
from rookery.formats.adapter import AdapterFile
from rookery.formats.adapter_old import Factors, split, targets_of
from rookery.formats.stream import Pending, replacing, write_weights
from rookery.formats.weights import read_weights
from rookery.i18n import _

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."

_FLA_MATRICES = {"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
"""What flash-linear-attention's RWKV-7 calls its matrices; those of channel mixing have RWKV-LM's names."""


def is_peft(path: Path) -> bool:
    """Whether this is such a folder."""
    return (path / CONFIG).is_file()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder under RWKV-LM's names, the parts of an adapter as peft calls them."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return {_rwkv_name(key): tensor for key, tensor in read_weights(folder / name).items()}
    raise UserError(_("{folder} lacks {file}", folder=folder, file=WEIGHTS[0]))


def read(folder: Path, init: Factors | None) -> AdapterFile:
    """See `rookery.formats.adapter.read_adapter`."""
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, r = str(settings["peft_type"]).upper(), int(settings["r"])
        alpha = float(settings["lora_alpha"]) if kind == "LORA" else float(r)
        dropout = float(settings.get("lora_dropout") or 0)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(_("{path} cannot be read ({error})", path=folder / CONFIG, error=error)) from error
    _refuse_what_is_not_read(folder, kind, settings)
    tensors = {}
    modules = set()
    for name, tensor in read_tensors(folder).items():
        found = split(name)
        if found:
            module, part = found
            modules.add(module)
            name = f"{module}.{'disha' if part == 'miss_block' else part}"
        tensors[name] = tensor
    config = AdapterConfig(r=r, alpha=alpha, rslora=bool(settings.get("use_rslora")), targets=targets_of(modules))
    if kind == "MISS":
        mode: Any = "bat_rows" if settings.get("init_weights") == "bat" else "bone"
        return AdapterFile(folder, replace(config, method="miss", miss_mode=mode, rslora=False), tensors, tool="peft")
    config = replace(config, dropout=dropout, method="lora")
    if settings.get("use_dora"):
        return AdapterFile(folder, replace(config, method="dora"), tensors, tool="peft")
    if not str(settings.get("init_lora_weights")).startswith("pissa"):
        return AdapterFile(folder, config, tensors, tool="peft")
    if init is None:
        raise UserError(
            _(
                "{folder} is a PiSSA without what it began with. Give that with --pissa-init (the folder of the "
                "adapter saved before its training), or save it again with peft's "
                "path_initial_model_for_weight_conversion, which makes a LoRA of it.",
                folder=folder,
            )
        )
    # Hugging Face's PiSSA has a strength; ours has it in B.
    scale = config.scale
    tensors |= {name: tensor for name, tensor in init.items() if name.replace("init_", "") in tensors}
    tensors = {name: t * scale if name.endswith("lora_B") else t for name, t in tensors.items()}
    plain = replace(config, method="pissa", alpha=float(r), dropout=0.0, rslora=False)
    return AdapterFile(folder, plain, tensors, tool="peft")


def write_peft(folder: str | Path, adapter: AdapterFile) -> None:
    """Write the adapter for Hugging Face peft, for a model with RWKV-LM's names. A PiSSA becomes the LoRA of twice its
    rank that is the same function.

    Raises:
        UserError: peft has no such adapter, or the folder cannot be written.
    """
    folder = Path(folder)
    config, tensors = adapter.config, dict(adapter.tensors)
    whole = [name for name in tensors if split(name) is None]
    if whole:
        raise UserError(
            _(
                "{adapter} also holds base parameters ({name}), for which a folder of peft has no place; merge it "
                "instead",
                adapter=adapter.path,
                name=whole[0],
            )
        )
    if config.method == "miss" and config.miss_mode == "bat":
        raise UserError(
            _(
                "{adapter} is a MiSS of the form bat by columns of blocks; Hugging Face peft only has that by rows. "
                "Merge it instead.",
                adapter=adapter.path,
            )
        )
    if config.method == "pissa":
        tensors, config = _pissa_as_lora(tensors, config)
    common: dict[str, Any] = {
        "base_model_name_or_path": adapter.base.file if adapter.base else None,
        "bias": "none",
        "inference_mode": True,
        "r": config.r,
        "target_modules": sorted(set(map(_module, tensors))),
        "task_type": "CAUSAL_LM",
    }
    if config.method == "miss":
        mode = "bat" if config.miss_mode == "bat_rows" else True
        settings = common | {"peft_type": "MISS", "init_weights": mode, "mini_r": 1, "miss_dropout": 0.0}
    else:
        settings = common | {
            "peft_type": "LORA",
            "init_lora_weights": True,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "use_dora": config.method == "dora",
            "use_rslora": config.rslora,
        }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / CONFIG) as beside:
            beside.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(_("cannot write {path}: {error}", path=folder, error=error)) from error
    named = {_peft_name(name): tensor.contiguous() for name, tensor in tensors.items()}
    announced = [Pending(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in named.items()]  # type: ignore[misc]
    write_weights(folder / WEIGHTS[0], announced)


def _refuse_what_is_not_read(folder: Path, kind: str, settings: Mapping[str, Any]) -> None:
    if kind not in ("LORA", "MISS"):
        raise UserError(
            _("{folder} is an adapter of kind {kind}; Rookery reads {known}", folder=folder, kind=kind,
              known="LORA, MISS")
        )  # fmt: skip
    for name in ("rank_pattern", "alpha_pattern"):
        if settings.get(name):
            raise UserError(
                _("{folder} has {setting} of its own for some matrices, which Rookery does not read; merge it with "
                  "peft", folder=folder, setting=name)
            )  # fmt: skip


def _rwkv_name(name: str) -> str:
    name = name.removeprefix(PREFIX)
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(attn|ffn)\.(\w+)\.(.+)", name)
    if layer is None:
        return name
    number, part, matrix, rest = layer.groups()
    return f"blocks.{number}.{'att' if part == 'attn' else 'ffn'}.{_FLA_MATRICES.get(matrix, matrix)}.{rest}"


def _peft_name(name: str) -> str:
    if name.endswith(".disha"):
        return PREFIX + name.removesuffix("disha") + "miss_block"
    return PREFIX + (name if name.endswith(".lora_magnitude_vector") else f"{name}.weight")


def _module(name: str) -> str:
    """The matrix of an adapter's tensor, without the number of its block."""
    return re.sub(r"^blocks\.\d+\.", "", name.rsplit(".", 1)[0])


def _pissa_as_lora(tensors: Mapping[str, Tensor], config: AdapterConfig) -> tuple[dict[str, Tensor], AdapterConfig]:
    """B A - B0 A0 = [B, -B0] [A; A0]."""
    joined = {}
    for name in tensors:
        module, part = name.rsplit(".", 1)
        before = tensors[f"{module}.init_{part.removeprefix('init_')}"]
        if part == "lora_A":
            joined[name] = torch.cat([tensors[name], before.to(tensors[name].dtype)])
        elif part == "lora_B":
            joined[name] = torch.cat([tensors[name], -before.to(tensors[name].dtype)], dim=1)
    return joined, replace(config, method="lora", r=2 * config.r, alpha=2.0 * config.r)
