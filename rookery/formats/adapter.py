"""Adapter files.

Ours is safetensors under RWKV-PEFT's names (`blocks.0.att.key.lora_A`) and says in its metadata (key `rookery`, JSON)
what it is and of which model. Those of RWKV-PEFT, RWKV Runner and Hugging Face peft are read too. Nothing in a file is
executed.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rookery import __version__
from rookery.adapters import AdapterConfig
from rookery.errors import UserError
from rookery.formats.pieces import are_pieces, read_pieces
from rookery.formats.stream import Pending, write_weights
from rookery.formats.weights import checkpoint_weights, read_weights
from rookery.i18n import _
from rookery.models import ModelShape

FORMAT = 1
METADATA = "rookery"
UNUSED = frozenset(f"blocks.0.att.{x}" for x in ("v0", "v1", "v2"))
"""The value residual of block 0 of x070: in some files, read by no forward pass."""

_RUNS, _RUN = 16, 64
"""Of each tensor, the fingerprint takes so many runs of so many elements, evenly spread."""


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to."""

    file: str
    version: str
    n_layer: int
    n_embd: int
    dim_att: int
    dim_ffn: int
    head_size: int
    vocab_size: int
    dtype: str
    fingerprint: str
    """See `fingerprint`."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], file: str | Path) -> Base:
        """What an adapter's file says of the model with these tensors (as `read_weights` gives them)."""
        shape = ModelShape.of_checkpoint({name: tuple(t.shape) for name, t in tensors.items()}, str(file))
        return cls(
            Path(file).name, shape.version, shape.n_layer, shape.n_embd, shape.dim_att, shape.dim_ffn,
            shape.head_size, shape.vocab_size, str(tensors["head.weight"].dtype).removeprefix("torch."),
            fingerprint(tensors),
        )  # fmt: skip

    @property
    def dimensions(self) -> str:
        """As people write them."""
        return f"{self.version} L{self.n_layer} D{self.n_embd} att {self.dim_att} ffn {self.dim_ffn}"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from a file."""

    path: Path
    config: AdapterConfig
    tensors: dict[str, Tensor]
    """`blocks.0.att.key.lora_A` and so on, and whole base parameters."""
    base: Base | None = None
    """None when the file does not say."""
    tool: str = ""
    """What wrote it, as far as known."""

    def fitted(self, tensors: Mapping[str, Tensor], file: str | Path, *, any_base: bool = False) -> AdapterFile:
        """The adapter for the model with these tensors, of the file `file`.

        Args:
            any_base: accept a model of the same dimensions with other weights: a descendant of the adapter's own.

        Raises:
            UserError: it belongs to another model.
        """
        if self.base is not None:
            self._check_base(self.base, Base.of(tensors, file), any_base)
        return replace(self, tensors={name: _widened(name, t, tensors) for name, t in self.tensors.items()})

    def _check_base(self, own: Base, found: Base, any_base: bool) -> None:
        if own.dimensions != found.dimensions:
            raise UserError(
                _(
                    "{adapter} belongs to {own} ({own_dimensions}), not to a model like {file} ({dimensions})",
                    adapter=self.path,
                    own=own.file,
                    own_dimensions=own.dimensions,
                    file=found.file,
                    dimensions=found.dimensions,
                )
            )
        if own.fingerprint != found.fingerprint and not any_base:
            raise UserError(
                _(
                    "{adapter} was trained on {own} (fingerprint {own_print}); {file} has the same dimensions but "
                    "other weights (fingerprint {print}). Give the model it was trained on; if {file} is a descendant "
                    "of that and this is meant, `rookery merge` and `rookery chat` take --any-base (any_base=True in "
                    "Python).",
                    adapter=self.path,
                    own=own.file,
                    own_print=own.fingerprint[:12],
                    file=found.file,
                    print=found.fingerprint[:12],
                )
            )


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, over name, shape and values of each tensor of a model, of large ones over a sample.

    Of a tensor, all of its elements count if there are no more than 1024, else 16 evenly spread runs of 64, all rounded
    to bf16. So it is the same for a .pth and a .safetensors and for fp32 and the bf16 made of it, and differs after any
    training of whole matrices; a change of single rows of the embedding may escape it. Tuned states, which are mounted
    and changed freely, and what no forward pass reads do not count.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if name.endswith((".att.time_state", "_mask")) or name in UNUSED:
            continue
        tensor = tensors[name]
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        flat = tensor.reshape(-1)
        if len(flat) > _RUNS * _RUN:
            last = len(flat) - _RUN
            flat = torch.cat([flat[(start := run * last // (_RUNS - 1)) : start + _RUN] for run in range(_RUNS)])
        values = flat.to(torch.bfloat16).view(torch.int16).numpy()
        digest.update((values if sys.byteorder == "little" else values.byteswap()).tobytes())
    return digest.hexdigest()


def write_adapter(path: str | Path, tensors: Mapping[str, Tensor], config: AdapterConfig, base: Base | None) -> None:
    """Write an adapter of `rookery.adapters.adapter_tensors` with all that is needed to use it again.

    Raises:
        UserError: the file cannot be written.
    """
    facts = {"format": FORMAT, "tool": f"rookery {__version__}", "adapter": asdict(config)}
    if base is not None:
        facts["base"] = asdict(base)
    announced = [Pending(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()]  # type: ignore[misc]
    write_weights(path, announced, metadata={"format": "pt", METADATA: json.dumps(facts, ensure_ascii=False)})


def read_adapter(path: str | Path, *, alpha: float | None = None, pissa_init: str | Path | None = None) -> AdapterFile:
    """Read an adapter.

    Args:
        path: a file of ours, of RWKV-PEFT or of RWKV Runner, a folder of Hugging Face peft, or the run directory of an
            adapter, whose newest is meant.
        alpha: of a LoRA whose file does not say it.
        pissa_init: what the PiSSA began with, where its file does not hold it: `init_pissa.pth` or `init_lora.pth`, or
            the folder of the untrained adapter of Hugging Face peft.

    Raises:
        UserError: the file is missing or damaged, holds no adapter, or what it does not say was not given.
    """
    from rookery.formats import adapter_old, adapter_peft

    path = Path(path)

    def init() -> Mapping[str, Tensor] | None:
        """Of files that hold it themselves, not asked for: it may be gone."""
        return None if pissa_init is None else adapter_old.initial_factors(Path(pissa_init))

    found: AdapterFile | None
    if adapter_peft.is_peft(path):
        found = adapter_peft.read(path, init())
    elif path.is_dir():
        found = _of_run(path)
    else:
        found = read_own(path) if path.suffix.lower() == ".safetensors" and path.exists() else None
    if found is None:
        return adapter_old.read(path, read_weights(path), alpha, init())
    if alpha is not None and found.config.method in ("lora", "dora") and alpha != found.config.alpha:
        raise UserError(
            _("{path} itself says that its alpha is {alpha}; leave yours out", path=path, alpha=found.config.alpha)
        )
    return found


def adapter_files(folder: Path) -> list[Path]:
    """The adapters in a run directory, the one to use first: adapter-final, then the others from the newest on, then
    the untrained adapter-init."""
    rank = {"adapter-final": 2, "adapter-init": 0}
    return sorted(
        folder.glob("adapter-*.safetensors"),
        key=lambda file: (rank.get(file.stem, 1), file.stat().st_mtime_ns),
        reverse=True,
    )


def _of_run(folder: Path) -> AdapterFile:
    files = adapter_files(folder)
    if not files:
        raise UserError(
            _("{folder} holds no adapter: neither adapter-*.safetensors nor adapter_config.json", folder=folder)
        )
    found = read_own(files[0])
    if found is None:
        raise UserError(_("{path} does not say what adapter it is", path=files[0]))
    newest = max(checkpoint_weights(folder), key=lambda file: file.stat().st_mtime_ns, default=None)
    if files[0].stem == "adapter-final" or newest is None or newest.stat().st_mtime_ns < files[0].stat().st_mtime_ns:
        return found
    # An unfinished run: what its checkpoint trained, over what does not train (the factors that a PiSSA began with).
    content = read_pieces(newest) if are_pieces(newest) else _content(newest)[0]
    trained = {re.sub(r"\.adapters\.\w+\.", ".", name): tensor for name, tensor in content.items()}
    return replace(found, path=newest, tensors=found.tensors | trained)


def read_own(path: Path) -> AdapterFile | None:
    """The adapter in a file that says what it is; None for any other file of tensors."""
    tensors, metadata = _content(path)
    if METADATA not in metadata:
        return None
    facts = _facts(path, metadata[METADATA])
    return AdapterFile(path, facts["adapter"], tensors, facts["base"], facts["tool"])


def _content(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file under its own names, mapped, and its metadata."""
    try:
        with safe_open(path, framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - not a dict
            return tensors, content.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(_("{path} is damaged or no safetensors file ({error})", path=path, error=error)) from error


def _facts(path: Path, text: str) -> dict[str, Any]:
    """The metadata, checked."""
    try:
        content = json.loads(text)
        number = content["format"]
        if number != FORMAT:
            raise UserError(
                _("{path} is an adapter of format {number}; this Rookery reads {known}", path=path, number=number,
                  known=FORMAT)
            )  # fmt: skip
        base = content.get("base")
        return {
            "adapter": TypeAdapter(AdapterConfig).validate_python(content["adapter"]),
            "base": None if base is None else TypeAdapter(Base).validate_python(base),
            "tool": str(content.get("tool", "")),
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            _("what {path} says of its adapter cannot be read ({error})", path=path, error=_one_line(error))
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _widened(name: str, tensor: Tensor, base: Mapping[str, Tensor]) -> Tensor:
    """Hugging Face peft's "mini" form of MiSS repeats its columns; ours has as many as the matrix has rows."""
    weight = base.get(f"{name.removesuffix('.disha')}.weight")
    if not name.endswith(".disha") or tensor.dim() != 2 or weight is None:
        return tensor
    rows, columns = weight.shape[0], tensor.shape[1]
    return tensor.repeat(1, rows // columns) if 0 < columns < rows and rows % columns == 0 else tensor
