"""The engine for one device: no communication; a bf16 or fp16 model with or without fp32 master weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rookery.formats import Pending, write_weights
from rookery.formats.pieces import OPTIMIZER, WEIGHTS, Pieces
from rookery.train.lean_adamw import Moment8, dense, restored
from rookery.train.optim import Optimizer, apply_rates
from rookery.train.precision import LossScale
from rookery.train.schedule import Rates


class SingleDevice:
    """Trains a model where it is. Implements `Engine`.

    The optimiser owns fp32 master weights, as DeepSpeed's does for the reference: a bf16 or fp16 model is a rounded
    copy of them and its gradients are summed in fp32. The masters of an fp32 or fp64 model are its own parameters; so
    are those of a bf16 model without masters, whose gradients are summed in bf16.
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[dict[str, Tensor]], Optimizer],
        *,
        dtype: torch.dtype,
        grad_clip: float = 0.0,
        masters: bool = True,
    ) -> None:
        """
        Args:
            model: on its device, with weights of its own in fp32 or fp64, or, if it has no masters, in bf16; converted
                to `dtype` here.
            build_optimizer: makes the optimiser over the master weights, given by name. It must honour the attributes
                `grad_scale` and `found_inf`, as PyTorch's fused optimisers do, and keep `names` in its groups.
            dtype: of the model's parameters and activations.
            grad_clip: largest global norm of the gradients; 0 = no clipping.
            masters: whether a bf16 model has fp32 master weights; an fp16 one always has.
        """
        self._rounded = masters and dtype in (torch.bfloat16, torch.float16)
        self._masters, self.model = self._prepare(model, dtype)
        self.device = next(iter(self._masters.values())).device
        self.grad_clip = grad_clip
        self.optimizer = build_optimizer(self._masters)
        self._loss_scale = LossScale(self.device) if dtype == torch.float16 else None
        self._one = torch.ones((), device=self.device)
        self._diverged = torch.zeros((), dtype=torch.bool, device=self.device)
        self._loss: Tensor | None = None

    def _prepare(self, model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], nn.Module]:
        """The master weights by name, and the model that computes."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters: list[Tensor] = list(trained.values())
        if self._rounded:
            masters = {name: p.detach().to(torch.float32) for name, p in trained.items()}
            return masters, model.to(dtype)  # which gives the parameters memory of their own
        return dict(trained), model.to(dtype)

    def backward(self, loss: Tensor, *, weight: float, last: bool) -> None:
        loss = loss * weight
        scaled = loss if self._loss_scale is None else loss * self._loss_scale.scale
        if scaled.requires_grad:  # after the first chunk of a sample nothing depends on a tuned initial state
            scaled.backward()
        first = self._loss is None
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        if self._rounded:
            self._gather_gradients(first)

    def _gather_gradients(self, first: bool) -> None:
        """Moves the rounded model's gradients into those of the fp32 masters: copied first, then added."""
        for master, p in zip(self._masters.values(), self._parameters, strict=True):
            if p.grad is not None:
                if first or master.grad is None:
                    master.grad = p.grad.to(master.dtype)
                else:
                    master.grad.add_(p.grad)
                p.grad = None

    @torch.no_grad()
    def step(self, rates: Rates) -> tuple[Tensor, Tensor]:
        loss, norm = self._finish_gradients()
        if self._loss_scale is None:
            scale = self._one
            overflow = beyond_scaling = ~norm.isfinite()
        else:
            scale = self._loss_scale.scale
            norm = norm / scale
            overflow = ~norm.isfinite()
            beyond_scaling = overflow & (scale <= LossScale.SMALLEST)
        self._diverged = self._diverged | ~loss.isfinite() | beyond_scaling

        # Unscaling, clipping and leaving out a bad update all happen inside the fused kernel: no pass over the
        # gradients of their own, and no wait for the device.
        excess = torch.clamp((norm + 1e-6) / self.grad_clip, min=1.0) if self.grad_clip else self._one
        self.optimizer.grad_scale = (scale * excess).float()
        self.optimizer.found_inf = (self._diverged | overflow).float()
        apply_rates(self.optimizer, rates)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._loss_scale is not None:
            self._loss_scale.update(overflow)
        self._publish()
        return loss, norm

    def _finish_gradients(self) -> tuple[Tensor, Tensor]:
        """Loss of the step and norm of its gradients, still scaled, which the masters have from now on."""
        assert self._loss is not None, "step without backward"
        loss, self._loss = self._loss, None
        gradients = [p.grad for p in self._masters.values() if p.grad is not None]
        if gradients and gradients[0].dtype == torch.bfloat16:  # whose norms would be rounded to bf16
            norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
            return loss, torch.linalg.vector_norm(torch.stack(norms))
        if not gradients:
            return loss, torch.zeros((), device=self.device)
        return loss, torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    def _publish(self) -> None:
        """Rounds the masters into the model."""
        if self._rounded:
            torch._foreach_copy_(self._parameters, list(self._masters.values()))

    def total(self, count: int) -> int:
        return count

    def diverged(self) -> bool:
        return bool(self._diverged)

    def weights(self, *, master: bool = False) -> dict[str, Tensor]:
        weights = self.model.state_dict()
        if master:
            weights |= self._masters
        return {name: tensor.detach().cpu() for name, tensor in weights.items()}

    def trained_weights(self) -> list[Pending]:
        return [
            Pending(name, tuple(p.shape), p.dtype, lambda p=p: p.detach())  # type: ignore[misc]
            for name, p in self.model.named_parameters()
            if p.requires_grad
        ]

    def save(self, folder: Path) -> None:
        masters = [(name, p.detach()) for name, p in self._masters.items()]
        write_weights(folder / f"{WEIGHTS}.safetensors", [_pending(name, p) for name, p in masters])
        state = [_pending(key, tensor) for key, _name, tensor in self._optimizer_tensors()]
        write_weights(folder / f"{OPTIMIZER}.safetensors", state)

    def _optimizer_tensors(self) -> Iterator[tuple[str, str, Tensor | Moment8]]:
        """(name in the file, parameter, tensor) of the whole optimiser state."""
        for group in self.optimizer.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                for key, tensor in self.optimizer.state[p].items():
                    yield f"{key}/{name}", name, tensor

    def _first_element(self, name: str) -> int:
        """Where, in the flattened parameter, the part begins of which this rank has the master."""
        return 0

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        def own_part(pieces: Pieces, key: str, name: str) -> Tensor:
            master = self._masters[name]
            first = self._first_element(name)
            return pieces.read(key, first, first + master.numel()).view_as(master)

        with Pieces(folder, WEIGHTS) as pieces:
            for name, p in self._masters.items():
                p.copy_(own_part(pieces, name, name))
        self.optimizer.state.clear()
        with Pieces(folder, OPTIMIZER) as pieces:
            for full_name in pieces:
                key, name = full_name.split("/", 1)
                master = self._masters[name]
                if not master.numel():
                    continue
                if pieces.shapes[full_name]:
                    part = own_part(pieces, full_name, name).to(self.device)
                    self.optimizer.state[master][key] = restored(self.optimizer, master, key, part)
                else:  # steps of the parameter, the same for all parts
                    self.optimizer.state[master][key] = pieces.whole(full_name).to(self.device)
        self._publish()

    def state_dict(self) -> dict[str, Any]:
        return {} if self._loss_scale is None else {"loss_scale": self._loss_scale.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._loss_scale is not None:
            self._loss_scale.load_state_dict(state["loss_scale"])


def own(module: nn.Module, device: torch.device, kept: torch.dtype) -> None:
    """Give what trains memory of its own on `device`, in the dtype `kept`, one parameter after another; what does not
    train is moved there as it is."""
    for p in module.parameters():
        p.data = owned(p.data, device, kept) if p.requires_grad else p.data.to(device)


def owned(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A contiguous copy: what trains must not write into a mapped file."""
    return tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)


def _pending(name: str, tensor: Tensor | Moment8) -> Pending:
    return Pending(name, tuple(tensor.shape), tensor.dtype, lambda: dense(tensor))
