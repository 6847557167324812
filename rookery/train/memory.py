"""Whether a training fits into the memory that is free; the arithmetic is `rookery.config.memory`'s."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from rookery.config import TrainConfig
from rookery.config.memory import Plan, estimate, fits, summary
from rookery.config.remedies import advice
from rookery.errors import UserError
from rookery.i18n import _

CERTAIN = 1.25
"""An estimate this many times the free memory is too much whatever its error."""

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells a container its share of the memory."""


def free_memory(accelerator: str) -> int:
    """Bytes that a training could have: of the GPU in use ("cuda"), or of this machine ("cpu")."""
    if accelerator == "cuda":
        free, _total = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min(psutil.virtual_memory().available, _left_to_container())


def _left_to_container() -> float:
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="utf-8").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="utf-8"))
        # Files in the cache count as used and are dropped when memory is needed.
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines())
        return float("inf") if limit == "max" else int(limit) - used + int(cached["inactive_file"])
    except (OSError, ValueError, KeyError):
        return float("inf")


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
