"""Interrupted runs, as real processes: what follows equals the uninterrupted run bit for bit."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLOW = {"my_exit_tokens": 300 * 32, "epoch_steps": 70}


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    """Step -> (loss, gradient norm), exactly one line a step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == list(range(1, len(rows) + 1))
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text(encoding="utf-8").count("\n") < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    return output


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text(encoding="utf-8"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a process can answer")
def test_a_run_stopped_killed_and_damaged_equals_the_uninterrupted_one(command, tmp_path):
    whole = command(proj_dir=tmp_path / "whole", **SLOW)
    folder = tmp_path / "run"

    process = command(save_every=20, **SLOW)
    wait_for_step(process, folder, 30)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 130, output
    stopped_at = status(folder)["step"]
    assert status(folder)["phase"] == "stopped"
    assert (folder / "checkpoints" / f"step-{stopped_at:08d}").is_dir()

    process = command(save_every=20, **SLOW)
    wait_for_step(process, folder, stopped_at + 70)
    process.kill()
    finish(process)
    assert status(folder)["phase"] in ("training", "saving")

    newest, older = sorted((folder / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True)
    weights = newest / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)

    process = command(save_every=20, **SLOW)
    output = finish(process)
    assert process.returncode == 0, output
    assert newest.name in output
    assert f"from step {int(older.name[5:])}" in output

    assert whole.wait(timeout=300) == 0, finish(whole)
    finish(whole)
    assert len(losses(folder)) == 300
    assert losses(folder) == losses(tmp_path / "whole")
    log = [line.split(" ") for line in (folder / "train_log.txt").read_text(encoding="utf-8").splitlines()]
    expected = [
        line.split(" ") for line in (tmp_path / "whole" / "train_log.txt").read_text(encoding="utf-8").splitlines()
    ]
    assert [line[:4] for line in log if line[0].isdigit()] == [line[:4] for line in expected if line[0].isdigit()]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT that reaches one process alone")
def test_a_second_ctrl_c_ends_at_once_and_the_next_run_goes_on(command, tmp_path):
    flags = {**SLOW, "my_exit_tokens": 100 * 32}
    process = command(save_every=10, **flags)
    folder = tmp_path / "run"
    wait_for_step(process, folder, 15)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    finish(process)
    assert process.returncode == 130
    assert status(folder)["phase"] == "stopped"
    process = command(save_every=10, **flags)
    assert "from step" in finish(process)
    assert process.returncode == 0
    assert len(losses(folder)) == 100


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_a_disk_without_room_is_reported_and_leaves_no_half_checkpoint(command, tmp_path):
    """The largest file is limited so that weights still fit, but not the optimiser's state."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    process = command(preexec_fn=limit, save_every=20)
    output = finish(process)
    assert process.returncode == 2, output
    assert "cannot save a checkpoint" in output
    assert "Traceback" not in output
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert status(tmp_path / "run")["phase"] == "failed"
