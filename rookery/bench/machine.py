"""What a measurement was made on, and the record that it is kept in."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from rookery import __version__

PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "triton",
    "flash-linear-attention",
    "rwkv",
    "llama-cpp-python",
    "pyrwkv-tokenizer",
)
"""Whose versions decide speed, or which Rookery is compared with."""


def machine() -> dict[str, Any]:
    """Operating system, Python, processor, cores this process may use, and memory in bytes."""
    return {
        "system": platform.platform(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "processor": processor(),
        "cores": cores(),
        "memory": memory(),
        "free_disk": shutil.disk_usage(Path.cwd()).free,
    }


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory() -> int | None:
    """Physical memory in bytes, or None where the system does not tell."""
    if sys.platform == "win32":
        return _windows_memory()
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _windows_memory() -> int:
    class Status(ctypes.Structure):
        """MEMORYSTATUSEX of the Windows API."""

        _fields_ = [
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *(
                (name, ctypes.c_ulonglong)
                for name in ("total", "free", "page", "free_page", "virtual", "free_virtual", "extended")
            ),
        ]

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.total)


def anonymous_memory(process: int | None = None) -> int:
    """Bytes of memory that are no mapped file, of a process, or of this one.

    Raises:
        RuntimeError: the system does not tell; Linux does.
        OSError: there is no such process.
    """
    file = Path("/proc") / str(process or "self") / "status"
    for line in file.read_text(encoding="utf-8").splitlines() if sys.platform == "linux" else ():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon: Linux only")


def version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that the source was at, with "+" if it was changed since; None when it is no checkout of git."""
    try:
        found = [
            subprocess.run(
                ["git", *words], cwd=Path(__file__).parent, capture_output=True, check=True, encoding="utf-8"
            ).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", ".."])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return found[0] + ("+" if found[1] else "")


def record(benchmark: str, content: dict[str, Any]) -> dict[str, Any]:
    """`content` with what it was measured on.

    Its load is the average of the last minute over the cores, where the system tells it. Above 1, wall times say more
    of other programs than of Rookery.
    """
    program = Path(sys.argv[0]).name
    program = f"python benchmarks/{program}" if program.endswith(".py") and program != "__main__.py" else "rookery"
    load = os.getloadavg()[0] / cores() if hasattr(os, "getloadavg") else None
    return {
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join([program, *sys.argv[1:]]),
        "rookery": {"version": __version__, "commit": commit()},
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": cores(),
            "memory": memory(),
            "load per core": None if load is None else round(load, 2),
            **_gpu(),
        },
        "versions": {"python": platform.python_version()}
        | {name: number for name in PACKAGES if (number := version(name))},
        **content,
    }


def _gpu() -> dict[str, Any]:
    """The GPU, if PyTorch is in use and has one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    facts = torch.cuda.get_device_properties(0)
    return {
        "gpu": facts.name,
        "gpu multiprocessors": facts.multi_processor_count,
        "gpu memory": facts.total_memory,
        "cuda": torch.version.cuda,
    }
