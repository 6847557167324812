"""RWKV-7 in the layout of Hugging Face: what flash-linear-attention's `RWKV7ForCausalLM` reads.

Names and axes follow `fla/layers/rwkv7.py` and `fla/models/rwkv7/` of flash-linear-attention 0.6, and its
`utils/convert_from_rwkv7.py`: low-rank layers are `nn.Linear`, so their matrices are transposed, and block 0 has no
value residual. Nothing of that library is needed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rookery.errors import UserError
from rookery.formats import vocabulary
from rookery.formats.stream import Pending, Place, Progress, write_weights
from rookery.i18n import _
from rookery.models import ModelShape
from rookery.tokenizer import Tokenizer, save_beside

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""Largest part of the weights, as transformers splits them."""

VOCABULARY = "rwkv_vocab_v20230424.txt"
TOKENIZER = "hf_rwkv_tokenizer.py"
"""Where published RWKV models, and llama.cpp's converter, have their vocabulary, and the class that reads it."""

_WHOLE = {
    "emb.weight": "model.embeddings.weight",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
_MODULES = {
    "ln0": "pre_norm",
    "ln1": "attn_norm",
    "ln2": "ffn_norm",
    "att.receptance": "attn.r_proj",
    "att.key": "attn.k_proj",
    "att.value": "attn.v_proj",
    "att.output": "attn.o_proj",
    "att.ln_x": "attn.g_norm",
    "att": "attn",
}
_LOW_RANK = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}
_UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
_FUSED_MIXES = "rwkvag"
"""Rows of `x_x`, in which files of early versions hold all six mixes."""


def place(name: str, shape: Sequence[int]) -> Place | None:
    """Where the tensor `name` of a .pth goes; None for what no forward pass reads."""
    if name in _UNUSED or name.endswith("_mask"):
        return None
    if name in _WHOLE:
        return Place(_WHOLE[name], tuple(shape))
    if not re.fullmatch(r"blocks\.\d+\.(att|ffn|ln0|ln1|ln2)\..+", name):
        raise UserError(_("the Hugging Face layout has no place for {name}", name=name))
    _blocks, layer, *parents, last = name.split(".")
    module = ".".join(parents)
    low_rank = re.fullmatch(r"([wagv])([012])", last) if module == "att" else None
    if low_rank:
        kind, part = low_rank.groups()
        new = f"attn.{kind}_lora.lora.{_LOW_RANK[part]}"
        size = (shape[-1],) if part == "0" else tuple(reversed(shape))
        return Place(f"model.layers.{layer}.{new}", size, transposed=part != "0")
    new = f"{_MODULES.get(module, module)}.{last}"
    # The mixes of time mixing are [1, 1, C] here too; every other vector is [C].
    keeps = len(shape) < 3 or new.startswith("attn.x_")
    return Place(f"model.layers.{layer}.{new}", tuple(shape) if keeps else (shape[-1],))


def is_directory(path: Path) -> bool:
    """Whether a directory holds a model in this layout."""
    return any((path / name).exists() for name in (WEIGHTS, INDEX))


def is_hf(names: Mapping[str, object]) -> bool:
    """Whether these are the tensors of an RWKV-7 model in this layout."""
    return any(".attn.w_lora.lora.0.weight" in name for name in names)


def to_rwkv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under RWKV-LM's names and axes, as views. The value residual of block 0, which the reference's files
    hold and nothing reads, is zeros."""
    whole = {new: old for old, new in _WHOLE.items()}
    modules = {new: old for old, new in _MODULES.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer_name = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if not layer_name:
            found[whole.get(name, name)] = tensor
            continue
        layer, rest = layer_name.groups()
        prefix = f"blocks.{layer}"
        low_rank = re.fullmatch(r"attn\.([wagv])_lora\.lora\.(2\.bias|0\.weight|2\.weight)", rest)
        if low_rank:
            kind, part = low_rank.groups()
            number = next(key for key, value in _LOW_RANK.items() if value == part)
            found[f"{prefix}.att.{kind}{number}"] = tensor.view(1, 1, -1) if number == "0" else tensor.mT
        elif rest == "attn.x_x":
            for mix, row in zip(_FUSED_MIXES, tensor, strict=True):
                found[f"{prefix}.att.x_{mix}"] = row.reshape(1, 1, -1)
        else:
            module, part = rest.rsplit(".", 1)
            found[f"{prefix}.{modules.get(module, module)}.{part}"] = tensor
    first, a0 = "blocks.0.att", found.get("blocks.0.att.a0")
    if f"{first}.v0" not in found and a0 is not None:
        width, rank = a0.shape[-1], found["blocks.1.att.v1"].shape[1] if "blocks.1.att.v1" in found else 32
        for part, shape in {"v0": (1, 1, width), "v1": (width, rank), "v2": (rank, width)}.items():
            found[f"{first}.{part}"] = torch.zeros(shape, dtype=a0.dtype)
    return found


def check(shape: ModelShape, name: str) -> None:
    """Refuse a model that this layout cannot say.

    Raises:
        UserError: not RWKV-7, or one whose normalisation fla computes otherwise.
    """
    if shape.version != "x070":
        raise UserError(
            _(
                "{path} is {version}; the Hugging Face layout that is written here is that of x070 "
                "(RWKV7ForCausalLM). .safetensors and .st take it",
                path=name,
                version=shape.version,
            )
        )
    # fla takes head_dim x norm_eps for the normalisation after the recurrence, and norm_eps is that of every LayerNorm.
    if shape.dim_att != shape.n_embd or round(shape.head_size * 1e-5, 12) != round(shape.group_norm_eps, 12):
        raise UserError(
            _(
                "{path} has head size {size}: fla would normalise it with another epsilon than it was trained with",
                path=name,
                size=shape.head_size,
            )
        )


def write(
    folder: Path,
    tensors: Sequence[Pending],
    shape: ModelShape,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write the directory: weights, in parts if they are large, configuration, and tokenizer unless there is none.

    A new directory appears whole or not at all. In one that exists, files of these names are replaced.

    Args:
        tensors: under this layout's names.
        dtype: what most of them are, for the configuration.

    Raises:
        UserError: it cannot be written.
    """
    shards = _split(tensors, shard_bytes)
    total = sum(tensor.bytes for tensor in tensors)
    with _replacing(folder) as beside:
        start = 0
        for name, shard in shards.items():
            part = _part_of(progress, start, total)
            write_weights(beside / name, shard, progress=part, called=folder / name)
            start += sum(tensor.bytes for tensor in shard)
        if len(shards) > 1:
            where = {tensor.name: name for name, shard in shards.items() for tensor in shard}
            _write_json(beside / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        end = tokenizer.end_of_document if tokenizer else 0
        _write_json(beside / "config.json", _config(shape, dtype, end))
        if tokenizer is not None:
            _write_tokenizer(beside, tokenizer)


def _split(tensors: Sequence[Pending], shard_bytes: int) -> dict[str, list[Pending]]:
    """File name -> tensors: files of at most `shard_bytes`, except for a tensor that is larger alone."""
    shards: list[list[Pending]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _part_of(progress: Progress | None, start: int, total: int) -> Progress | None:
    return progress and (lambda done, _of_part: progress(start + done, total))


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        yield beside
        if not folder.exists():
            beside.rename(folder)
            return
        for file in folder.iterdir():
            ours = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", file.name) or file.name == INDEX
            if ours and not (beside / file.name).exists():
                file.unlink()
        for file in beside.iterdir():
            os.replace(file, folder / file.name)
    except OSError as error:
        raise UserError(_("cannot write {path}: {error}", path=folder, error=error.strerror or error)) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """transformers knows no tokenizer of this kind, so the directory brings its own, as published models do; it is
    loaded with trust_remote_code=True."""
    pieces = vocabulary.pieces(tokenizer)
    if pieces[0]:
        raise UserError(
            _(
                "the vocabulary {name} has a token of id 0, which ends documents in a Hugging Face directory; "
                "--tokenizer none leaves the tokenizer out",
                name=tokenizer.name,
            )
        )
    save_beside(tokenizer, folder / "vocab")  # for ourselves, unless it is World
    shutil.copyfile(Path(__file__).with_name(TOKENIZER), folder / TOKENIZER)
    lines = [f"{i} {piece!r} {len(piece)}\n" for i, piece in enumerate(pieces) if piece]
    (folder / VOCABULARY).write_text("".join(lines), encoding="utf-8", newline="\n")
    end = "<|rwkv_tokenizer_end_of_text|>"
    special = {f"{role}_token": end for role in ("bos", "eos", "unk", "pad")}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "RwkvTokenizer",
            "auto_map": {"AutoTokenizer": [f"{Path(TOKENIZER).stem}.RwkvTokenizer", None]},
            "added_tokens_decoder": {"0": {"content": end, "special": True}},
            **special,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 20,
            "use_fast": False,
            "chat_template": vocabulary.CHAT_TEMPLATE,
        },
    )
    stops = [i for i in (0, vocabulary.end_of_turn(pieces)) if i is not None]
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": stops, "pad_token_id": 0})


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n")


def _config(shape: ModelShape, dtype: torch.dtype, end_of_document: int | None) -> dict[str, Any]:
    """config.json. `fuse_norm` is off, because fla's fused normalisation of the keys is another formula."""
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "attn_mode": "chunk",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.n_embd,
        "num_hidden_layers": shape.n_layer,
        "head_dim": shape.head_size,
        "num_heads": shape.n_head,
        "value_dim": [shape.n_embd] * shape.n_layer,
        "hidden_ratio": shape.dim_ffn / shape.n_embd,
        "intermediate_size": shape.dim_ffn,
        "hidden_act": "sqrelu",
        "decay_low_rank_dim": shape.ranks["w"],
        "gate_low_rank_dim": shape.ranks["g"],
        "a_low_rank_dim": shape.ranks["a"],
        "v_low_rank_dim": shape.ranks["v"],
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "fuse_norm": False,
        "fuse_cross_entropy": True,
        "attn": None,
        "use_cache": True,
        "tie_word_embeddings": False,
        "max_position_embeddings": 1 << 20,
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "pad_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
