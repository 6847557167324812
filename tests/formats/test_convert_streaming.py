"""Converting holds about one tensor in memory: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rookery.formats import Pending, write_weights
from rookery.models import ModelShape, create

PROGRAM = """
import json, resource, sys
from pathlib import Path
from rookery.formats.convert import convert
small, large, folder = map(Path, sys.argv[1:4])
for target in sys.argv[4:]:  # so that everything that is imported on the way is there
    convert(small, folder / f"small{target}")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
grown = {}
for target in sys.argv[4:]:
    convert(large, folder / f"large{target}")
    grown[target] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps(grown))
"""
TARGETS = (".pth", ".safetensors", ".st", ".gguf", "-hf")
MAPPED = 1 << 24
"""What is mapped of a file before it is mapped anew, when no tensor is larger."""

LARGE = ModelShape("x070", 14, 512, 8192, 64, 512, 2048, {"w": 64, "a": 64, "v": 32, "g": 128})
SMALL = ModelShape("x070", 1, 64, 64, 64, 64, 64, dict.fromkeys("wavg", 32))


def write(path: Path, shape: ModelShape) -> Path:
    """A model of zeros in fp32, without ever holding it."""
    with torch.device("meta"):
        tensors = create(shape).state_dict()
    items = [
        Pending(name, tuple(t.shape), torch.float32, lambda t=t: torch.zeros(t.shape)) for name, t in tensors.items()
    ]
    write_weights(path, items)
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="the peak is measured with getrusage")
@pytest.mark.parametrize("source", [".pth", ".safetensors"])
def test_peak_memory_is_about_one_tensor(source: str, tmp_path: Path) -> None:
    small, large = write(tmp_path / f"s{source}", SMALL), write(tmp_path / f"l{source}", LARGE)
    assert large.stat().st_size > 13 * MAPPED
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, small, large, tmp_path, *TARGETS],
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=300,
    )
    unit = 1 if sys.platform == "darwin" else 1024
    grown = {target: size * unit for target, size in json.loads(result.stdout).items()}
    # What is mapped, the tensor in another precision or order, and what the allocator keeps.
    assert {target: size for target, size in grown.items() if size > 4 * MAPPED} == {}
