"""The compiled CPU loops never read or write outside their arrays."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import torch
from rookery.ops import mix7, relu_square, token_shift, wkv5, wkv6, wkv7

for B, T, H, N in ((1, 1, 1, 4), (2, 17, 3, 8), (1, 33, 2, 32)):
    def x(*size):
        return torch.randn(*size, requires_grad=True)
    heads, flat, C = (B, T, H, N), (B, T, H * N), H * N
    state = x(B, H, N, N)
    outputs = [
        *wkv7(x(*heads), x(*heads), x(*heads), x(*heads), x(*heads), x(*heads), state, backend="native"),
        *wkv6(x(*heads), x(*heads), x(*heads), x(*heads), x(H, N), state, backend="native"),
        *wkv5(x(*heads), x(H, N), x(*heads), x(*heads), x(H, N), state, backend="native"),
        *mix7(x(*flat), x(*flat), x(*flat), x(*flat), x(*flat), x(*flat), x(C), x(C), x(H, N), x(C), x(C), state),
        *token_shift(x(*flat), x(B, C), x(C), x(C)),
        relu_square(x(*flat)),
    ]
    sum(output.sum() for output in outputs).backward()
print("inside")
"""


def test_every_access_is_inside_its_array(tmp_path) -> None:
    # Numba compiles anew with checks, so into another cache.
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=500)
    assert done.stdout == "inside\n", done.stderr
