"""All that a machine with an NVIDIA GPU can say of Rookery's speed, within half an hour.

The kernels are tested first; then `rookery bench` measures them, training steps and decoding, each in a process of its
own that leaves a dated record. What takes too long or fails is named in the summary and costs the others nothing. Where
flash-linear-attention is installed (pip install flash-linear-attention) it is measured in the same runs.

    python benchmarks/gpu_all.py                        # records go to benchmarks/results
    python benchmarks/gpu_all.py --only train-0.1B      # runs whose names begin so
    python benchmarks/gpu_all.py --list                 # the commands, which run anywhere
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

STEPS = "mix7 token_shift gates7 relu_square"
SIZES = {
    "0.1B": "--n-layer 12 --n-embd 768",
    "1.5B": "--n-layer 24 --n-embd 2048",
    "2.9B": "--n-layer 32 --n-embd 2560",
}


@dataclass(frozen=True)
class Run:
    """A command and the most minutes that it may take.

    Attributes:
        words: after `python`; a run of `rookery bench` is told where to write its record.
        peers: what it is compared with, where that is installed.
    """

    name: str
    words: str
    minutes: float
    peers: tuple[str, ...] = ()

    def command(self, results: Path) -> list[str]:
        words = self.words.split()
        for peer in self.peers:
            if importlib.util.find_spec(peer) is not None:
                words += ["--against", peer]
        if "pytest" not in words:
            words += ["-o", str(self.record(results))]
        return [sys.executable, *words]

    def record(self, results: Path) -> Path:
        return results / f"{time.strftime('%Y-%m-%d')}-gpu-{self.name}.json"


def bench(name: str, words: str, minutes: float, *peers: str) -> Run:
    return Run(name, f"-m rookery bench {words} --device cuda", minutes, peers)


RUNS = [
    Run(
        "tests",
        "-m pytest -q tests/ops/test_wkv7_triton.py tests/ops/test_wkv6_triton.py tests/ops/test_steps_triton.py "
        "tests/ops/test_fla.py tests/ops/test_packed.py tests/ops/test_head_loss.py",
        8,
    ),
    # The numbers are those of the goals in the issue on speed.
    bench("wkv-many-heads", "op wkv7 wkv6 --micro-bsz 8 --n-embd 4096 --ctx-len 4096", 3, "fla"),  # goal 1
    bench("wkv-12-heads", "op wkv7 wkv6 --micro-bsz 1 --n-embd 768 --ctx-len 4096", 2, "fla"),  # goal 2
    bench("wkv-40-heads", "op wkv7 --micro-bsz 1 --n-embd 2560 --ctx-len 4096", 2, "fla"),
    bench("wkv-12-heads-long", "op wkv7 --micro-bsz 1 --n-embd 768 --ctx-len 16384", 2, "fla"),
    bench("steps-0.1B", f"op {STEPS} --micro-bsz 64 --n-embd 768 --ctx-len 512", 2, "torch"),
    bench("steps-1.5B", f"op {STEPS} --micro-bsz 8 --n-embd 2048 --ctx-len 4096", 2, "torch"),
    bench("head-0.1B", "op head --micro-bsz 16 --n-embd 768 --ctx-len 512", 1, "torch"),  # goal 6
    bench("head-7B", "op head --micro-bsz 16 --n-embd 4096 --ctx-len 512", 1, "torch"),
    bench("train-0.1B-b16", f"train {SIZES['0.1B']} --ctx-len 512 --micro-bsz 16", 2, "torch", "fla"),  # goal 3
    bench("train-0.1B-b64", f"train {SIZES['0.1B']} --ctx-len 512 --micro-bsz 64", 2, "torch", "fla"),
    bench("train-1.5B-b8", f"train {SIZES['1.5B']} --ctx-len 4096 --micro-bsz 8 --rounds 3", 3, "fla"),  # goal 4
    bench("train-1.5B-b1", f"train {SIZES['1.5B']} --ctx-len 4096 --micro-bsz 1 --rounds 3", 2, "fla"),
    bench("train-2.9B", f"train {SIZES['2.9B']} --ctx-len 4096 --micro-bsz 4 --rounds 3 --grad-cp", 3),  # goal 5
    bench("infer-0.1B", f"infer {SIZES['0.1B']} --dtype bf16", 2, "rwkv"),  # goal 8
    bench("infer-1.5B", f"infer {SIZES['1.5B']} --dtype bf16 --rounds 3", 3, "rwkv"),
    Run("wkv7-schedules", "benchmarks/gpu_wkv7.py", 6),  # goals 1 and 2: which schedule serves which shape best
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="after which nothing new is begun")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="runs whose names begin with one of these")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--list", action="store_true", help="print the commands and do nothing")
    options = parser.parse_args()
    wanted = tuple(options.only or [""])
    runs = [run for run in RUNS if run.name.startswith(wanted)]
    if options.list:
        for run in runs:
            print(f"{run.name}: {' '.join(run.command(options.results)[1:])}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("This measures a GPU, and PyTorch sees none here.", file=sys.stderr)
        return 2
    options.results.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes
    summary = {}
    for run in runs:
        summary[run.name] = outcome = perform(run, options.results.resolve(), ends - time.monotonic())
        print(f"{run.name}: {outcome['result']} after {outcome['seconds']} s", flush=True)

    from rookery.bench.machine import record

    file = options.results / f"{time.strftime('%Y-%m-%d')}-gpu-all.json"
    file.write_text(json.dumps(record("all of the GPU", {"runs": summary}), indent=2) + "\n", encoding="utf-8")
    print(f"Summary: {file}")
    return 0 if all(outcome["result"] == "done" for outcome in summary.values()) else 1


def perform(run: Run, results: Path, seconds_left: float) -> dict[str, Any]:
    """What became of a run: its result, seconds, command, and the end of what it said if it failed."""
    command = run.command(results)
    told = {"command": " ".join(command[1:])}
    limit = min(60 * run.minutes, seconds_left)
    if limit <= 0:
        return {"result": "no time left", "seconds": 0, **told}
    begun = time.monotonic()
    try:
        process = subprocess.run(command, cwd=ROOT, timeout=limit, capture_output=True, text=True, errors="replace")
    except subprocess.TimeoutExpired:
        return {"result": "took too long", "seconds": round(limit), **told}
    seconds = round(time.monotonic() - begun)
    if process.returncode:
        said = (process.stdout + process.stderr)[-2000:]
        return {"result": f"failed ({process.returncode})", "seconds": seconds, **told, "said": said}
    return {"result": "done", "seconds": seconds, **told}


if __name__ == "__main__":
    sys.exit(main())
