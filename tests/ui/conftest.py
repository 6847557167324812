"""A console in a process of its own, and a folder with runs for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "e2e"))

from console import ConsoleProcess, running_console


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("console") / "work"


@pytest.fixture(scope="module")
def console(folder) -> Iterator[ConsoleProcess]:
    folder.mkdir(exist_ok=True)
    with running_console(folder) as console:
        yield console


@pytest.fixture
def make_run(folder):
    """Writes a run directory as the trainer leaves it."""

    def make(name: str, *, steps: int = 30, config: str = "[data]\nctx_len = 8\n", **status: object) -> Path:
        path = folder / "out" / name
        (path / "checkpoints").mkdir(parents=True)
        (path / "config.toml").write_text(config, encoding="utf-8")
        (path / "status.json").write_text(json.dumps({"phase": "done", "step": steps, **status}), encoding="utf-8")
        lines = [
            {"step": s, "loss": 3 / s, "lr": 1e-3, "grad_norm": None, "tok_s": 5.0, "time": 1000.0 + s}
            for s in range(1, steps + 1)
        ]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return path

    return make
