"""A run directory whose newest weights are in pieces says so, instead of giving older ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rookery.errors import UserError
from rookery.formats import read_weights, weight_file, write_pth


def test_pieces_of_several_devices_are_not_passed_over(tmp_path: Path) -> None:
    older = tmp_path / "rwkv-0.pth"
    write_pth(older, {"a": torch.ones(1)})
    assert weight_file(tmp_path) == older
    folder = tmp_path / "checkpoints" / "step-00000008"
    folder.mkdir(parents=True)
    for rank in range(2):
        (folder / f"weights-{rank:05d}-of-00002.safetensors").touch()
    os.utime(older, (1, 1))
    with pytest.raises(UserError, match="lie in pieces"):
        read_weights(tmp_path)
    write_pth(tmp_path / "rwkv-final.pth", {"a": torch.ones(1)})
    assert weight_file(tmp_path).name == "rwkv-final.pth"
