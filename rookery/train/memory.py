"""Whether a training fits into the memory that is free; the arithmetic is `rookery.config.memory`'s."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rookery.config import TrainConfig
from rookery.config.machine import free_host_memory
from rookery.config.memory import Plan, estimate, fits, summary
from rookery.config.remedies import advice
from rookery.errors import UserError
from rookery.i18n import _

CERTAIN = 1.25
"""An estimate this many times the free memory is too much whatever its error."""


def free_memory(accelerator: str) -> int:
    """Bytes that a training could have: of the GPU in use ("cuda"), or of this machine ("cpu")."""
    if accelerator == "cuda":
        free, _total = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return free_host_memory()


def check_memory(config: TrainConfig, report: Callable[[str], None]) -> None:
    """Say how much memory the training takes, and of what may not fit what would.

    Args:
        config: resolved.
        report: told in one line; when it will be tight, also what would help.

    Raises:
        UserError: it cannot fit.
    """
    plan = Plan.of(config)
    need, free = estimate(plan), free_memory(plan.accelerator)
    line = summary(need, free)
    if need.total > CERTAIN * free:
        raise UserError("\n".join([_("this training does not fit into memory."), line, advice(plan, free)]))
    report(line)
    if not fits(plan, free):
        report(_("It may run out of memory.") + " " + advice(plan, free))
