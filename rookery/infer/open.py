"""Opening a model together with its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rookery import formats, tokenizer
from rookery.errors import UserError
from rookery.formats.beside import beside
from rookery.formats.load import sources_of
from rookery.i18n import _
from rookery.infer.forms import Form, form_of, shape_refused
from rookery.models import Model
from rookery.ops.native import numba_installed
from rookery.tokenizer import Tokenizer
from rookery.tokenizer.world import World

WORLD_SIZE = 65536

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
"""Formats of weights by the names that commands give them."""


def open_model(
    path: str | Path,
    *,
    tokenizer_name: str = "",
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    state: str | Path | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    any_base: bool = False,
) -> tuple[Model, Tokenizer]:
    """The model of a .pth, .safetensors or .st file or a run directory, as `rookery.load` takes them, and its tokenizer
    (see `find_tokenizer`).

    Raises:
        UserError: a file is missing or damaged, or no tokenizer of the model's size was found.
    """
    adapters = () if adapter is None else adapter
    model = formats.load(path, device=device, dtype=dtype, state=state, adapter=adapters, any_base=any_base)
    return model, find_tokenizer(path, model.shape.vocab_size, tokenizer_name)


def open_form(path: str | Path, *, device: str = "auto", dtype: str = "auto", **options: Any) -> tuple[Form, Tokenizer]:
    """As `open_model`, giving the fastest form of the model.

    Args:
        dtype: of the weights: "fp32", "fp16", "bf16", "int8" or "auto": on a GPU the file's; on a CPU bf16 where the
            file is bf16 and the model can be packed, which computes from them in fp32 while it decodes, else fp32.
        options: of `open_model`.

    Raises:
        UserError: as `open_model`; or `dtype` is unknown or not possible here.
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(_("{dtype} is none of {known}", dtype=dtype, known=", ".join(["auto", *DTYPES])))
    wanted: str | torch.dtype = "auto" if dtype in ("auto", "int8") else DTYPES[dtype]
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if wanted == "auto" and on_cpu:
        tensors = formats.read_weights(sources_of(path).base)
        wanted = tensors["head.weight"].dtype
        packed = numba_installed() and not shape_refused(formats.shape_of(tensors, str(path)))
        wanted = torch.bfloat16 if wanted == torch.bfloat16 and packed else torch.float32
    model, vocabulary = open_model(path, device=device, dtype=wanted, **options)
    return form_of(model, torch.int8 if dtype == "int8" else None), vocabulary


def find_tokenizer(path: str | Path, vocab_size: int, name: str = "") -> Tokenizer:
    """The tokenizer called `name`; without a name, World for a model of its size, else the vocabulary kept beside it.

    Raises:
        UserError: there is none, or it has more ids than the model.
    """
    if name:
        found = tokenizer.load(name)
    elif vocab_size == WORLD_SIZE:
        found = World()
    else:
        kept = beside(path)
        if kept is None:
            raise UserError(
                _(
                    "{path} has {size} token ids, so its tokenizer is not World, and neither vocab.json nor vocab.txt "
                    "is beside it. Name the vocabulary with --tokenizer FILE.",
                    path=path,
                    size=vocab_size,
                )
            )
        found = kept
    if found.vocab_size > vocab_size:
        raise UserError(
            _(
                "The tokenizer {name} has {ids} ids and {path} only {size}; it belongs to another model.",
                name=found.name,
                ids=found.vocab_size,
                path=path,
                size=vocab_size,
            )
        )
    return found
