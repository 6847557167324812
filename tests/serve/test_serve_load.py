"""32 streams at once, one in three cut off half-way, by the script that also measures it for a minute."""

from __future__ import annotations

import asyncio
import importlib.util
import sys

import psutil
from serving import ROOT

SPEC = importlib.util.spec_from_file_location("serve_load", ROOT / "benchmarks" / "serve_load.py")
assert SPEC
assert SPEC.loader
serve_load = importlib.util.module_from_spec(SPEC)
sys.modules["serve_load"] = serve_load
SPEC.loader.exec_module(serve_load)


def test_every_answer_is_that_given_alone_and_nothing_is_left(serve, babbler) -> None:
    """16 slots, so that half of the streams wait; a small cache, so that memory stays where it is."""
    server = serve(babbler, "--slots", "16", "--cache", "1")
    asyncio.run(serve_load.load(server.url, 0.5, 32, serve_load.Tally(), seed=0))
    process = psutil.Process(server.process.pid)
    memory, files = process.memory_info().rss, process.num_fds() if hasattr(process, "num_fds") else 0
    tally = serve_load.Tally()
    asyncio.run(serve_load.load(server.url, 2, 32, tally, seed=1))
    assert tally.wrong == []
    assert tally.whole > 20
    assert tally.cut > 8
    figures = server.wait_until(slots_active=0, queue=0, accepted=0)
    assert figures["rookery_refused_total"] == 0
    assert process.memory_info().rss - memory < 32 << 20
    if files:
        assert process.num_fds() <= files + 4
    assert server.errors == ""
