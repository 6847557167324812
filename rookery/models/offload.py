"""Activations that wait for the backward pass in the host's memory."""

from __future__ import annotations

import torch
from torch import Tensor


class InputOnHost(torch.autograd.graph.saved_tensors_hooks):
    """A block that is recomputed in the backward pass, called inside this, keeps its input in the host's memory.

    On a GPU both ways go through pinned memory and wait for nothing: the copy to the host runs in the order of the
    stream, before the memory of `x` is used again, and the copy back before the block is recomputed.
    """

    def __init__(self, x: Tensor) -> None:
        """`x`: the input. What else the block is given is small, or shared by all blocks, and stays."""
        place, shape = x.data_ptr(), x.shape

        def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            if tensor.data_ptr() != place or tensor.shape != shape:
                return tensor
            waiting = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            return tensor.device, waiting.copy_(tensor, non_blocking=True)

        def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            device, waiting = packed
            return waiting.to(device, non_blocking=True)

        super().__init__(pack, unpack)
