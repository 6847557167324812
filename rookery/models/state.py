"""The recurrent state of a model: all it remembers of the tokens read so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rookery.models.shape import ModelShape
from rookery.ops.backend import exact_dtype


@dataclass
class State:
    """State of a batch of B sequences after some token.

    `att_shift`, `ffn_shift`: (L, B, C), the last LayerNorm outputs that entered time and channel mixing, in the model's
    activation dtype. `wkv`: (L, B, H, N, N), [value, key] for every version, fp32 (fp64 in an fp64 model).
    """

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor

    @classmethod
    def zeros(cls, shape: ModelShape, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """The state before the first token, for a model whose activations are `dtype`."""
        shift = (shape.n_layer, batch, shape.n_embd)
        wkv = (shape.n_layer, batch, shape.n_head, shape.head_size, shape.head_size)
        exact = exact_dtype(dtype)
        return cls(
            torch.zeros(shift, device=device, dtype=dtype),
            torch.zeros(wkv, device=device, dtype=exact),
            torch.zeros(shift, device=device, dtype=dtype),
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.att_shift, self.wkv, self.ffn_shift

    def detach(self) -> State:
        return State(*(x.detach() for x in self.tensors))

    def clone(self) -> State:
        return State(*(x.clone() for x in self.tensors))

    def to(self, device: torch.device | str) -> State:
        return State(*(x.to(device) for x in self.tensors))

    def select(self, rows: Tensor | slice) -> State:
        """The sequences `rows` of the batch."""
        return State(*(x[:, rows] for x in self.tensors))
