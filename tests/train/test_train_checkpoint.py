"""Checkpoints: whole or absent, checked, two kept; and the files of a run directory."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rookery.errors import UserError
from rookery.train import checkpoint
from rookery.train.rundir import RunDir


def save_hello(folder: Path) -> None:
    (folder / "tensors.bin").write_bytes(b"hello" * 1000)


def test_the_newest_two_are_kept_and_read_back(tmp_path):
    for step in (5, 10, 15):
        checkpoint.write(tmp_path, step, {"note": step}, save_hello)
    folders = checkpoint.newest_first(tmp_path)
    assert [f.name for f in folders] == ["step-00000015", "step-00000010"]
    assert checkpoint.verify(folders[0])["note"] == 15
    assert sorted(f.name for f in folders[0].iterdir()) == ["sha256sums", "state.json", "tensors.bin"]


def test_random_generators_continue(tmp_path):
    folder = checkpoint.write(tmp_path, 1, {}, save_hello)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    checkpoint.restore_random_state(checkpoint.verify(folder))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


@pytest.mark.parametrize("name", ["tensors.bin", "state.json", "sha256sums"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_any_damage_is_seen(tmp_path, name, damage):
    folder = checkpoint.write(tmp_path, 1, {}, save_hello)
    file = folder / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    with pytest.raises(checkpoint.CorruptCheckpoint):
        checkpoint.verify(folder)


def test_a_failed_save_leaves_nothing_and_touches_nothing(tmp_path):
    checkpoint.write(tmp_path, 1, {}, save_hello)

    def fail(folder: Path) -> None:
        save_hello(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(tmp_path, 2, {}, fail)
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000001"]
    checkpoint.verify(tmp_path / "step-00000001")


def test_leftovers_of_a_killed_save_are_no_checkpoint(tmp_path):
    left = tmp_path / "step-00000007.unfinished"
    left.mkdir()
    save_hello(left)
    assert checkpoint.newest_first(tmp_path) == []
    checkpoint.write(tmp_path, 7, {}, save_hello)
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000007"]


def test_a_second_process_is_refused_and_a_dead_one_forgotten(tmp_path):
    code = (
        f"import sys; from rookery.train.rundir import RunDir; held = RunDir({str(tmp_path)!r})\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=str(holder.pid)):
        RunDir(tmp_path)
    holder.kill()
    holder.communicate()
    RunDir(tmp_path).close()


def test_status_keeps_what_is_not_replaced(tmp_path):
    rundir = RunDir(tmp_path)
    rundir.write_status(phase="training", step=3)
    rundir.write_status(step=4)
    status = json.loads(rundir.status_file.read_text(encoding="utf-8"))
    assert (status["phase"], status["step"]) == ("training", 4)
    assert status["updated"] >= status["started"]
    rundir.close()


def test_metrics_and_log_are_cut_where_the_run_goes_on(tmp_path):
    rundir = RunDir(tmp_path)
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 6)]
    rundir.metrics_file.write_text("\n".join(lines) + '\n{"step": 6, "lo', encoding="utf-8")
    rundir.log_file.write_text("NEW RUN now\n{}\n0 1.0 a\n1 1.0 b\n", encoding="utf-8")
    rundir.forget_after(3, epoch=1)
    assert rundir.metrics_file.read_text(encoding="utf-8") == "\n".join(lines[:3]) + "\n"
    assert rundir.log_file.read_text(encoding="utf-8") == "NEW RUN now\n{}\n0 1.0 a\n"
    rundir.close()
