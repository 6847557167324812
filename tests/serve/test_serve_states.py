"""Tuned states: mounted at the start and while the server runs, chosen by a request, never executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import openai
import pytest
import torch

from rookery.formats import read_weights
from rookery.infer import Sampling, generate, open_model
from rookery.models import State

GREEDY = Sampling(temperature=0, alpha_presence=0, alpha_frequency=0, max_tokens=20, token_stop=())


def complete(server, prompt="What now?", **fields) -> str:
    answer = server.client.completions.create(model="babbler", prompt=prompt, max_tokens=20, extra_body=fields)
    return answer.choices[0].text


def expected(folder: Path, state: Path | None) -> str:
    model, vocabulary = open_model(folder, device="cpu")
    before = None
    if state:
        before = State.zeros(model.shape, 1, "cpu", torch.float32)
        before.wkv[0, 0] = read_weights(state)["blocks.0.att.time_state"]
    return "".join(generate(model, vocabulary, vocabulary.encode("What now?"), GREEDY, before))


def test_a_request_names_its_state(babbling, babbler) -> None:
    plain, poet = complete(babbling), complete(babbling, state="poet")
    assert plain == complete(babbling, state="") == expected(babbler, None)
    assert poet == expected(babbler, babbler / "states" / "poet.pth")
    assert plain != poet
    embed = babbling.client.embeddings.create
    vectors = [
        embed(model="babbler", input="a", extra_body={"state": state}).data[0].embedding for state in ("", "poet")
    ]
    assert vectors[0] != vectors[1]


def test_mounting_and_unmounting_while_it_runs(babbling, babbler) -> None:
    listed = babbling.http.get("/v1/states").json()
    assert [(entry["id"], entry["object"], entry["file"]) for entry in listed["data"]] == [
        ("poet", "state", "poet.pth")
    ]
    assert listed["available"] == ["more/clown.pth", "poet.pth"]
    with pytest.raises(openai.BadRequestError, match="No state called clown"):
        complete(babbling, state="clown")
    mounted = babbling.http.post("/v1/states", json={"name": "clown", "file": "more/clown.pth"})
    assert mounted.status_code == 200
    assert mounted.json()["id"] == "clown"
    clown = complete(babbling, state="clown")
    assert clown == expected(babbler, babbler / "states" / "more" / "clown.pth")
    # A name that is taken gets the new file, and nothing of the old one stays in the cache.
    babbling.http.post("/v1/states", json={"name": "clown", "file": "poet.pth"})
    assert complete(babbling, state="clown") == complete(babbling, state="poet") != clown
    assert babbling.http.delete("/v1/states/clown").json() == {"id": "clown", "object": "state", "deleted": True}
    assert babbling.http.delete("/v1/states/clown").status_code == 404
    with pytest.raises(openai.BadRequestError, match="No state called clown"):
        complete(babbling, state="clown")
    assert complete(babbling, state="poet") == expected(babbler, babbler / "states" / "poet.pth")


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_files_that_are_no_states_are_refused_and_never_run(babbling, babbler, tmp_path) -> None:
    states = babbler / "states"
    mark = tmp_path / "it ran"
    bad = {
        "pickle.pth": pickle.dumps({"blocks.0.att.time_state": Evil(mark)}, protocol=2),
        "empty.pth": b"",
        "header.safetensors": b"\xff" * 64,
        "cut.pth": (states / "poet.pth").read_bytes()[:400],
    }
    torch.save({"blocks.0.att.time_state": Evil(mark)}, states / "zip.pth")
    torch.save({"blocks.0.att.time_state": torch.zeros(1, 16, 16)}, states / "small.pth")
    for name, data in bad.items():
        (states / name).write_bytes(data)
    names = [*bad, "zip.pth", "small.pth"]
    try:
        for name in names:
            refused = babbling.http.post("/v1/states", json={"name": "bad", "file": name})
            assert refused.status_code == 400, name
            assert refused.json()["error"]["param"] == "file"
            assert str(states) not in refused.text, "where the folder lies is no client's business"
    finally:
        for name in names:
            (states / name).unlink()
    assert not mark.exists()
    assert [entry["id"] for entry in babbling.http.get("/v1/states").json()["data"]] == ["poet"]


def test_a_state_that_is_no_number_harms_nobody_else(babbling, babbler) -> None:
    file = babbler / "states" / "broken.pth"
    state = {name: tensor.clone() for name, tensor in read_weights(babbler / "states" / "poet.pth").items()}
    state["blocks.0.att.time_state"][0, 1, 2] = float("nan")
    torch.save(state, file)
    running = babbling.client.completions.create(model="babbler", prompt="Once", max_tokens=100_000, stream=True)
    try:
        next(running)
        assert babbling.http.post("/v1/states", json={"name": "broken", "file": file.name}).status_code == 200
        asked = {"model": "babbler", "extra_body": {"state": "broken"}}
        for ask in (
            lambda: babbling.client.completions.create(prompt="a", **asked),
            lambda: babbling.client.completions.create(prompt="abc", echo=True, max_tokens=0, logprobs=1, **asked),
            lambda: babbling.client.embeddings.create(input="abc", **asked),
            lambda: list(babbling.client.completions.create(prompt="a", stream=True, **asked)),
        ):
            with pytest.raises(openai.APIError, match="NaN or infinity"):
                ask()
        assert all(next(running).choices[0].text for _chunk in range(100))
    finally:
        running.close()
        babbling.http.delete("/v1/states/broken")
        file.unlink()
    babbling.wait_until(slots_active=0, accepted=0)
    assert babbling.errors == ""


def test_paths_stay_in_the_folder(babbling, babbler) -> None:
    link = babbler / "states" / "link.pth"
    link.symlink_to(babbler / "outside.pth")
    try:
        outside = ["../outside.pth", str(babbler / "outside.pth"), "more/../../outside.pth", "link.pth", "/etc/passwd"]
        for file in outside:
            assert babbling.http.post("/v1/states", json={"name": "x", "file": file}).status_code == 403, file
        for file in ("nothing.pth", "more", "a\0b", "x" * 1000):
            assert babbling.http.post("/v1/states", json={"name": "x", "file": file}).status_code == 404, file
    finally:
        link.unlink()
    assert babbling.http.post("/v1/states", json={"name": "../x", "file": "poet.pth"}).status_code == 400


def test_without_a_folder_nothing_can_be_mounted(knowing) -> None:
    for kind in ("states", "adapters"):
        refused = knowing.http.post(f"/v1/{kind}", json={"name": "x", "file": "x.pth"})
        assert refused.status_code == 403
        assert f"--{kind}-dir" in refused.json()["error"]["message"]
        assert knowing.http.get(f"/v1/{kind}").json() == {"object": "list", "data": [], "available": []}


def test_a_state_without_a_name_is_used_by_requests_that_name_none(serve, babbler) -> None:
    poet = babbler / "states" / "poet.pth"
    server = serve(babbler, "--state", poet, "--name", "babbler")
    assert complete(server) == complete(server, state="default") == expected(babbler, poet)
    assert complete(server, state="") == expected(babbler, None)
