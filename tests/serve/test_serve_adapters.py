"""Adapters: mounted at the start and while the server runs, chosen by a request, many at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from rookery.infer import Sampling, generate, open_model

GREEDY = Sampling(temperature=0, alpha_presence=0, alpha_frequency=0, max_tokens=20, token_stop=())


def complete(server, adapter: str) -> str:
    answer = server.client.completions.create(
        model="babbler", prompt="What now?", max_tokens=20, extra_body={"adapter": adapter}
    )
    return answer.choices[0].text


def expected(folder: Path, adapter: str) -> str:
    file = folder / "adapters" / f"{adapter}.safetensors" if adapter else None
    model, vocabulary = open_model(folder, device="cpu", adapter=file)
    return "".join(generate(model, vocabulary, vocabulary.encode("What now?"), GREEDY))


def test_requests_with_different_adapters_at_the_same_time(babbling, babbler) -> None:
    mounted = babbling.http.post("/v1/adapters", json={"name": "judge", "file": "judge.safetensors"})
    assert mounted.json()["object"] == "adapter", mounted.text
    wanted = {name: expected(babbler, name) for name in ("", "sailor", "judge")}
    assert len(set(wanted.values())) == 3
    names = list(wanted) * 4
    with ThreadPoolExecutor(len(names)) as pool:
        assert list(pool.map(lambda name: complete(babbling, name), names)) == [wanted[name] for name in names]
    listed = babbling.http.get("/v1/adapters").json()
    assert [entry["id"] for entry in listed["data"]] == ["judge", "sailor"]
    assert listed["available"] == ["judge.safetensors", "sailor.safetensors"]
    assert babbling.http.delete("/v1/adapters/judge").json()["deleted"] is True
    with pytest.raises(openai.BadRequestError, match="No adapter called judge"):
        complete(babbling, "judge")
    assert complete(babbling, "sailor") == wanted["sailor"]
    assert complete(babbling, "") == wanted[""]


def test_files_that_are_no_adapters_are_refused(babbling, babbler) -> None:
    adapters = babbler / "adapters"
    whole = (adapters / "judge.safetensors").read_bytes()
    try:
        for name, data in {"cut.safetensors": whole[:-9], "noise.safetensors": b"\xff" * 99, "text.pth": b"x"}.items():
            (adapters / name).write_bytes(data)
            refused = babbling.http.post("/v1/adapters", json={"name": "bad", "file": name})
            assert refused.status_code == 400, name
            (adapters / name).unlink()
    finally:
        for path in adapters.iterdir():
            if path.name not in ("judge.safetensors", "sailor.safetensors"):
                path.unlink()
    assert babbling.http.post("/v1/adapters", json={"name": "x", "file": "../rwkv-final.pth"}).status_code == 403
    assert [entry["id"] for entry in babbling.http.get("/v1/adapters").json()["data"]] == ["sailor"]
