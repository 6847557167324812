"""Where the tests of Triton kernels run: on a GPU, or, in a process of their own, under Triton's interpreter."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


class Banded(TorchDispatchMode):
    """In this context, what is allocated starts as NaN, so that all of it must be written, and lies between bands of a
    mark, which must not be overwritten."""

    WIDTH, MARK = 256, 1234.0

    def __init__(self) -> None:
        super().__init__()
        self._bands: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format and kwargs["dtype"].is_floating_point:
            return self._allocate(args[0], kwargs["dtype"], self.MARK)
        if func is torch.ops.aten.empty_like.default:
            return self._allocate(args[0].shape, args[0].dtype, self.MARK)
        if func is torch.ops.aten.new_empty.default and args[0].dtype.is_floating_point:
            return self._allocate(args[1], kwargs.get("dtype", args[0].dtype), self.MARK)
        return func(*args, **kwargs)

    def _allocate(self, shape: Any, dtype: torch.dtype, around: float) -> Tensor:
        n = torch.Size(shape).numel()
        whole = torch.full((n + 2 * self.WIDTH,), around, dtype=dtype, device=DEVICE)
        whole[self.WIDTH : self.WIDTH + n] = torch.nan
        if around == self.MARK:
            self._bands.append((whole, n))
        return whole[self.WIDTH : self.WIDTH + n].view(shape)

    def leaf(self, x: Tensor) -> Tensor:
        """A copy of `x` to be differentiated, between bands of NaN: reading them shows in the results."""
        return self._allocate(x.shape, x.dtype, torch.nan).copy_(x).requires_grad_()

    def intact(self) -> int:
        """Checks that no mark was overwritten; the number of tensors allocated."""
        for whole, n in self._bands:
            assert (whole[: self.WIDTH] == self.MARK).all()
            assert (whole[self.WIDTH + n :] == self.MARK).all()
        return len(self._bands)


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of an H200, as NVIDIA's assembler counts it."""

    shared: int
    """Bytes of shared memory for each program."""
    registers: int
    """For each thread."""
    spilled: int
    """Bytes of registers written to memory by each thread."""


def compile_for_h200(
    kernel: Any,
    fixed: Mapping[str, Any],
    types: Mapping[str, str],
    *,
    otherwise: str = "*fp32",
    options: Mapping[str, int] | None = None,
) -> Compiled:
    """Take a kernel through Triton's compiler and NVIDIA's assembler.

    Args:
        fixed: values of compile-time constants, and of others that the kernel does not have.
        types: of its other arguments by name; `otherwise` is that of those not named. Numbers of channels and tokens
            are taken to be multiples of 16, as models' are.
        options: with which it is launched.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    names = list(inspect.signature(kernel.fn).parameters)
    values = {name: value for name, value in fixed.items() if name in names}
    signature = {name: "constexpr" if name in values else types.get(name, otherwise) for name in names}
    multiples = [name for name in names if signature[name].startswith("*")]
    multiples += [name for name in ("C", "T", "total") if signature.get(name) == "i32"]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in values.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(options or {}))
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", "-o", os.devnull, "-"]
    said = subprocess.run(command, input=compiled.asm["ptx"], capture_output=True, text=True, check=True).stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, said)
        assert found, said
        return int(found[1])

    return Compiled(compiled.metadata.shared, number(r"Used (\d+) registers"), number(r"(\d+) bytes spill stores"))
