"""Full checkpoints: folders `step-00001234` that appear complete or not at all, with a checksum of every file.

A checkpoint holds what the engine saves (weights, optimiser), `state.json` (step, random number generators and whatever
else continues) and `sha256sums` in the format of the program of that name. Nothing in it is executed on reading.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

KEEP = 2
STATE_FILE = "state.json"
SUMS_FILE = "sha256sums"
_PREFIX = "step-"
_UNFINISHED = ".unfinished"


class CorruptCheckpoint(Exception):
    """A file of a checkpoint is missing or not what was written."""


def write(root: Path, step: int, state: dict[str, Any], save: Callable[[Path], None]) -> Path:
    """Writes the checkpoint of `step` under `root` and removes all but the newest two.

    Args:
        root: the folder of checkpoints, made if missing.
        step: optimiser steps done.
        state: JSON values that continue the run; the random number generators are added.
        save: writes the tensors into the folder it is given.

    Returns:
        The checkpoint. One that exists already and is sound is left as it is.
    """
    target = root / f"{_PREFIX}{step:08d}"
    if target.exists():
        try:
            verify(target)
            return target
        except CorruptCheckpoint:
            shutil.rmtree(target)
    root.mkdir(parents=True, exist_ok=True)
    folder = root / (target.name + _UNFINISHED)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        save(folder)
        text = json.dumps({"step": step, "random": _random_state(), **state}, allow_nan=False)
        (folder / STATE_FILE).write_text(text, encoding="utf-8")
        sums = "".join(f"{_sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir()))
        (folder / SUMS_FILE).write_text(sums, encoding="utf-8")
        for file in folder.iterdir():
            _flush_to_disk(file)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _flush_to_disk(root)
    for old in newest_first(root)[KEEP:]:
        shutil.rmtree(old)
    return target


def newest_first(root: Path) -> list[Path]:
    """The checkpoints under `root`, complete ones only, corrupt ones included."""
    names = [f.name for f in root.iterdir()] if root.is_dir() else []
    steps = [name for name in names if name.startswith(_PREFIX) and name.removeprefix(_PREFIX).isdigit()]
    return [root / name for name in sorted(steps, reverse=True)]


def verify(checkpoint: Path) -> dict[str, Any]:
    """Reads every byte of a checkpoint once.

    Returns:
        The content of its `state.json`.

    Raises:
        CorruptCheckpoint: with the file and the reason.
    """
    try:
        lines = (checkpoint / SUMS_FILE).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        present = {file.name for file in checkpoint.iterdir()} - {SUMS_FILE}
        if sums.keys() != present:
            raise CorruptCheckpoint(f"{SUMS_FILE} lists {sorted(sums)}, the folder holds {sorted(present)}")
        for name, expected in sums.items():
            if _sha256(checkpoint / name) != expected:
                raise CorruptCheckpoint(f"{name}: checksum differs")
        return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(str(error)) from error


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts the generators of Python, NumPy and PyTorch back; `state` is what `verify` returned."""
    saved = state["random"]
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes_tensor(saved["torch"]))
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(saved["cuda"]))


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "cuda": base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
        if torch.cuda.is_initialized()
        else "",
    }


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    """fsync of a file, or of a folder so that a rename in it lasts. Windows cannot open folders and needs no such."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
