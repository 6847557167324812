"""DeepSpeed's ZeRO (`deepspeed_stage_1` to `_3`, with `_offload`), through `deepspeed.initialize`.

Stage 1 shares out the optimiser, stage 2 also the gradients, stage 3 also the weights. Checkpoints are not DeepSpeed's
own, which only the same number of ranks could read, but pieces like those of every other strategy.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rookery.errors import UserError
from rookery.formats import Pending
from rookery.formats.pieces import OPTIMIZER, WEIGHTS, Pieces
from rookery.i18n import _
from rookery.train.optim import AdamW, Optimizer, apply_rates
from rookery.train.ranks import Ranks
from rookery.train.schedule import Rates
from rookery.train.strategies.pieces import Piece, write_pieces

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's tensors of the size of a parameter."""


class _Part(NamedTuple):
    """What this rank owns of a parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    """First element, of the flattened parameter."""
    size: int
    state: Callable[[str | None], Tensor]
    """Gives those elements of the fp32 master, or of a moment of the optimiser by its name; 1-dim, to be written to."""
    group: Tensor
    """What the optimiser takes for a parameter."""


class Zero:
    """Trains with DeepSpeed. Implements `Engine`."""

    def __init__(
        self,
        model: Any,
        build_optimizer: Callable[[dict[str, Tensor]], Optimizer],
        *,
        dtype: torch.dtype,
        grad_clip: float,
        strategy: str,
        bucket_mb: int,
        ranks: Ranks,
    ) -> None:
        """
        Args:
            strategy: "deepspeed_stage_1" to "_3", or "deepspeed_stage_2_offload" or "_3_offload".
            bucket_mb: millions of elements that are exchanged at a time.
        """
        self.device = next(model.parameters()).device
        deepspeed = _import(self.device)
        if dtype == torch.float16 and self.device.type == "cpu":
            raise UserError(
                _("DeepSpeed has no fp16 on a CPU: take --precision bf16 or fp32, or --strategy ddp or fsdp")
            )
        if strategy.startswith("deepspeed_stage_3") and not all(p.requires_grad for p in model.parameters()):
            raise UserError(
                _(
                    "{strategy} trains whole models only: of a model that stays as it is and an adapter or states, "
                    "--strategy fsdp shares out the weights, deepspeed_stage_2 and ddp do not",
                    strategy=strategy,
                )
            )
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self._deepspeed = deepspeed
        self._ranks = ranks
        self._dtype = dtype
        self._stage = int(strategy.removeprefix("deepspeed_stage_")[0])
        self._offload = strategy.endswith("_offload")
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.to(dtype)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = build_optimizer(self._trained)
        if self._stage == 3:
            # Each is gathered as a whole: its parts use each other's weights without calling each other.
            for block in model.blocks:
                deepspeed.utils.set_z3_leaf_module(block.att, True)
                deepspeed.utils.set_z3_leaf_module(block.ffn, True)
        self._engine, *_rest = deepspeed.initialize(
            model=_Loss(model),
            optimizer=optimizer.as_torch() if isinstance(optimizer, AdamW) else optimizer,
            config=self._settings(grad_clip, bucket_mb * 1_000_000),
            dist_init_required=False,
        )
        self._optimizer: Any = self._engine.optimizer
        if self._stage == 3:
            # The loss takes it without calling the head.
            deepspeed.zero.register_external_parameter(self._engine.module, model.head.weight)
        self.model = model
        # What the loop calls has to go through DeepSpeed. (A module here would become part of the model.)
        model.loss = partial(type(self._engine).__call__, self._engine)
        self._loss: Tensor | None = None
        self._diverged = False

    def _settings(self, grad_clip: float, bucket: int) -> dict[str, Any]:
        zero: dict[str, Any] = {
            "stage": self._stage,
            "contiguous_gradients": True,
            "overlap_comm": self._stage > 1 and self.device.type == "cuda",
            "allgather_bucket_size": bucket,
            "reduce_bucket_size": bucket,
        }
        if self._offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if self._offload and self._stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": 1,  # it only counts with it
            "gradient_clipping": grad_clip,
            "zero_optimization": zero,
            "bf16": {"enabled": self._dtype == torch.bfloat16, "check_grad_overflow": True},
            "fp16": {"enabled": self._dtype == torch.float16, "initial_scale_power": 16, "loss_scale_window": 2000,
                     "hysteresis": 1, "min_loss_scale": 1},
            # PyTorch's fused AdamW is faster on a CPU than DeepSpeed's and needs no compiler.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
        }  # fmt: skip

    def backward(self, loss: Tensor, *, weight: float, last: bool) -> None:
        loss = loss * weight
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        if not last:
            self._engine.step()

    def step(self, rates: Rates) -> tuple[Tensor, Tensor]:
        assert self._loss is not None, "step without backward"
        loss, self._loss = self._loss.float(), None
        dist.all_reduce(loss)
        loss /= self.world_size
        apply_rates(self._optimizer, rates)
        if not self._diverged:
            self._engine.step()
        norm = self._engine.get_global_grad_norm()
        norm = torch.as_tensor(float("nan") if norm is None else norm, dtype=torch.float32, device=self.device)
        scaled_down = self._dtype == torch.float16 and self._optimizer.loss_scale > 1
        self._diverged |= not (loss.isfinite() and (norm.isfinite() or scaled_down))
        return loss, norm

    def total(self, count: int) -> int:
        return self._ranks.total(count)

    def diverged(self) -> bool:
        return self._diverged

    def trained_weights(self) -> list[Pending]:
        def whole(p: Any) -> Callable[[], Tensor]:
            def gather() -> Tensor:
                with self._gathered(p):
                    return p.detach().to(self._dtype, copy=True)

            return gather

        return [Pending(name, self._shape(p), self._dtype, whole(p)) for name, p in self._trained.items()]

    def _gathered(self, p: Tensor) -> Any:
        return self._deepspeed.zero.GatheredParameters([p], enabled=self._stage == 3)

    def _shape(self, p: Any) -> tuple[int, ...]:
        return tuple(p.ds_shape if self._stage == 3 else p.shape)

    def save(self, folder: Path) -> None:
        """Each rank writes what it owns."""
        parts = list(self._parts())
        weights = [Piece(part.name, part.shape, part.start, part.state(None)) for part in parts]
        write_pieces(folder, WEIGHTS, weights, self.rank, self.world_size)
        state = []
        for part in parts:
            steps = self._optimizer.optimizer.state[part.group].get("step")
            if steps is None:
                continue
            state += [Piece(f"{key}/{part.name}", part.shape, part.start, part.state(key)) for key in MOMENTS]
            state.append(Piece(f"step/{part.name}", (), 0, torch.as_tensor(steps, dtype=torch.float32).reshape(1)))
        write_pieces(folder, OPTIMIZER, state, self.rank, self.world_size)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        parts = list(self._parts(prepare=True))
        with Pieces(folder, OPTIMIZER) as pieces:
            for part in parts:
                for key in MOMENTS:
                    if f"{key}/{part.name}" in pieces.shapes:
                        saved = pieces.read(f"{key}/{part.name}", part.start, part.start + part.size)
                        part.state(key).copy_(saved)
                        steps = pieces.whole(f"step/{part.name}")
                        self._optimizer.optimizer.state[part.group]["step"].copy_(steps)
        with Pieces(folder, WEIGHTS) as pieces:
            for part in parts:
                part.state(None).copy_(pieces.read(part.name, part.start, part.start + part.size))
            for name, p in self._trained.items():
                if self._stage < 3:
                    p.copy_(pieces.whole(name))
                else:
                    start, size = self._own_range(p)
                    p.ds_tensor.view(-1)[:size].copy_(pieces.read(name, start, start + size))

    def _parts(self, prepare: bool = False) -> Iterator[_Part]:
        """What this rank owns.

        Args:
            prepare: make the optimiser's tensors, which it makes in its first step, where they are missing.
        """
        zero, inner = self._optimizer, self._optimizer.optimizer
        flat = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        if prepare:
            for group in flat:
                state = inner.state[group]
                state.setdefault("step", torch.zeros((), dtype=torch.float32, device=group.device))
                for key in MOMENTS:
                    state.setdefault(key, torch.zeros_like(group))
        for name, p in self._trained.items():
            if self._stage == 3:
                number, first, _elements = zero.grad_position[zero.get_param_id(p)]
                start, size = self._own_range(p)
            elif p._hp_mapping is None:
                continue
            else:
                mapping = p._hp_mapping
                number, first = mapping.param_group_index, mapping.hp_fragment_address.start
                start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            if size > 0:
                yield _Part(name, self._shape(p), start, size, _reader(inner, flat[number], first, size), flat[number])

    def _own_range(self, p: Any) -> tuple[int, int]:
        """First element and number of elements that this rank owns under stage 3: equal parts, the last one padded."""
        part = p.ds_tensor.ds_numel
        start = min(self.rank * part, p.ds_numel)
        return start, min(part, p.ds_numel - start)

    def state_dict(self) -> dict[str, Any]:
        if self._dtype != torch.float16:
            return {}
        scale = self._optimizer.loss_scaler
        return {"loss_scale": {"scale": scale.cur_scale, "good_steps": scale.cur_iter - scale.last_overflow_iter - 1}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._dtype == torch.float16:
            saved, scale = state["loss_scale"], self._optimizer.loss_scaler
            scale.cur_scale = saved["scale"]
            scale.last_overflow_iter = scale.cur_iter - int(saved["good_steps"]) - 1


def _reader(optimizer: Any, flat: Tensor, first: int, size: int) -> Callable[[str | None], Tensor]:
    def read(key: str | None) -> Tensor:
        whole = flat if key is None else optimizer.state[flat][key]
        return whole.detach().view(-1)[first : first + size]

    return read


class _Loss(nn.Module):
    """A module whose call is the model's loss: DeepSpeed gathers and watches around calls of modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._loss = model.loss

    def forward(self, *args: Any, **options: Any) -> Any:
        return self._loss(*args, **options)  # type: ignore[operator]


def _import(device: torch.device) -> Any:
    """The package, set up for `device`.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # What DeepSpeed calls in PyTorch is DeepSpeed's concern.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
        from deepspeed.ops import __compatible_ops__
    except ImportError as error:
        raise UserError(
            _(
                "the deepspeed strategies need DeepSpeed: python -m pip install 'rookery[deepspeed]'; "
                "--strategy fsdp (like stage 3) and ddp need nothing more"
            )
        ) from error
    # On a CPU it would compile a module for its collectives, and fail without a compiler.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logging.logger.setLevel(logging.WARNING)
    return deepspeed
