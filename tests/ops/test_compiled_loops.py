"""The compiled CPU loops stay inside their arrays, and are the same when they come from the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = """
import hashlib

import torch
from rookery.ops import gates7, mix7, relu_square, token_shift, wkv5, wkv6, wkv7

digest = hashlib.sha256()
leaves = []

def x(*size):
    leaves.append(torch.randn(*size, requires_grad=True))
    return leaves[-1]

torch.manual_seed(0)
for B, T, H, N in ((1, 1, 1, 4), (2, 17, 3, 8), (1, 33, 2, 32)):
    heads, flat, C = (B, T, H, N), (B, T, H * N), H * N
    state = x(B, H, N, N)
    outputs = [
        *wkv7(x(*heads), x(*heads), x(*heads), x(*heads), x(*heads), x(*heads), state, backend="native"),
        *wkv6(x(*heads), x(*heads), x(*heads), x(*heads), x(H, N), state, backend="native"),
        *wkv5(x(*heads), x(H, N), x(*heads), x(*heads), x(H, N), state, backend="native"),
        *mix7(x(*flat), x(*flat), x(*flat), x(*flat), x(*flat), x(*flat), x(C), x(C), x(H, N), x(C), x(C), state),
        *token_shift(x(*flat), x(B, C), x(C), x(C)),
        relu_square(x(*flat)),
        *gates7(x(*flat), x(*flat), x(*flat), x(*flat), x(*flat), x(C), x(C), x(C)),
    ]
    sum((output * output.detach()).sum() for output in outputs).backward()
    for tensor in [*outputs, *(leaf.grad for leaf in leaves)]:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


SMALL_MODEL = """
import hashlib

import torch
from rookery.models import ModelShape, create, initialise

torch.manual_seed(0)
model = create(ModelShape("x070", 2, 24, 37, 8, 24, 50, {"w": 4, "a": 12, "v": 5, "g": 20}))
initialise(model, 0)
with torch.no_grad():
    for p in model.parameters():
        p.add_(0.2 * torch.randn(p.shape))
lengths = torch.tensor([5, 1, 40, 133, 3])
tokens = torch.randint(37, (2, 1, 182))
loss = model.quick_loss(*tokens, lengths=lengths, trained=182)
loss.backward()
digest = hashlib.sha256(loss.detach().numpy().tobytes())
for p in model.parameters():
    if p.grad is not None:
        digest.update(p.grad.contiguous().numpy().tobytes())
print(digest.hexdigest())
"""

programs = pytest.mark.parametrize("program", [STEPS, SMALL_MODEL], ids=["steps", "small model"])


def digest_of_results(program: str, cache: Path, **variables: str) -> str:
    """Of all outputs and gradients, computed in a new process."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), **variables}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


@programs
def test_every_access_is_inside_its_array(program: str, tmp_path: Path) -> None:
    digest_of_results(program, tmp_path, NUMBA_BOUNDSCHECK="1")


@programs
def test_loops_from_the_cache_give_the_same_bits(program: str, tmp_path: Path) -> None:
    assert digest_of_results(program, tmp_path) == digest_of_results(program, tmp_path)


COUNT = """
import torch
from rookery.ops import relu_square
from rookery.ops.pointwise_numba import relu_square as loop

relu_square(torch.ones(3))
print(sum(loop.stats.cache_hits.values()), sum(loop.stats.cache_misses.values()))
"""


def test_a_change_of_any_source_makes_compiled_code_stale(tmp_path: Path) -> None:
    """Also of one that the function only calls into, which Numba itself does not look at."""
    package = Path(__file__).parents[2] / "rookery"
    shutil.copytree(package, tmp_path / "rookery", ignore=shutil.ignore_patterns("__pycache__"))

    def hits_and_misses() -> str:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", COUNT]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=True
        )
        return done.stdout.strip()

    assert hits_and_misses() == "0 1"
    assert hits_and_misses() == "1 0"
    with (tmp_path / "rookery" / "ops" / "simd.py").open("a", encoding="utf-8") as source:
        source.write("# changed\n")
    assert hits_and_misses() == "0 1"
