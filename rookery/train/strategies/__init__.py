"""How devices share a training. One engine a strategy; the loop sees only the `Engine` interface."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rookery.config.tree import DeviceSection
from rookery.errors import UserError
from rookery.i18n import _
from rookery.train.ranks import ALONE, Ranks
from rookery.train.strategies.engine import Engine
from rookery.train.strategies.single import SingleDevice, own, owned

__all__ = ["Engine", "SingleDevice", "create_engine"]


def create_engine(
    model: nn.Module,
    build_optimizer: Callable[[dict[str, Tensor]], torch.optim.Optimizer],
    *,
    dtype: torch.dtype,
    grad_clip: float,
    masters: bool = True,
    device: torch.device | None = None,
    settings: DeviceSection | None = None,
    ranks: Ranks = ALONE,
) -> Engine:
    """The engine of the run's strategy.

    Args:
        model: with weights in any dtype, perhaps of a mapped file; they come to `device` one by one.
        dtype: of its arithmetic.
        masters: whether a bf16 model has fp32 master weights. DeepSpeed always makes them.
        device: where it trains; None: where it is.
    """
    device = device or next(model.parameters()).device
    whole = all(p.requires_grad for p in model.parameters())
    kept = dtype if dtype == torch.float64 or (dtype == torch.bfloat16 and not masters) else torch.float32
    if settings is None or settings.strategy != "fsdp":
        own(model, device, kept)
        model = model.to(device)
    if ranks.world_size == 1:
        return SingleDevice(model, build_optimizer, dtype=dtype, grad_clip=grad_clip, masters=masters)
    from rookery.train.strategies.replicated import Replicated
    from rookery.train.strategies.sharded import Sharded, shard

    settings = settings or DeviceSection(strategy="ddp")
    strategy = settings.strategy
    if strategy.startswith("deepspeed"):
        from rookery.train.strategies.zero import Zero

        bucket_mb = settings.ds_bucket_mb
        return Zero(
            model,
            build_optimizer,
            dtype=dtype,
            grad_clip=grad_clip,
            strategy=strategy,
            bucket_mb=bucket_mb,
            ranks=ranks,
        )
    if strategy == "fsdp":
        if whole:
            if any(name.endswith(".att.time_state") for name, _p in model.named_parameters()):
                raise UserError(
                    _("strategy fsdp cannot train tuned initial states together with the whole model: take ddp")
                )
            return Sharded(
                model, build_optimizer, dtype=dtype, grad_clip=grad_clip, masters=masters, device=device, ranks=ranks
            )
        # In fine-tuning little trains: that is copied to every rank, and only the frozen model is cut up.
        trained = {p for p in model.parameters() if p.requires_grad}
        for p in trained:
            p.data = owned(p.data, device, kept)
        shard(model, dtype, device, dtype, replicated=trained)
    return Replicated(model, build_optimizer, dtype=dtype, grad_clip=grad_clip, masters=masters, ranks=ranks)
