"""Memory of `rookery data make` on a small and on a large file.

    python benchmarks/data_memory.py [--megabytes 100 1000] [-o FILE.json]

Each file is made of the texts that `rookery bench data` takes, over and over, and read by one process. Recorded: what
that process holds at most (anonymous memory, so not the files that it maps; sampled, Linux only), and its CPU time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from rookery.bench.data import MEGABYTE, corpus
from rookery.bench.machine import anonymous_memory, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("-o", dest="output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in corpus(folder, 20 * MEGABYTE))
        results = {f"{size} MB": watch(folder, lines.encode(), size) for size in sorted(arguments.megabytes)}
    text = json.dumps(record("data memory", {"results": results}), indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


def watch(folder: Path, lines: bytes, megabytes: int) -> dict[str, Any]:
    """Figures of one `rookery data make`."""
    source = folder / "data.jsonl"
    with source.open("wb") as file:
        for _ in range(max(1, megabytes * MEGABYTE // len(lines))):
            file.write(lines)
    words = ["data", "make", str(source), "1", "512", "-o", str(folder / "made"), "--workers", "1"]
    process = subprocess.Popen([sys.executable, "-m", "rookery", *words], stdout=subprocess.DEVNULL)
    watched, peak, seconds = psutil.Process(process.pid), 0, 0.0
    while process.poll() is None:
        try:
            peak, seconds = max(peak, anonymous_memory(process.pid)), sum(watched.cpu_times()[:2])
        except (OSError, RuntimeError, psutil.Error):  # it has ended
            break
        time.sleep(0.01)
    if process.wait():
        raise SystemExit(f"rookery {' '.join(words)} failed")
    return {
        "bytes of text": source.stat().st_size,
        "bytes of tokens": (folder / "made.bin").stat().st_size,
        "documents": lines.count(b"\n") * (source.stat().st_size // len(lines)),
        "peak bytes of memory": peak,
        "CPU seconds": round(seconds, 2),
    }


if __name__ == "__main__":
    main()
