"""Where the tests of Triton kernels run: on a GPU, or, in a process of their own, under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

kernels = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU")
"""Marks a test that runs kernels."""


def run_interpreted(tests: str) -> None:
    """Run the tests of a file in a process with the interpreter; they must pass."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", str(Path(tests))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of `want`."""
    return float(((got - want).norm() / want.norm()).detach())
