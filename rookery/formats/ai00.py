"""The layout of Ai00 and web-rwkv: what the Python converter of both, `convert_safetensors.py`, makes of a .pth.

Names change, matrices of low-rank layers and tuned states are transposed, and every tensor is fp16, which web-rwkv asks
for. The converter written in Rust leaves the matrices of x070 as they are, which web-rwkv cannot use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from rookery.formats.stream import Place

_TRANSPOSED = re.compile(r"\.(time_mix_w[12]|time_decay_w[12]|[wagv][12]|time_state|lora\.0)$")
"""New names of the tensors whose last two axes are swapped."""


def place(name: str, shape: Sequence[int]) -> Place:
    """Where the tensor `name` of a .pth goes."""
    new = name.replace("time_faaaa", "time_first").replace("time_maa", "time_mix")
    new = new.replace("lora_A", "lora.0").replace("lora_B", "lora.1").lower()
    transposed = _TRANSPOSED.search(new) is not None
    return Place(new, (*shape[:-2], shape[-1], shape[-2]) if transposed else tuple(shape), transposed)


def is_ai00(tensors: Mapping[str, Tensor], *, named_so: bool) -> bool:
    """Whether tensors are in this layout. A model or an adapter tells by itself (an x070 model of the converter written
    in Rust is in RWKV-LM's); a state looks the same in both, so that the name of its file decides.

    Args:
        named_so: the file is called .st or .state.
    """
    if all(name.endswith(".time_state") for name in tensors):
        return named_so
    if any(name.endswith((".time_first", ".time_mix_w1", ".lora.0")) for name in tensors):
        return True
    low_rank = tensors.get("blocks.0.att.w1")
    if low_rank is None or "emb.weight" not in tensors:
        return False
    return low_rank.shape[0] != tensors["emb.weight"].shape[1]


def to_rwkv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under RWKV-LM's names and axes, as views."""
    # x052 has time_mix of its own; x060 has none, and its time_maa are called so here.
    mixes = "time_maa" if any(name.endswith(".time_mix_w1") for name in tensors) else "time_mix"

    def original(name: str) -> str:
        name = name.replace("time_first", "time_faaaa").replace("time_mix", mixes)
        return name.replace(".lora.0", ".lora_A").replace(".lora.1", ".lora_B")

    def turned(name: str, tensor: Tensor) -> Tensor:
        return tensor.mT if tensor.dim() >= 2 and _TRANSPOSED.search(name) else tensor

    return {original(name): turned(name, tensor) for name, tensor in tensors.items()}
