"""RWKV-6 and RWKV-7 as GGUF, the format of llama.cpp and what is built on it.

Names, axes, keys and the type of each tensor follow llama.cpp: `src/models/rwkv6.cpp`, `src/models/rwkv7.cpp`,
`conversion/rwkv.py` and, for what stays unquantised, `src/llama-quant.cpp`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rookery.errors import UserError
from rookery.formats import vocabulary
from rookery.formats.source import Source
from rookery.formats.stream import Progress, replacing
from rookery.i18n import _
from rookery.models import ModelShape
from rookery.tokenizer import Tokenizer

TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""Our name of a precision -> GGUF's."""

_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
_ARCHITECTURES = {"x060": "rwkv6", "x070": "rwkv7"}

_ENDLESS = 1 << 20
"""Context length to declare: RWKV has no limit of its own."""

_RESCALE = 6
"""Layers after which llama.cpp halves the residual stream of RWKV-6, to stay within fp16. The matrices that write to it
are stored divided accordingly, by powers of two."""

_BLOCK = 32
"""Elements that share a scale in Q8_0."""

_CHUNK = 1 << 22
"""Elements that are quantised at once."""

_WHOLE = {
    "emb": "token_embd",
    "head": "output",
    "ln_out": "output_norm",
    "blocks.0.ln0": "token_embd_norm",
}
_MODULES = {
    "ln1": "attn_norm",
    "ln2": "attn_norm_2",
    "att.ln_x": "time_mix_ln",
    "att.receptance": "time_mix_receptance",
    "att.key": "time_mix_key",
    "att.value": "time_mix_value",
    "att.gate": "time_mix_gate",
    "att.output": "time_mix_output",
    "ffn.key": "channel_mix_key",
    "ffn.value": "channel_mix_value",
    "ffn.receptance": "channel_mix_receptance",
}
_PARAMETERS = {
    "att.time_maa_x": "time_mix_lerp_x",
    "att.time_maa_w1": "time_mix_w1",
    "att.time_maa_w2": "time_mix_w2",
    "att.time_decay": "time_mix_decay",
    "att.time_decay_w1": "time_mix_decay_w1",
    "att.time_decay_w2": "time_mix_decay_w2",
    "att.time_faaaa": "time_mix_first",
    "ffn.time_maa_k": "channel_mix_lerp_k",
    "ffn.time_maa_r": "channel_mix_lerp_r",
    "ffn.x_k": "channel_mix_lerp_k",
} | {f"att.{part}": f"time_mix_{part}" for part in ("k_k", "k_a", "r_k", *(f"{x}{n}" for x in "wagv" for n in "012"))}

_MIXES = {"x060": [f"time_maa_{x}" for x in "wkvrg"], "x070": [f"x_{x}" for x in "rwkvag"]}
"""Mixes that are one tensor here, in the order of its rows."""

_TRANSPOSED = re.compile(r"\.(time_maa_w[12]|time_decay_w[12]|[wagv][12])$")
_FP32 = re.compile(r"time_mix_(first|w[12]|decay_w[12]|lerp_fused)\.weight$")
"""Besides vectors: what llama.cpp keeps in fp32."""

_SKIPPED = re.compile(r"^blocks\.0\.att\.v[012]$|_mask$")
"""What no forward pass reads."""

_UNQUANTISED = re.compile(r"time_mix_[agv][12]\.weight$")


@dataclass(frozen=True)
class _Item:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    produce: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        elements = prod(self.shape)
        return elements // _BLOCK * (_BLOCK + 2) if self.type == "Q8_0" else elements * (4 if self.type == "F32" else 2)

    def content(self) -> np.ndarray:
        """The elements, in the type of the file, as bytes."""
        tensor = self.produce().reshape(self.shape).contiguous()
        if self.type == "Q8_0":
            return _quantised(tensor)
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[self.type]
        return tensor.to(dtype).reshape(-1).view(torch.uint8).numpy()


def write(
    path: Path,
    source: Source,
    shape: ModelShape,
    precision: str,
    tokenizer: Tokenizer | None,
    *,
    progress: Progress | None = None,
) -> None:
    """Write a model as GGUF.

    Args:
        shape: of the model; see `check`.
        precision: of the large matrices, one of `TYPES`. Vectors are fp32, small matrices fp32 or at least 16 bits.
        tokenizer: goes into the file with the template of a chat and the tokens that end a document and a turn; None
            leaves a file that takes token ids only.

    Raises:
        UserError: the file cannot be written.
    """
    gguf = _library()
    items = _items(source, shape, TYPES[precision])
    done, total = 0, sum(item.bytes for item in items)
    with replacing(path) as beside, closing(gguf.GGUFWriter(beside, _ARCHITECTURES[shape.version])) as writer:
        _add_facts(writer, shape, gguf.LlamaFileType[_FILE_TYPES[TYPES[precision]]], source.path.stem)
        _add_tokenizer(writer, tokenizer, shape.vocab_size, gguf.TokenType)
        for item in items:
            kind = gguf.GGMLQuantizationType[item.type]
            writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), item.bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for item in items:
            writer.write_tensor_data(item.content())
            done += item.bytes
            if progress is not None:
                progress(done, total)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(_("GGUF needs the package gguf: python -m pip install 'rookery[gguf]'")) from error
    return gguf


def check(shape: ModelShape, name: str) -> None:
    """Refuse a model that llama.cpp cannot run.

    Raises:
        UserError: another version than x060 and x070, or dimensions that no released model has.
    """
    if shape.version not in _ARCHITECTURES:
        raise UserError(
            _(
                "{path} is {version}; llama.cpp runs x060 and x070. .safetensors and .st take it",
                path=name,
                version=shape.version,
            )
        )
    if shape.dim_att != shape.n_embd or shape.head_size_divisor != 8:
        raise UserError(
            _(
                "{path} is shaped as no released model is (dim_att {dim_att}, head_size_divisor {divisor}), which "
                "llama.cpp cannot run",
                path=name,
                dim_att=shape.dim_att,
                divisor=shape.head_size_divisor,
            )
        )


def _items(source: Source, shape: ModelShape, kind: str) -> list[_Item]:
    """The tensors of the file in the order of the source."""
    items = []
    mixes = _MIXES[shape.version]
    for name, size in source.shapes.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        layer, part = (int(block[1]), block[2]) if block else (0, name)
        if part == f"att.{mixes[0]}":
            names = [f"blocks.{layer}.att.{mix}" for mix in mixes]
            fused = (len(mixes), 1, 1, size[-1])
            items.append(_Item(f"blk.{layer}.time_mix_lerp_fused.weight", fused, "F32", _stacked(source, names)))
        if part.removeprefix("att.") in mixes or _SKIPPED.search(name):
            continue
        new = _name(name, layer, part)
        size = _size(name, size)
        produce = _produced(source, name, _scale(shape, layer, part))
        items.append(_Item(new, size, _type(new, size, kind), produce))
        # Block 0 has no value residual, but llama.cpp wants tensors there, of the sizes of a0, a1 and a2.
        if re.fullmatch(r"blocks\.0\.att\.a[012]", name):
            items.append(_Item(new.replace("mix_a", "mix_v"), size, _type(new, size, kind), produce))
    return items


def _name(name: str, layer: int, part: str) -> str:
    module, _dot, last = part.rpartition(".")
    whole = _WHOLE.get(name.rpartition(".")[0])
    if whole:
        return f"{whole}.{last}"
    if part in _PARAMETERS:
        return f"blk.{layer}.{_PARAMETERS[part]}.weight"
    if module in _MODULES:
        return f"blk.{layer}.{_MODULES[module]}.{last}"
    raise UserError(_("GGUF has no place for {name}", name=name))


def _size(name: str, size: Sequence[int]) -> tuple[int, ...]:
    """The shape here, slowest axis first: vectors are flat, matrices [out, in]."""
    if name.endswith(".r_k"):
        return (prod(size),)
    size = tuple(size) if len(size) < 3 or size[0] > 1 else (size[-1],)
    return (*size[:-2], size[-1], size[-2]) if _TRANSPOSED.search(name) else size


def _type(name: str, size: tuple[int, ...], kind: str) -> str:
    if len(size) == 1 or _FP32.search(name):
        return "F32"
    if kind == "Q8_0" and (size[-1] % _BLOCK or _UNQUANTISED.search(name)):
        return "F16"
    return kind


def _scale(shape: ModelShape, layer: int, part: str) -> float:
    rescaled = shape.version == "x060" and part in ("att.output.weight", "ffn.value.weight")
    return 0.5 ** (layer // _RESCALE) if rescaled else 1.0


def _produced(source: Source, name: str, scale: float) -> Callable[[], Tensor]:
    def produce() -> Tensor:
        tensor = source.tensor(name)
        if _TRANSPOSED.search(name):
            tensor = tensor.mT
        return tensor if scale == 1 else tensor * scale

    return produce


def _stacked(source: Source, names: Sequence[str]) -> Callable[[], Tensor]:
    return lambda: torch.stack([source.tensor(name).flatten() for name in names])


def _quantised(tensor: Tensor) -> np.ndarray:
    gguf = _library()
    rows = tensor.reshape(-1, tensor.shape[-1])
    step = max(1, _CHUNK // rows.shape[1])
    kind = gguf.GGMLQuantizationType.Q8_0
    chunks = [gguf.quants.quantize(rows[i : i + step].float().numpy(), kind) for i in range(0, len(rows), step)]
    return np.concatenate([chunk.reshape(-1) for chunk in chunks])


def _add_facts(writer: Any, shape: ModelShape, file_type: int, name: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(_ENDLESS)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.dim_ffn)
    writer.add_head_count(0)
    writer.add_layer_norm_eps(1e-5)
    writer.add_wkv_head_size(shape.head_size)
    if shape.version == "x060":
        writer.add_rescale_every_n_layers(_RESCALE)
        writer.add_time_mix_extra_dim(shape.ranks["mix"])
        writer.add_time_decay_extra_dim(shape.ranks["decay"])
    else:
        writer.add_decay_lora_rank(shape.ranks["w"])
        writer.add_iclr_lora_rank(shape.ranks["a"])
        writer.add_value_residual_mix_lora_rank(shape.ranks["v"])
        writer.add_gate_lora_rank(shape.ranks["g"])
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer | None, size: int, types: Any) -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(size)
        return
    pieces = vocabulary.pieces(tokenizer)
    pieces += [b""] * (size - len(pieces))
    # llama.cpp takes tokens as Python writes bytes, without the quotes.
    texts = [repr(piece)[2:-1] if piece else f"[PAD{i}]" for i, piece in enumerate(pieces)]
    kinds = [types.NORMAL if piece else types.UNUSED for piece in pieces]
    end = tokenizer.end_of_document
    if end is not None:
        texts[end], kinds[end] = "<s>", types.CONTROL
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_chat_template(vocabulary.CHAT_TEMPLATE)
    if end is not None:
        writer.add_bos_token_id(end)
        writer.add_eos_token_id(end)
    turn = vocabulary.end_of_turn(pieces)
    if turn is not None:
        writer.add_eot_token_id(turn)
