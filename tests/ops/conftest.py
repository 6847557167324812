"""Gives Triton's interpreter the arithmetic of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from interpreted import INTERPRETED


def round_to(x: Any, bits: int) -> Any:
    """fp32 array rounded to nearest even, without its last `bits` bits."""
    import numpy as np

    raw = np.ascontiguousarray(x, np.float32).view(np.uint32)
    raw = raw + np.uint32((1 << bits - 1) - 1) + (raw >> np.uint32(bits) & np.uint32(1))
    return (raw & np.uint32(0xFFFFFFFF << bits & 0xFFFFFFFF)).view(np.float32)


@pytest.fixture(scope="session", autouse=True)
def faithful_interpreter() -> Iterator[None]:
    """Give Triton's interpreter the arithmetic of a GPU: as it stands it truncates to bf16 instead of rounding,
    multiplies the bit patterns of bf16 matrices, and does TF32 products in fp32."""
    if not INTERPRETED:
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return (
                (round_to(x.view(np.float32), 16).view(np.uint32) >> np.uint32(16)).astype(np.uint16).reshape(x.shape)
            )
        return convert(x, source, target, mode)

    def create_dot(self: Any, x: Any, y: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
        def factor(z: Any) -> Any:
            if z.dtype.scalar == tl.bfloat16:
                return (z.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
            return round_to(z.data, 13) if precision == interpreter._ir.INPUT_PRECISION.TF32 else z.data

        return interpreter.TensorHandle(np.matmul(factor(x), factor(y)) + acc.data, acc.dtype.scalar)

    patch = pytest.MonkeyPatch()
    patch.setattr(interpreter, "_convert_float", convert_float)
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    yield
    patch.undo()
