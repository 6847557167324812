"""How the tests start the real command."""

from __future__ import annotations

import os
import sys
from pathlib import Path

COMMAND = [sys.executable, "-c", "from rookery.cli import main; main()"]


def environment() -> dict[str, str]:
    """This process's, with this source tree, UTF-8 pipes, English messages and one thread."""
    tree = {"PYTHONPATH": str(Path(__file__).parents[2])}
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    return os.environ | tree | threads | {"PYTHONUTF8": "1", "LC_ALL": "C.UTF-8"}
