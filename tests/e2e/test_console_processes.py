"""Training belongs to nobody: it goes on when the console ends, and every console finds it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from console import ConsoleProcess, running_console

from rookery.ui import machine, processes


def steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text(encoding="utf-8"))


def start(console: ConsoleProcess, folder: Path, name: str) -> Path:
    (folder / "text.txt").write_text("one two three four five six seven eight nine ten " * 50, encoding="utf-8")
    values = {"data_file": "text.txt", "tokenizer": "char", "n_layer": "1", "n_embd": "32", "head_size": "32"}
    values |= {
        "ctx_len": "16",
        "micro_bsz": "1",
        "epoch_steps": "100000",
        "epoch_count": "1",
        "proj_dir": f"out/{name}",
    }
    answer = console.ask("api/train/start", values)
    assert answer[0] == 200, answer
    return folder / "out" / name


def test_training_goes_on_without_the_console_and_is_found_by_the_next(tmp_path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    with running_console(folder, before=getattr(os, "setsid", None)) as console:
        run = start(console, folder, "long")
        wait_until(lambda: steps(run) > 5)
        assert "is training: stop it first" in console.ask("api/runs/delete", {"run": str(run)})[1]["error"]
        assert "is training" in console.ask("api/runs/resume", {"run": str(run)})[1]["error"]
        if hasattr(os, "killpg"):  # Ctrl-C in a terminal reaches every process of its group
            os.killpg(console.process.pid, signal.SIGINT)
            assert console.process.wait(20) == 0
    before = steps(run)
    wait_until(lambda: steps(run) > before + 5)
    with running_console(folder) as console:
        assert console.ask("api/runs/stop", {"run": str(run)})[0] == 200
        wait_until(lambda: status(run)["phase"] == "stopped")
        stopped = status(run)["step"]
        assert list((run / "checkpoints").iterdir()), "stopping saves"
        assert "is not training" in console.ask("api/runs/stop", {"run": str(run)})[1]["error"]

        answer = console.ask(f"api/runs/config?run={run}")[1]
        assert answer["asked"]["n_embd"] == "32"
        assert "vocab_size" in answer["values"]
        assert "vocab_size" not in answer["asked"], "a clone asks for what was asked for, and finds the rest anew"

        assert console.ask("api/runs/resume", {"run": str(run)})[0] == 200
        wait_until(lambda: status(run)["phase"] == "training" and status(run)["step"] > stopped)
        os.kill(status(run)["pid"], getattr(signal, "SIGKILL", signal.SIGTERM))
        wait_until(lambda: console.events()["runs"][str(run)]["phase"] == "killed")
        assert status(run)["phase"] == "training", "its last words stay"
        killed = console.events()["runs"][str(run)]
        assert (killed["failure"]["code"], killed["resumable"]) == ("RK504", True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "no step is missing or made twice"


def test_a_process_with_the_number_of_a_dead_one_is_another_one() -> None:
    assert processes.alive(os.getpid())
    assert not processes.alive(os.getpid(), since=1.0)
    assert not processes.alive(None)
    assert not processes.alive(2**22 + 1)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for nvidia-smi is a shell script")
def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'NVIDIA GeForce RTX 4090, 24564, 1024, 37, 55'\necho 'Tesla, X, 1, [N/A], [N/A], 3'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(machine, "_gpus", (float("-inf"), []))
    assert machine.gpus() == [
        {"name": "NVIDIA GeForce RTX 4090", "memory": 24564 << 20, "used": 1 << 30, "load": 37, "temperature": 55}
    ]
    assert machine.gpu_free() == (24564 << 20) - (1 << 30)
