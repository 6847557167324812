"""Memory of this machine, without torch."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells a container its share of the memory."""


def free_host_memory() -> int:
    """Bytes that this machine, or this container, still has for programs."""
    return int(min(psutil.virtual_memory().available, _left_to_container()))


def _left_to_container() -> float:
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="utf-8").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="utf-8"))
        # Files in the cache count as used and are dropped when memory is needed.
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines())
        return float("inf") if limit == "max" else int(limit) - used + int(cached["inactive_file"])
    except (OSError, ValueError, KeyError):
        return float("inf")
