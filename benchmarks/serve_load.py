"""Load on `rookery serve`: many streams at once, one in three cut off half-way, every other one checked.

    python benchmarks/serve_load.py out/demo [--seconds 60] [--streams 32] [-o FILE.json]

Starts the server of a model (here that of `rookery demo`) in its own process; the visitors share its machine. Answers
are drawn at temperature 0 and must be those that the same questions got alone; at the end no slot may be taken. Written
to FILE: answers, tokens a second, seconds until the first token, and the server's memory after each half of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil

from rookery.cli.doctor import processor
from rookery.formats import read_weights, shape_of


@dataclass
class Tally:
    """What the streams have seen."""

    whole: int = 0
    cut: int = 0
    wrong: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def questions(count: int) -> list[dict[str, Any]]:
    """Requests of different lengths, some with a beginning in common."""
    source = random.Random(0)
    system = "System: You add and subtract, and say nothing else.\n\n"
    return [
        {
            "prompt": f"{(system, '')[i % 2]}User: {source.randrange(1000)}+{source.randrange(1000)}=?\n\nAssistant:",
            "max_tokens": source.randrange(30, 200),
            "temperature": 0,
            "presence_penalty": 0,
            "frequency_penalty": 0,
        }
        for i in range(count)
    ]


def quantiles(values: list[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    ordered = sorted(values)
    return {f"p{share}": round(ordered[len(ordered) * share // 100], 4) for share in (50, 95)}


async def stream(client: httpx.AsyncClient, asked: dict[str, Any], expected: str, cut: bool, tally: Tally) -> None:
    """One answer; cut off after half of it, or compared with what is expected."""
    begun, text, first = time.perf_counter(), "", 0.0
    async with client.stream("POST", "/v1/completions", json=asked | {"stream": True}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                tally.wrong.append(chunk["error"]["message"])
                return
            text += chunk["choices"][0]["text"]
            if text and not first:
                first = time.perf_counter() - begun
            if cut and len(text) > len(expected) / 2:
                tally.cut += 1
                return
    tally.whole += 1
    tally.first.append(first)
    tally.seconds.append(time.perf_counter() - begun)
    if text != expected:
        tally.wrong.append(f"{asked['prompt']!r}: {text!r} instead of {expected!r}")


async def load(url: str, seconds: float, streams: int, tally: Tally, seed: int) -> None:
    """Keep `streams` answers going for so many seconds, then let the last ones finish."""
    asked = questions(24)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=streams)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        alone = [(await client.post("/v1/completions", json=body)).json()["choices"][0]["text"] for body in asked]
        end = time.monotonic() + seconds

        async def visitor(number: int) -> None:
            source = random.Random(seed * 1000 + number)
            while time.monotonic() < end:
                which = source.randrange(len(asked))
                await stream(client, asked[which], alone[which], source.random() < 1 / 3, tally)

        await asyncio.gather(*(visitor(number) for number in range(streams)))


def figures(url: str) -> dict[str, float]:
    """The server's own, name -> value."""
    rows = (line.rpartition(" ") for line in httpx.get(f"{url}/metrics").text.splitlines() if line[0] != "#")
    return {name: float(value) for name, _space, value in rows}


def settled(url: str, seconds: float = 10) -> dict[str, float]:
    """The server's figures once nothing is in progress, or after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        now = figures(url)
        if time.monotonic() > end or not now["rookery_slots_active"] + now["rookery_queue"] + now["rookery_accepted"]:
            return now
        time.sleep(0.05)


def shape(model: str) -> str:
    """Version, layers, width and vocabulary, as in `x070 L3 D96 V315`."""
    found = shape_of(read_weights(model), model)
    return f"{found.version} L{found.n_layer} D{found.n_embd} V{found.vocab_size}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    command = [sys.executable, "-m", "rookery", "--lang", "en", "serve", options.model, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        found = re.search(r"http://\S+:\d+", server.stdout.readline())
        if not found:
            sys.exit("the server did not start")
        url, process = found[0], psutil.Process(server.pid)
        asyncio.run(load(url, 3, options.streams, Tally(), seed=0))
        before, busy = settled(url), process.cpu_times()
        memory, tally = [process.memory_info().rss], Tally()
        begun = time.perf_counter()
        for half in (1, 2):
            asyncio.run(load(url, options.seconds / 2, options.streams, tally, seed=half))
            memory.append(process.memory_info().rss)
        took = time.perf_counter() - begun
        after, spent = settled(url), process.cpu_times()
    finally:
        server.terminate()
        status = server.wait(60)
    done = {name: after[f"rookery_{name}"] - before[f"rookery_{name}"] for name in ("answers_total", "abandoned_total")}
    tokens = after["rookery_completion_tokens_total"] - before["rookery_completion_tokens_total"]
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "what": f"{options.streams} concurrent streams for {options.seconds:g} s, one in three cut off half-way",
        "machine": {
            "processor": processor(),
            "cores": psutil.cpu_count(),
            "load_average": [round(value, 2) for value in psutil.getloadavg()],
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "fastapi", "uvicorn")}},
        "model": {"path": options.model, "shape": shape(options.model)},
        "seconds": round(took, 2),
        "server_cpu_seconds": round(spent.user + spent.system - busy.user - busy.system, 2),
        "answers": {"begun": int(done["answers_total"]), "whole": tally.whole, "cut_off": tally.cut},
        "abandoned": int(done["abandoned_total"]),
        "different_from_alone": len(tally.wrong),
        "completion_tokens": int(tokens),
        "tokens_per_second": round(tokens / took, 1),
        "first_token_seconds": quantiles(tally.first),
        "answer_seconds": quantiles(tally.seconds),
        "left_over": {n: int(after[f"rookery_{n}"]) for n in ("slots_active", "queue", "accepted")},
        "megabytes": dict(zip(("before", "half", "end"), (round(m / 1e6, 1) for m in memory), strict=True)),
        "exit_status": status,
    }
    text = json.dumps(record, indent=2, ensure_ascii=False)
    print(text)
    for line in tally.wrong[:3]:
        print(line, file=sys.stderr)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    sys.exit(1 if tally.wrong or any(record["left_over"].values()) else 0)


if __name__ == "__main__":
    main()
