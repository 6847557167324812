"""Full checkpoints: folders `step-00001234` that appear complete or not at all, with a checksum of every file.

A checkpoint holds what the engine saves (weights, optimiser), `state.json` (step, random number generators and whatever
else continues) and `sha256sums` in the format of the program of that name. Nothing in it is executed on reading.

With several ranks, all write their files at once, each computes the checksums of its own, and rank 0 does the rest.
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
from safetensors import SafetensorError

from rookery.errors import UserError
from rookery.train.ranks import ALONE, Ranks

KEEP = 2
STATE_FILE = "state.json"
SUMS_FILE = "sha256sums"
_PREFIX = "step-"
_UNFINISHED = ".unfinished"


class CorruptCheckpoint(Exception):
    """A file of a checkpoint is missing or not what was written."""


def write(root: Path, step: int, state: dict[str, Any], save: Callable[[Path], None], ranks: Ranks = ALONE) -> Path:
    """Writes the checkpoint of `step` under `root` and removes all but the newest two.

    Args:
        root: the folder of checkpoints, made if missing.
        step: optimiser steps done.
        state: JSON values that continue the run; the random number generators are added.
        save: writes the tensors of this rank into the folder it is given.
        ranks: call this together.

    Returns:
        The checkpoint. One that exists already and is sound is left as it is.
    """
    target = root / f"{_PREFIX}{step:08d}"
    if ranks.first(target.exists()):
        try:
            verify(target, ranks)
            return target
        except CorruptCheckpoint:
            ranks.barrier()
            if ranks.main:
                shutil.rmtree(target)
    folder = root / (target.name + _UNFINISHED)
    if ranks.main:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f"*{_UNFINISHED}"):
            shutil.rmtree(left, ignore_errors=True)
        folder.mkdir()
    ranks.barrier()
    try:
        by_rank = ranks.gather((_save(folder, save, ranks), _random_state()))
        if ranks.main:
            sums = {name: digest for files, _random in by_rank for name, digest in files.items()}
            random_states = [random for _files, random in by_rank]
            _finish(folder, {"step": step, "random": random_states, **state}, sums)
            folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if ranks.main:
        _flush_to_disk(root)
        for old in newest_first(root)[KEEP:]:
            shutil.rmtree(old)
    ranks.barrier()
    return target


def _save(folder: Path, save: Callable[[Path], None], ranks: Ranks) -> dict[str, str]:
    """Writes this rank's files, down to the disk, and gives their names and checksums.

    Raises:
        OSError: this rank or another one could not.
    """
    error, sums = "", {}
    try:
        with ranks.patience():
            save(folder)
            # A single rank's files have no rank in their names.
            mark = "" if ranks.world_size == 1 else f"-{ranks.rank:05d}-of-"
            for file in sorted(file for file in folder.iterdir() if mark in file.name):
                sums[file.name] = _sha256(file)
                _flush_to_disk(file)
    except (OSError, SafetensorError, UserError) as found:
        error = str(found)
    for reason in ranks.gather(error):
        if reason:
            raise OSError(reason)
    return sums


def _finish(folder: Path, state: dict[str, Any], sums: dict[str, str]) -> None:
    """Writes what holds the files of all ranks together."""
    state_file, sums_file = folder / STATE_FILE, folder / SUMS_FILE
    state_file.write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
    sums = {**sums, STATE_FILE: _sha256(state_file)}
    sums_file.write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)), encoding="utf-8")
    for file in (state_file, sums_file):
        _flush_to_disk(file)


def newest_first(root: Path) -> list[Path]:
    """The checkpoints under `root`, complete ones only, corrupt ones included."""
    names = [f.name for f in root.iterdir()] if root.is_dir() else []
    steps = [name for name in names if name.startswith(_PREFIX) and name.removeprefix(_PREFIX).isdigit()]
    return [root / name for name in sorted(steps, reverse=True)]


def verify(checkpoint: Path, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Reads every byte of a checkpoint once; ranks share the files.

    Returns:
        The content of its `state.json`.

    Raises:
        CorruptCheckpoint: with the file and the reason.
    """
    error, state = None, {}
    try:
        state = _verify_share(checkpoint, ranks)
    except (CorruptCheckpoint, OSError, ValueError) as found:
        error = str(found)
    for reason in ranks.gather(error):
        if reason is not None:
            raise CorruptCheckpoint(reason)
    return state


def _verify_share(checkpoint: Path, ranks: Ranks) -> dict[str, Any]:
    """Checks this rank's part of the files."""
    lines = (checkpoint / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    present = {file.name for file in checkpoint.iterdir()} - {SUMS_FILE}
    if sums.keys() != present:
        raise CorruptCheckpoint(f"{SUMS_FILE} lists {sorted(sums)}, the folder holds {sorted(present)}")
    for name in sorted(sums)[ranks.rank :: ranks.world_size]:
        if _sha256(checkpoint / name) != sums[name]:
            raise CorruptCheckpoint(f"{name}: checksum differs")
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


def restore_random_state(state: dict[str, Any], ranks: Ranks = ALONE) -> None:
    """Puts the generators of Python, NumPy and PyTorch back; `state` is what `verify` returned.

    Saved by another number of ranks, they stay as they are: only dropout draws from them.
    """
    if len(state["random"]) != ranks.world_size:
        return
    saved = state["random"][ranks.rank]
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
