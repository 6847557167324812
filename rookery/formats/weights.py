"""Reading weight files: .pth, .safetensors, .st and .state (Ai00), Hugging Face and run directories.

Whatever wrote the file, `read_weights` returns tensors under RWKV-LM's names, in its axis order, each [1, 1, C] vector
unsqueezed. Nothing in a file is executed.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rookery.errors import UserError
from rookery.formats import ai00, hf
from rookery.formats.pieces import are_pieces, read_pieces
from rookery.formats.stream import AI00, SAFETENSORS
from rookery.i18n import N_, _

PREFIXES = ("_forward_module.", "module.", "model.")
"""What DeepSpeed, DDP and RWKV-PEFT put before a name."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a model, state or adapter file, on the CPU, memory-mapped where the format allows it.

    Args:
        path: a .pth, .safetensors, .st or .state file, a Hugging Face directory of an RWKV-7 model, or a run directory,
            whose newest weights are meant; of weights in pieces, as several devices save them, any one.

    Raises:
        UserError: the file is missing, of an unknown kind, damaged, or holds something else than tensors.
    """
    file = weight_file(path)
    suffix = file.suffix.lower()
    if file.name == hf.INDEX:
        tensors = {name: tensor for shard in _shards(file) for name, tensor in _read_safetensors(shard).items()}
    elif are_pieces(file):
        tensors = read_pieces(file)
    elif suffix in SAFETENSORS:
        tensors = _read_safetensors(file)
    else:
        tensors = _read_pth(file)
    try:
        return normalise(tensors, in_ai00=suffix in AI00)
    except (ValueError, LookupError, RuntimeError) as error:
        raise UserError(
            _("{path} holds tensors of shapes that no file of that kind has ({error})", path=file, error=error)
        ) from error


def weight_file(path: str | Path) -> Path:
    """The weight file meant by `path`: itself; of a run directory the newest weights: rwkv-final.pth, else the last
    written of rwkv-N.pth and the checkpoints an unfinished run goes on from, else its newest adapter, else
    rwkv-init.pth; of a Hugging Face directory model.safetensors, or the index of its parts."""
    path = Path(path)
    if not path.exists():
        raise UserError(_("{path} does not exist", path=path))
    if path.is_file():
        return path
    for name in ("rwkv-final.pth", hf.INDEX, hf.WEIGHTS):
        if (path / name).exists():
            return path / name
    numbered = [file for file in path.iterdir() if re.fullmatch(r"rwkv-\d+\.pth", file.name)]
    candidates = [*numbered, *checkpoint_weights(path)]
    if candidates:
        return max(candidates, key=lambda file: file.stat().st_mtime_ns)
    adapters = list(path.glob("adapter-*.safetensors"))
    if adapters:
        return max(adapters, key=lambda file: file.stat().st_mtime_ns)
    initial = path / "rwkv-init.pth"
    if initial.exists():
        return initial
    raise UserError(_("{path} is a directory without rwkv-final.pth, rwkv-N.pth or rwkv-init.pth", path=path))


def checkpoint_weights(run: Path) -> list[Path]:
    """The weights of the checkpoints in a run directory; of one that several devices saved, the first of its pieces."""
    return [
        file
        for name in ("weights.safetensors", "weights-00000-of-*.safetensors")
        for file in run.glob(f"checkpoints/step-*/{name}")
    ]


def normalise(tensors: Mapping[str, Tensor], *, in_ai00: bool = False) -> dict[str, Tensor]:
    """The same tensors under RWKV-LM's names and axis order.

    Args:
        in_ai00: the file is called as Ai00's are.
    """
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if hf.is_hf(tensors):
        tensors = hf.to_rwkv(tensors)
    elif ai00.is_ai00(tensors, named_so=in_ai00):
        tensors = ai00.to_rwkv(tensors)
    return {name: _unsqueezed(name, tensor) for name, tensor in tensors.items()}


def load_pth(file: Path) -> object:
    """What a .pth holds, without running code that it may bring: tensors in lists and dictionaries.

    Raises:
        UserError: the file is damaged, or would run code.
    """
    damaged = _("{path} is damaged or not a PyTorch file; copy or download it again", path=file)
    with open(file, "rb") as content:
        begin = content.read(2)
    if begin not in (b"PK", b"\x80\x02"):  # a zip archive; before PyTorch 1.6, a pickle
        inside = _kind_inside(file)
        if inside == ".safetensors":
            raise _mislabelled(file, inside)
        if kind := OTHER_KINDS.get(inside or file.suffix.lower()):
            raise UserError(
                _("{path} is {kind}, no file of weights: choose a .pth or .safetensors", path=file, kind=_(kind))
            )
        raise UserError(damaged)
    try:
        # Files older than PyTorch 1.6 are no zip archives and cannot be mapped.
        mappable = zipfile.is_zipfile(file)
        if mappable and not _is_stored(file):
            raise UserError(damaged)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise UserError(
                _("{path} holds more than tensors and would run code when read; it is refused", path=file)
            ) from error
        raise UserError(damaged) from error
    except Exception as error:  # an unpickler that meets arbitrary bytes raises whatever they lead it to
        raise UserError(damaged) from error


def _read_pth(file: Path) -> dict[str, Tensor]:
    content = load_pth(file)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(name, str) and is_plain(t) for name, t in content.items()):
        raise UserError(_("{path} is not a flat dictionary of tensors", path=file))
    return content


OTHER_KINDS = {
    ".jsonl": N_("training data"),
    ".json": N_("a JSON file"),
    ".txt": N_("a text"),
    ".bin": N_("tokens of training data"),
    ".idx": N_("the index of training data"),
    ".npy": N_("a NumPy array"),
    ".csv": N_("a table"),
    ".parquet": N_("a table"),
    ".toml": N_("a recipe"),
    ".gguf": N_("a GGUF model, which is made for llama.cpp and not for training"),
}
"""What people take for weights by mistake, by the ending."""


def is_plain(value: object) -> bool:
    """Whether it is a tensor with a place in memory for each element. A file could name one without (sparse, or one
    element repeated a million times), which would take all memory as soon as it was used."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return not value.is_quantized and value.nbytes <= value.untyped_storage().nbytes()


def _is_stored(archive: Path) -> bool:
    """Whether nothing in the zip archive is compressed or larger than the archive, as in what `torch.save` writes."""
    size = archive.stat().st_size
    with zipfile.ZipFile(archive) as content:
        return all(
            entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size <= size
            for entry in content.infolist()
        )


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as content:
            return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        inside = _kind_inside(file) if file.exists() else None
        if inside == ".pth":
            raise _mislabelled(file, inside) from error
        raise UserError(_("{path} is damaged or no safetensors file ({error})", path=file, error=error)) from error


def _kind_inside(file: Path) -> str | None:
    """The ending that fits what a file begins with: .pth, .safetensors or .gguf."""
    with open(file, "rb") as content:
        begin = content.read(9)
    if begin[:4] == b"GGUF":
        return ".gguf"
    if begin[:4] == b"PK\x03\x04":
        return ".pth"
    size = int.from_bytes(begin[:8], "little")
    return ".safetensors" if begin[8:] == b"{" and 8 + size <= file.stat().st_size else None


def _mislabelled(file: Path, ending: str) -> UserError:
    return UserError(_("{path} is a {ending} under another name: rename it to end so", path=file, ending=ending))


def _shards(index: Path) -> list[Path]:
    """The files that a Hugging Face index names, all of them beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names:
            raise ValueError(names)
        return [index.with_name(name) for name in names]  # an error for what is no name but a path
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(_("{path} is damaged or no index of weights ({error})", path=index, error=error)) from error


_VECTOR = re.compile(r"\.att\.(x_[rwkvag]|[wav]0|k_[ka]|time_mix_[kvrg]|time_maa_[xwkvrg]|time_decay)$|"
                     r"\.ffn\.(x_k|time_mix_[kr]|time_maa_[kr])$")  # fmt: skip


def _unsqueezed(name: str, tensor: Tensor) -> Tensor:
    return tensor.view(1, 1, -1) if tensor.dim() == 1 and _VECTOR.search(name) else tensor
