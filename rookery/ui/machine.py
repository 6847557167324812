"""Memory and GPUs of this machine, without torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from typing import Any

import psutil

from rookery.config.machine import free_host_memory

GPU_QUERY = "name,memory.total,memory.used,utilization.gpu,temperature.gpu"

EVERY = 2.0
"""Seconds for which an answer of nvidia-smi is good."""

_gpus: tuple[float, list[dict[str, Any]]] = (-EVERY, [])


def machine() -> dict[str, Any]:
    """Memory in bytes, load of the processor in percent, and the GPUs."""
    return {
        "memory": psutil.virtual_memory().total,
        "free": free_host_memory(),
        "cores": psutil.cpu_count() or 1,
        "load": psutil.cpu_percent(),
        "gpus": gpus(),
        "windows": sys.platform == "win32",
    }


def gpu_free() -> int | None:
    """Bytes that are free on the first GPU; None without one."""
    found = gpus()
    return found[0]["memory"] - found[0]["used"] if found else None


def gpus() -> list[dict[str, Any]]:
    """Name, memory in bytes, load and temperature of each NVIDIA GPU, as nvidia-smi tells."""
    global _gpus
    now = time.monotonic()
    if now - _gpus[0] >= EVERY:
        _gpus = (now, _ask())
    return _gpus[1]


def _ask() -> list[dict[str, Any]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.CREATE_NO_WINDOW
    try:
        done = subprocess.run(
            [program, f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=5,
            creationflags=flags,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [
        {
            "name": name,
            "memory": _number(total) * 1024 * 1024,
            "used": _number(used) * 1024 * 1024,
            "load": _number(load),
            "temperature": _number(temperature),
        }
        for name, total, used, load, temperature in (row for row in rows if len(row) == 5)
    ]


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
