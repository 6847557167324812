"""How devices share a training. One engine a strategy; the loop sees only the `Engine` interface."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from rookery.config.tree import DeviceSection, TrainConfig
from rookery.errors import UserError
from rookery.i18n import _
from rookery.models import Model
from rookery.train.optim import Optimizer, build_optimizer, parameter_groups
from rookery.train.precision import DTYPES
from rookery.train.ranks import ALONE, Ranks
from rookery.train.strategies.engine import Engine
from rookery.train.strategies.single import SingleDevice, own, owned

__all__ = ["Engine", "SingleDevice", "build_engine", "create_engine"]


def build_engine(config: TrainConfig, model: Model, ranks: Ranks) -> Engine:
    """The engine of a resolved configuration."""
    device = torch.device("cpu" if config.device.accelerator == "cpu" else "cuda")
    optim = config.optim
    groups = parameter_groups(
        ((name, p) for name, p in model.named_parameters() if p.requires_grad),
        model.version,
        weight_decay=optim.weight_decay > 0,
        layerwise_lr=optim.layerwise_lr > 0,
        second_stage=config.run.train_stage == 2,
        lora_plus_ratio=config.adapter.lora_plus_ratio,
    )
    build = partial(
        build_optimizer,
        groups=groups,
        betas=(optim.beta1, optim.beta2),
        eps=float(optim.adam_eps or 0),
        eight_bit=optim.optimizer == "adamw8bit",
    )
    return create_engine(
        model,
        build,
        dtype=DTYPES[str(config.run.precision)],
        grad_clip=optim.grad_clip,
        masters=bool(optim.master_weights),
        device=device,
        settings=config.device,
        ranks=ranks,
    )


def create_engine(
    model: nn.Module,
    build: Callable[[dict[str, Tensor]], Optimizer],
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
        return SingleDevice(model, build, dtype=dtype, grad_clip=grad_clip, masters=masters)
    from rookery.train.strategies.replicated import Replicated
    from rookery.train.strategies.sharded import Sharded, shard

    settings = settings or DeviceSection(strategy="ddp")
    strategy = settings.strategy
    if strategy.startswith("deepspeed"):
        from rookery.train.strategies.zero import Zero

        bucket_mb = settings.ds_bucket_mb
        return Zero(
            model,
            build,
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
            return Sharded(model, build, dtype=dtype, grad_clip=grad_clip, masters=masters, device=device, ranks=ranks)
        # In fine-tuning little trains: that is copied to every rank, and only the frozen model is cut up.
        trained = {p for p in model.parameters() if p.requires_grad}
        for p in trained:
            p.data = owned(p.data, device, kept)
        shard(model, dtype, device, dtype, replicated=trained)
    return Replicated(model, build, dtype=dtype, grad_clip=grad_clip, masters=masters, ranks=ranks)
