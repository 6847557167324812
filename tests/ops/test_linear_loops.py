"""The loops of fp32 products, for the registers of this processor and for shorter ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rookery.ops import linear_numba

AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+f16c"}

SIZES = [(1, 1, 1), (3, 37, 5), (8, 32, 256), (19, 33, 257), (64, 500, 40), (40, 70, 600)]


def address(x: np.ndarray) -> int:
    return x.ctypes.data


def aligned(numbers: int) -> np.ndarray:
    room = np.zeros(numbers + 16, np.float32)
    return room[-address(room) % 64 // 4 :][:numbers]


def check(M: int, N: int, K: int) -> None:
    generator = np.random.default_rng(0)
    a, b, begin = (generator.standard_normal(size).astype(np.float32) for size in ((M, K), (K, N), (M, N)))
    want = a.astype(np.float64) @ b
    tolerance = {"rtol": 0, "atol": 2e-6 * K**0.5}

    for matrix, row, step in ((b, 4 * N, 4), (np.ascontiguousarray(b.T), 4, 4 * K)):
        panels = aligned(linear_numba.packed_size(K, N))
        linear_numba.pack(K, N, address(matrix), row, step, address(panels))
        for first in (None, begin):
            out = np.full((M, N), np.nan, np.float32)
            linear_numba.packed_product(
                M, N, K, address(a), address(panels), 0 if first is None else address(first), address(out)
            )
            np.testing.assert_allclose(out, want if first is None else want + first, **tolerance)
        own = begin.copy()
        linear_numba.packed_product(M, N, K, address(a), address(panels), address(own), address(own))
        np.testing.assert_allclose(own, want + begin, **tolerance)

    turned, out = np.ascontiguousarray(a.T), begin.copy()
    linear_numba.gradient(M, N, K, address(turned), address(b), address(out))
    np.testing.assert_allclose(out, want + begin, **tolerance)

    for adds in (False, True):
        out, pieces = begin.copy(), linear_numba.pieces(M, N)
        for first in range(pieces):  # one after another, as threads would
            linear_numba.product(
                first, first + 1, M, N, K, address(a), 4 * K, 4, address(b), 4 * N, 4, address(out), adds
            )
        np.testing.assert_allclose(out, want + begin if adds else want, **tolerance)


@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_products(M: int, N: int, K: int) -> None:
    check(M, N, K)


def test_products_with_shorter_registers(tmp_path: Path) -> None:
    """In a process that compiles for a processor without AVX-512."""
    environment = os.environ | AVX2 | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(6, 1)\n"


if __name__ == "__main__":
    for size in SIZES:
        check(*size)
    print((linear_numba.ROWS, linear_numba.VECTORS))
