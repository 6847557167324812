"""Fully sharded data parallelism (`fsdp`): every rank keeps a part of the weights and of the optimiser, and gets the
rest of a block from the others when it is used. This is PyTorch's FSDP2."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rookery.formats import Pending
from rookery.formats.pieces import OPTIMIZER, WEIGHTS
from rookery.train.lean_adamw import Moment8
from rookery.train.optim import Optimizer
from rookery.train.ranks import Ranks
from rookery.train.strategies.pieces import Piece, write_pieces
from rookery.train.strategies.single import SingleDevice, owned


def shard(
    model: Any,
    dtype: torch.dtype,
    device: torch.device,
    kept: torch.dtype,
    replicated: set[nn.Parameter] | None = None,
) -> None:
    """Keep of each parameter only this rank's rows, on `device` and in the dtype `kept`; it is used in `dtype`, block
    by block. Whole, on the device and beside the file that it is read from, there is never more than one block, or the
    embedding with the head.

    Args:
        replicated: parameters that every rank keeps whole; FSDP2 leaves them alone.
    """
    replicated = replicated or set()
    done = set(replicated)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    # Inputs are not cast: the state of the recurrence stays in fp32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=exact, cast_forward_inputs=False)
    # ln0 is part of the first block, but works before it.
    for module in (model.blocks[0].ln0, *model.blocks, model):
        for p in set(module.parameters()) - done:
            p.data = owned(p.data, device, kept)
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=replicated)
        done |= set(module.parameters())
    register_fsdp_forward_method(model, "loss")
    # Nothing works in place on what a block returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)


class Sharded(SingleDevice):
    """Trains all weights of a model, each rank its rows of them. Implements `Engine`.

    The fp32 masters are FSDP2's own shards; a bf16 or fp16 copy exists only of what is in use. Gradients are summed in
    fp32.
    """

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[dict[str, Tensor]], Optimizer],
        *,
        dtype: torch.dtype,
        grad_clip: float = 0.0,
        masters: bool = True,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self.device = device
        super().__init__(model, build_optimizer, dtype=dtype, grad_clip=grad_clip, masters=masters)
        self.rank, self.world_size = ranks.rank, ranks.world_size

    def _prepare(self, model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], nn.Module]:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        kept = exact if self._rounded else dtype
        self._rounded = False  # FSDP2 rounds what it gathers
        self._dtype = dtype
        shard(model, dtype, self.device, kept)
        self._shards: dict[str, Any] = dict(model.named_parameters())  # DTensors
        # The optimiser sees plain tensors: it works on each element alone.
        return {name: p.detach().to_local() for name, p in self._shards.items()}, model

    def backward(self, loss: Tensor, *, weight: float, last: bool) -> None:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        super().backward(loss, weight=weight, last=last)

    def _finish_gradients(self) -> tuple[Tensor, Tensor]:
        for master, p in zip(self._masters.values(), self._shards.values(), strict=True):
            master.grad = None if p.grad is None else p.grad.to_local()
            p.grad = None
        assert self._loss is not None, "step without backward"
        dist.all_reduce(self._loss)
        self._loss /= self.world_size
        loss, norm = super()._finish_gradients()
        squared = norm.square()
        dist.all_reduce(squared)
        return loss, squared.sqrt()

    def total(self, count: int) -> int:
        return self._ranks.total(count)

    def trained_weights(self) -> list[Pending]:
        def whole(p: Any) -> Callable[[], Tensor]:
            return lambda: p.detach().to(self._dtype).full_tensor()

        return [Pending(name, tuple(p.shape), self._dtype, whole(p)) for name, p in self._shards.items()]

    def save(self, folder: Path) -> None:
        """Each rank writes its rows."""
        write_pieces(folder, WEIGHTS, self._pieces((name, name, p) for name, p in self._masters.items()), *self._place)
        write_pieces(folder, OPTIMIZER, self._pieces(self._optimizer_tensors()), *self._place)

    def _pieces(self, tensors: Iterable[tuple[str, str, Tensor | Moment8]]) -> Iterator[Piece]:
        """Of (name in the file, parameter, tensor): the parts of what is cut up as the parameter is."""
        for key, name, tensor in tensors:
            shape = tuple(self._shards[name].shape) if tensor.shape else ()
            if self._masters[name].numel():
                yield Piece(key, shape, self._first_element(name) if shape else 0, tensor)

    @property
    def _place(self) -> tuple[int, int]:
        return self.rank, self.world_size

    def _first_element(self, name: str) -> int:
        whole = self._shards[name]
        _size, first = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
        return first[0] * (whole.numel() // whole.shape[0])
