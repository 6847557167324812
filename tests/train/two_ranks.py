"""Two processes that train together over gloo, as the tests of training start them."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_two_ranks(worker: str, folder: Path, strategies: Sequence[str]) -> Any:
    """Run a script of this folder as both ranks; what they leave in `folder`/found.json."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    tests = Path(__file__).parent
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{tests.parents[1]}{os.pathsep}{tests}",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(tests / worker), str(folder), *strategies],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))
