"""Requests that are valid and meant ill, or unlucky: nobody else's answer suffers. Most were found by fuzzing."""

from __future__ import annotations

import json
import math

import openai
import pytest

ENDLESS = {
    "anyOf": [
        {"type": "object", "properties": {f"p{i}_{j}": {"type": "string", "pattern": f"a{{{i}}}b*"} for j in range(20)}}
        for i in range(500)
    ]
}
"""A schema that is read without complaint and found to be too large when the first token is to be chosen."""


def test_a_form_that_fails_in_the_midst_of_answering_harms_nobody_else(babbling) -> None:
    ask = babbling.client.completions.create
    running = ask(model="babbler", prompt="Once", max_tokens=100_000, stream=True)
    chunks = [next(running) for _chunk in range(5)]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": ENDLESS}}
    hostile = {"model": "babbler", "messages": [{"role": "user", "content": "x"}], "response_format": form}
    with pytest.raises(openai.BadRequestError, match="form asked"):
        babbling.client.chat.completions.create(**hostile)
    with pytest.raises(openai.APIError, match="form asked"):
        list(babbling.client.chat.completions.create(**hostile, stream=True))
    babbling.wait_until(slots_active=1)
    chunks += [next(running) for _chunk in range(500)]
    assert all(chunk.choices[0].text and not chunk.choices[0].finish_reason for chunk in chunks)
    running.close()
    babbling.wait_until(slots_active=0, accepted=0)
    assert babbling.errors == ""


@pytest.mark.parametrize("temperature", [0.05, 0.001, 1e-9, 1e-300, 5e-324])
def test_very_low_temperatures_are_as_good_as_none(babbling, temperature) -> None:
    def text(**settings) -> str:
        return (
            babbling.client.completions.create(
                model="babbler", prompt="a", max_tokens=10, presence_penalty=0, frequency_penalty=0, seed=1, **settings
            )
            .choices[0]
            .text
        )

    drawn = text(temperature=temperature, top_p=1)
    assert len(drawn) == 10
    if temperature < 0.01:
        assert drawn == text(temperature=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0},
        {"min_p": 1},
        {"top_k": 1},
        {"top_k": 2**31 - 1},
        {"presence_penalty": -2, "frequency_penalty": -2, "penalty_decay": 1},
        {"logit_bias": {str(token): -100 for token in range(90)}},
    ],
    ids=str,
)
def test_settings_at_their_limits(babbling, settings) -> None:
    body = {"prompt": "a", "max_tokens": 5, "temperature": 2, "logprobs": 20, **settings}
    answer = babbling.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    values = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert all(math.isfinite(value) and value <= 0 for value in values)


def test_every_method_of_a_path_is_named(babbling) -> None:
    for path, methods in {"/v1/states": "GET, POST", "/v1/models": "GET", "/v1/states/x": "DELETE"}.items():
        refused = babbling.http.patch(path)
        assert refused.status_code == 405
        assert refused.headers["allow"] == methods


def test_the_description_says_what_is_sent(babbling) -> None:
    document = babbling.http.get("/openapi.json").json()
    assert "422" not in json.dumps(document)
    for path in ("/v1/chat/completions", "/v1/completions"):
        answers = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert set(answers) == {"application/json", "text/event-stream"}
        # The whole answer has a schema; a stream is a sequence of events, for which OpenAPI 3.1 has none.
        assert answers["text/event-stream"] == {}
