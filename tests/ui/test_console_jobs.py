"""Commands that pages start: how far they are, what they leave, and what they take back when they are cancelled."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from rookery.formats import read_weights, write_pth
from rookery.models import ModelShape, create, initialise


@pytest.fixture(scope="module")
def model(folder, console) -> Path:
    """Large enough to be caught in the middle of its writing."""
    (folder / "models").mkdir()
    model = create(ModelShape("x070", 1, 256, 65536, 64, 256, 1024, dict.fromkeys("wavg", 32)))
    initialise(model, 0)
    file = folder / "models" / "base.pth"
    write_pth(file, {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()})
    return file


def ended(console, number: int) -> dict:
    """The job, when it has ended."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        job = next(job for job in console.events()["jobs"] if job["id"] == number)
        if job["state"] not in ("running", "cancelling"):
            return job
        time.sleep(0.05)
    raise AssertionError(job)


def caught(console, partial: Path, pattern: str) -> psutil.Process:
    """The console's command, stopped where it has begun to write."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if list(partial.glob(pattern)):
            workers = psutil.Process(console.process.pid).children()
            command = max(workers, key=lambda process: process.create_time())
            command.suspend()
            assert list(partial.glob(pattern)), "it was caught too late"
            return command
        time.sleep(0.002)
    raise AssertionError("nothing was written")


def test_a_model_is_converted_and_nothing_is_written_over(console, model, folder) -> None:
    values = {"source": "models/base.pth", "output": "models/other.safetensors", "to": "safetensors", "dtype": "fp32"}
    job = console.ask("api/models/convert", values)[1]
    assert ended(console, job["id"])["state"] == "done"
    other = folder / "models" / "other.safetensors"
    assert read_weights(other)["emb.weight"].dtype == torch.float32
    assert "exists: choose another name" in console.ask("api/models/convert", values)[1]["error"]
    other.unlink()


@pytest.mark.skipif(sys.platform == "win32", reason="a stopped process of Windows hears no Ctrl-Break")
def test_a_cancelled_conversion_leaves_nothing(console, model, folder) -> None:
    values = {"source": "models/base.pth", "output": "models/half.safetensors", "dtype": "fp32"}
    job = console.ask("api/models/convert", values)[1]
    command = caught(console, folder / "models", "half.*")
    assert console.ask("api/jobs/cancel", {"id": job["id"]})[1]["state"] == "cancelling"
    command.resume()
    assert ended(console, job["id"])["state"] == "cancelled"
    assert [file.name for file in (folder / "models").iterdir()] == ["base.pth"]


@pytest.mark.skipif(sys.platform == "win32", reason="a stopped process of Windows hears no Ctrl-Break")
def test_cancelled_data_leave_nothing_and_tell_how_far_they_were(console, folder) -> None:
    lines = (json.dumps({"text": f"{number} " * 400}) for number in range(8000))
    (folder / "large.jsonl").write_text("\n".join(lines), encoding="utf-8")
    job = console.ask("api/data/make", {"source": "large.jsonl", "output": "made", "epochs": "20"})[1]
    command = caught(console, folder, "made*partial*")
    console.ask("api/jobs/cancel", {"id": job["id"]})
    command.resume()
    job = ended(console, job["id"])
    assert job["state"] == "cancelled", job["output"]
    assert list(folder.glob("made*")) == []
    assert "Traceback" not in job["output"]


@pytest.mark.skipif(sys.platform == "win32", reason="a stopped process of Windows hears no Ctrl-Break")
def test_what_was_finished_before_it_could_be_cancelled_is_done(console, folder) -> None:
    job = console.ask("api/data/make", {"source": "large.jsonl", "output": "late"})[1]
    command = caught(console, folder, "late.idx")
    console.ask("api/jobs/cancel", {"id": job["id"]})
    command.resume()
    assert ended(console, job["id"])["state"] == "done"
