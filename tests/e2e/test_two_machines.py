"""Two machines, each a network namespace of its own, joined by a cable that is cut half-way and put back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import environment

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from train_pieces import CTX, FLAGS, write_data

STEPS = 40
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines():
    """Names of the two namespaces."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux and the program ip")
    names = [f"rookery{os.getpid()}{end}" for end in "ab"]
    cables = [f"rk{os.getpid()}{end}" for end in "ab"]
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, cables, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def start(machines, folder: Path, data_file: Path) -> list[subprocess.Popen[bytes]]:
    """torchrun on both machines, one process each."""
    flags = {**FLAGS, "my_exit_tokens": STEPS * 4 * CTX, "epoch_steps": 20, "save_every": 5, "data_file": data_file}
    words = [word for key, value in (flags | {"proj_dir": folder}).items() for word in (f"--{key}", str(value))]
    processes = []
    for rank, (name, _cable) in enumerate(machines):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        where = ["--node-rank", str(rank), "--master-addr", ADDRESSES[0], "--master-port", "29555"]
        with (folder.parent / f"output-{rank}.txt").open("ab") as output:
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *torchrun, *where, "-m", "rookery", "train", *words],
                    stdout=output,
                    stderr=output,
                    env=environment(),
                )
            )
    return processes


def losses(folder: Path) -> list[float]:
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line)["loss"] for line in lines]


def test_a_cut_cable_ends_the_run_on_both_machines_and_it_goes_on_when_it_is_mended(machines, tmp_path):
    data_file = write_data(tmp_path / "walks")
    folder = tmp_path / "run"
    processes = start(machines, folder, data_file)
    try:
        deadline = time.monotonic() + 120
        while len(losses(folder)) < 12:
            assert all(process.poll() is None for process in processes), (tmp_path / "output-0.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        name, cable = machines[1]
        ip("-n", name, "link", "set", cable, "down")
        began = time.monotonic()
        assert [process.wait(90) for process in processes] == [1, 1]
        assert time.monotonic() - began < 60
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        assert status["phase"] == "failed"
        assert "rank 1: no sign of life" in status["exit_reason"]

        ip("-n", name, "link", "set", cable, "up")
        processes = start(machines, folder, data_file)
        assert [process.wait(200) for process in processes] == [0, 0], (tmp_path / "output-0.txt").read_text()
        found = losses(folder)
        assert len(found) == STEPS
        assert found[-1] < found[0] - 0.3
        assert "from step" in (tmp_path / "output-0.txt").read_text(encoding="utf-8")
    finally:
        for process in processes:
            process.kill()
            process.wait()
