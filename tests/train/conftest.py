"""Fixtures of the training tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from train_pieces import FLAGS, write_data

from rookery.config import TrainConfig


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "walks")


@pytest.fixture
def config(data_file, tmp_path):
    """Makes a configuration of the tiny run, with changes."""

    def make(**changes) -> TrainConfig:
        return TrainConfig(**{**FLAGS, "data_file": str(data_file), "proj_dir": str(tmp_path / "run"), **changes})

    return make


@pytest.fixture
def command(data_file, tmp_path):
    """Starts the real command on the tiny run, with changed flags; gives the process."""
    processes: list[subprocess.Popen] = []

    def start(preexec_fn=None, prelude="", **changes) -> subprocess.Popen:
        flags = {**FLAGS, "data_file": data_file, "proj_dir": tmp_path / "run", **changes}
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        process = subprocess.Popen(
            [sys.executable, "-c", f"{prelude}\nfrom rookery.cli import main; main()", "train", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=preexec_fn,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()
