"""benchmarks/gpu_all.py: without a GPU its commands at least are ones that `rookery bench` takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from rookery.bench.op import CASES
from rookery.cli.bench import app

ROOT = Path(__file__).parents[2]


def call(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu_all.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_its_commands_can_be_given(tmp_path: Path) -> None:
    listed = call("--list", "--results", str(tmp_path)).stdout.splitlines()
    assert len(listed) > 10
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in listed:
        name, _, words = line.partition(": ")
        program = words.split()
        if program[:3] == ["-m", "rookery", "bench"]:
            context = commands[program[3]].make_context(program[3], program[4:])
            assert context.params["out"] == tmp_path / context.params["out"].name, name
            assert context.params["n_embd"] % 64 == 0
            assert set(context.params.get("names") or ()) <= set(CASES)
        else:
            files = [word for word in program if word.endswith(".py")]
            assert files, name
            assert all((ROOT / file).is_file() for file in files), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it would take half an hour")
def test_without_a_gpu_it_says_so() -> None:
    answer = call()
    assert answer.returncode == 2
    assert "PyTorch sees none here" in answer.stderr
