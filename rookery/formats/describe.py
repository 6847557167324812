"""What is inside a file, for people: `rookery inspect`, and whoever needs to know before loading."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from rookery.errors import UserError
from rookery.formats import adapter_peft, hf
from rookery.formats.adapter import adapter_files, read_own
from rookery.formats.load import shape_of, sources_of
from rookery.formats.weights import read_weights, weight_file
from rookery.i18n import _

STATE = ".att.time_state"

ADAPTER_PARTS = {
    "lora_A": "lora",
    "lora_B": "lora",
    "lora.0": "lora",
    "lora.1": "lora",
    "init_lora_A": "pissa",
    "init_lora_B": "pissa",
    "lora_magnitude_vector": "dora",
    "disha": "miss",
    "miss_block": "miss",
    "bone": "miss",
}
"""Last part of an adapter tensor's name -> kind of adapter."""


def describe(path: str | Path) -> dict[str, Any]:
    """What the file or run directory at `path` holds, as plain values.

    Returns:
        ``kind`` ("model", "state", "adapter", "run" or "data") and ``file``, and of weights: ``bytes``, ``tensors``,
        ``parameters``, ``dtypes``; of a model its dimensions, ``ranks`` and optional ``parts``; ``state`` and
        ``adapter`` when there are such tensors, with what the file says of them and of their ``base``; of a run its
        ``status``, ``weights`` and ``checkpoints``, and the newest weights as ``model``; of binidx data ``documents``,
        ``tokens``, ``dtype`` and the longest and shortest document.

    Raises:
        UserError: nothing there, or nothing that is known.
    """
    path = Path(path)
    if adapter_peft.is_peft(path):
        return _describe_weights(path, adapter_peft.read_tensors(path))
    if path.is_dir() and not hf.is_directory(path):
        return _describe_run(path)
    if path.suffix in (".bin", ".idx") or (not path.exists() and Path(f"{path}.idx").exists()):
        return _describe_data(path)
    return _describe_weights(path, read_weights(path))


def _describe_weights(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if not tensors:
        raise UserError(_("{path} holds no tensors", path=path))
    states = {name: tensor for name, tensor in tensors.items() if name.endswith(STATE)}
    adapter = {name: tensor for name, tensor in tensors.items() if _adapter_part(name)}
    facts: dict[str, Any] = {
        "kind": "model" if "emb.weight" in tensors else "adapter" if adapter else "state" if states else "unknown",
        "file": str(path),
        "bytes": sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size,
        "tensors": len(tensors),
        "parameters": sum(t.numel() for name, t in tensors.items() if name not in states and name not in adapter),
        "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())),
    }
    if facts["kind"] == "unknown":
        raise UserError(
            _(
                "{path} holds no RWKV model, state or adapter; its first tensor is {name}",
                path=path,
                name=next(iter(tensors)),
            )
        )
    if facts["kind"] == "model":
        shape = shape_of(tensors, str(path))
        facts |= {
            "version": shape.version,
            "n_layer": shape.n_layer,
            "n_embd": shape.n_embd,
            "dim_att": shape.dim_att,
            "dim_ffn": shape.dim_ffn,
            "head_size": shape.head_size,
            "n_head": shape.n_head,
            "vocab_size": shape.vocab_size,
            "ranks": dict(shape.ranks),
            "parts": {name: int(value) for name, value in asdict(shape.parts).items() if value},
        }
    if states:
        facts["state"] = {"layers": len(states), "shape": list(next(iter(states.values())).shape)}
        if facts["kind"] == "state":
            facts |= _base_of_state(path)
    if adapter:
        facts["adapter"] = _describe_adapter(adapter)
        facts["adapter"]["also_trained"] = sorted(tensors.keys() - adapter.keys()) if facts["kind"] == "adapter" else []
        facts |= _said_of_adapter(path, facts["adapter"])
    return facts


def _base_of_state(path: Path) -> dict[str, Any]:
    """The model that the run beside a state began with; the file itself does not say."""
    try:
        sources = sources_of(path.parent)
    except UserError:  # it is no longer there
        return {}
    return {"base": {"file": str(sources.base)}} if sources.state else {}


def _said_of_adapter(path: Path, adapter: dict[str, Any]) -> dict[str, Any]:
    """What the file itself says, put over what its tensors look like; and its base."""
    if adapter_peft.is_peft(path):
        settings = json.loads((path / adapter_peft.CONFIG).read_text(encoding="utf-8"))
        names = ("peft_type", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights", "init_weights")
        adapter |= {name: settings[name] for name in names if settings.get(name)}
        base = settings.get("base_model_name_or_path")
        return {"base": {"file": base}} if base else {}
    found = read_own(path) if path.suffix.lower() == ".safetensors" else None
    if found is None:
        return {}
    config = found.config
    adapter |= {"kinds": [config.method], "method": config.method, "r": config.r, "tool": found.tool}
    if config.train_parts:
        adapter["train_parts"] = list(config.train_parts)
    if config.method in ("lora", "dora"):
        adapter |= {"alpha": config.alpha} | ({"rslora": True} if config.rslora else {})
    if config.method == "miss":
        adapter["miss_mode"] = config.miss_mode
    return {"base": asdict(found.base)} if found.base else {}


def _adapter_part(name: str) -> str | None:
    """The last part of an adapter tensor's name, or None for any other tensor."""
    stem = name.removesuffix(".weight")
    return next((part for part in ADAPTER_PARTS if stem.endswith(f".{part}")), None)


def _describe_adapter(tensors: dict[str, Tensor]) -> dict[str, Any]:
    parts = {name: str(_adapter_part(name)) for name in tensors}
    modules = {name.removesuffix(".weight").removesuffix(f".{part}") for name, part in parts.items()}
    return {
        "kinds": sorted({ADAPTER_PARTS[part] for part in parts.values()}),
        # The rank is the short side of every adapter matrix; a bat block [in/r, r, r] has it last.
        "ranks": sorted({t.shape[-1] if t.dim() == 3 else min(t.shape) for t in tensors.values() if t.dim() > 1}),
        "modules": sorted({re.sub(r".*blocks\.\d+\.", "", module) for module in modules}),
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
    }


def _describe_run(path: Path) -> dict[str, Any]:
    status_file = path / "status.json"
    facts: dict[str, Any] = {
        "kind": "run",
        "file": str(path),
        "weights": sorted(file.name for glob in ("rwkv-*.pth", "adapter-*.safetensors") for file in path.glob(glob)),
        "checkpoints": sorted(file.name for file in (path / "checkpoints").glob("step-*") if file.is_dir()),
    }
    if status_file.exists():
        facts["status"] = json.loads(status_file.read_text(encoding="utf-8"))
    if facts["weights"]:
        adapters = adapter_files(path)
        file = adapters[0] if adapters else weight_file(path)
        facts["model"] = _describe_weights(file, read_weights(file))
    elif "status" not in facts:
        raise UserError(_("{path} is no run directory: it has neither status.json nor rwkv-*.pth", path=path))
    return facts


def _describe_data(path: Path) -> dict[str, Any]:
    from rookery.data.binidx import BinIdx

    data = BinIdx(path)
    return {
        "kind": "data",
        "file": data.prefix,
        "documents": len(data),
        "tokens": data.tokens,
        "dtype": str(data.dtype),
        "shortest": int(data.sizes.min()),
        "longest": int(data.sizes.max()),
    }
