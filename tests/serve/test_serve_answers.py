"""The API through the real `openai` client, against a model whose answers are known."""

from __future__ import annotations

import base64
import json
import math
import re

import httpx
import numpy as np
import openai
import pytest
import torch
from serving import TOOLS

import rookery
from rookery.infer import Sampling, generate, open_model

HI = [{"role": "user", "content": "Hi"}]
HELLO = "Hello, 世界! 🐦"
SUM = [{"role": "user", "content": "1+2?"}]


def ask(server, messages=HI, **options):
    return server.client.chat.completions.create(model="clerk", messages=messages, **options)


def joined(chunks) -> dict:
    """What a client makes of a stream with one choice."""
    text = thoughts = ""
    calls, finishes = [], []
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            thoughts += getattr(choice.delta, "reasoning_content", None) or ""
            calls += choice.delta.tool_calls or []
            finishes += [choice.finish_reason] if choice.finish_reason else []
    return {"text": text, "thoughts": thoughts, "calls": calls, "finishes": finishes}


def test_a_chat(knowing) -> None:
    answer = ask(knowing)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", HELLO, "stop")
    assert choice.message.tool_calls is None
    assert choice.logprobs is None
    assert (answer.object, answer.model) == ("chat.completion", "clerk")
    prompt, said = len("User: Hi\n\nAssistant:"), len(f" {HELLO}\n\n")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, said)
    assert answer.usage.total_tokens == prompt + said


def test_a_stream_has_the_same_answer_in_openais_chunks(knowing) -> None:
    with knowing.client.chat.completions.with_streaming_response.create(
        model="clerk", messages=HI, stream=True, stream_options={"include_usage": True}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {(chunk["id"], chunk["object"], chunk["model"], chunk["created"]) for chunk in chunks} == {
        (chunks[0]["id"], "chat.completion.chunk", "clerk", chunks[0]["created"])
    }
    first, *middle, last, usage = chunks
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == HELLO
    assert len(middle) > 5
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(f" {HELLO}\n\n")
    plain = list(ask(knowing, stream=True))
    assert joined(plain)["text"] == HELLO
    assert all(chunk.usage is None for chunk in plain)


def test_the_clients_own_stream_helper_understands_it(knowing) -> None:
    with knowing.client.chat.completions.stream(model="clerk", messages=SUM, tools=TOOLS) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].message.tool_calls[0].function.name == "add"


def test_text_may_come_in_parts_and_from_a_developer(knowing) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert ask(knowing, parts).choices[0].message.content == HELLO
    told = [{"role": "developer", "content": "Hi"}, {"role": "system", "content": "Hi"}, *HI]
    assert ask(knowing, told).usage.prompt_tokens == len("System: Hi\n\nSystem: Hi\n\nUser: Hi\n\nAssistant:")


@pytest.mark.parametrize("choice", [None, "auto", "required", {"type": "function", "function": {"name": "add"}}])
def test_a_tool_is_called_and_its_result_used(knowing, choice) -> None:
    options = {"tools": TOOLS} | ({"tool_choice": choice} if choice else {})
    answer = ask(knowing, SUM, max_tokens=200, **options).choices[0]
    assert answer.finish_reason == "tool_calls"
    [call] = answer.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "add"
    assert set(json.loads(call.function.arguments)) == {"a", "b"}
    streamed = joined(ask(knowing, SUM, max_tokens=200, stream=True, **options))
    assert streamed["finishes"] == ["tool_calls"]
    [whole] = streamed["calls"]
    assert (whole.index, whole.function.model_dump()) == (0, call.function.model_dump())
    if choice in (None, "auto"):
        assert json.loads(call.function.arguments) == {"a": 1, "b": 2}
        assert answer.message.content == streamed["text"] == "I add."
    history = [
        *SUM,
        {
            "role": "assistant",
            "content": "I add.",
            "tool_calls": [
                {"id": call.id, "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
            ],
        },
        {"role": "tool", "tool_call_id": call.id, "content": "3"},
    ]
    assert ask(knowing, history, tools=TOOLS).choices[0].message.content == "It is 3."


def test_a_message_goes_back_as_the_client_got_it(knowing) -> None:
    got = ask(knowing, SUM, tools=TOOLS).choices[0].message
    history = [*SUM, got, {"role": "tool", "tool_call_id": got.tool_calls[0].id, "content": "3"}]
    assert ask(knowing, history, tools=TOOLS).choices[0].message.content == "It is 3."


def test_without_tools_json_is_text(knowing) -> None:
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        message = ask(knowing, [{"role": "user", "content": "Go"}], **options).choices[0].message
        assert message.content == "```json\n[1]\n```"
        assert message.tool_calls is None


def test_thoughts_stand_apart(knowing) -> None:
    asked = [{"role": "user", "content": "Why"}]
    message = ask(knowing, asked, reasoning_effort="low").choices[0].message
    assert (message.reasoning_content, message.content) == ("One.\n\nTwo.", "Because.\nSo.")
    streamed = joined(ask(knowing, asked, reasoning_effort="low", stream=True))
    assert (streamed["thoughts"], streamed["text"]) == ("One.\n\nTwo.", "Because.\nSo.")
    quick = ask(knowing, asked, reasoning_effort="minimal", max_tokens=1)
    assert quick.usage.prompt_tokens == len("User: Why\n\nAssistant: <think>\n</think")


def test_an_answer_has_the_form_of_a_schema(knowing) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["big", "small"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["size", "n"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    answers = ask(knowing, response_format=wanted, n=4, temperature=2, seed=1, max_tokens=300)
    for choice in answers.choices:
        thing = json.loads(choice.message.content)
        assert set(thing) == {"size", "n"}
        assert thing["size"] in ("big", "small")
        assert 0 <= thing["n"] <= 99
        assert choice.finish_reason == "stop"
    text = joined(ask(knowing, response_format=wanted, stream=True, max_tokens=300))["text"]
    assert set(json.loads(text)) == {"size", "n"}
    assert ask(knowing, response_format={"type": "json_object"}, max_tokens=5).choices[0].message.content[0] == "{"
    assert ask(knowing, response_format={"type": "text"}).choices[0].message.content == HELLO


def test_an_answer_has_any_other_form(knowing) -> None:
    forms = {
        "regex": ("[0-9]{3}-[a-f]", r"[0-9]{3}-[a-f]"),
        "choice": (["yes", "no"], "yes|no"),
        "grammar": ('root ::= "(" side ")"\nside ::= "left" | "right"', r"\((left|right)\)"),
        "json": ({"type": "integer", "minimum": 0, "maximum": 9}, "[0-9]"),
    }
    for kind, (form, expected) in forms.items():
        extra = {"structured_outputs": {kind: form}}
        assert re.fullmatch(expected, ask(knowing, extra_body=extra, max_tokens=300).choices[0].message.content), kind
        plain = knowing.client.completions.create(model="clerk", prompt="Is it?", max_tokens=300, extra_body=extra)
        assert re.fullmatch(expected, plain.choices[0].text), kind
    for wrong in ({}, {"regex": "a", "choice": ["a"]}, {"regex": "(("}, {"grammar": "root ::= absent"}, {"other": 1}):
        with pytest.raises(openai.BadRequestError):
            ask(knowing, extra_body={"structured_outputs": wrong})
    with pytest.raises(openai.BadRequestError, match="exclude each other"):
        ask(knowing, response_format={"type": "json_object"}, extra_body={"structured_outputs": {"regex": "a"}})


def test_log_probabilities(knowing, clerk) -> None:
    content = ask(knowing, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert "".join(token.token for token in content) == f" {HELLO}"
    assert all(bytes(token.bytes).decode() == token.token for token in content)
    streamed = ask(knowing, logprobs=True, top_logprobs=3, stream=True)
    again = [
        token for chunk in streamed for choice in chunk.choices if choice.logprobs for token in choice.logprobs.content
    ]
    assert [token.token for token in again] == [token.token for token in content]
    model, vocabulary = open_model(clerk, device="cpu")
    prompt = vocabulary.encode("User: Hi\n\nAssistant:")
    tokens = prompt + vocabulary.encode(f" {HELLO}")
    with torch.inference_mode():
        expected = model(torch.tensor([tokens]))[0][0].log_softmax(-1)
    for place, token in enumerate(content, len(prompt)):
        row = expected[place - 1]
        assert token.logprob == pytest.approx(float(row[tokens[place]]), abs=1e-4)
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
    assert ask(knowing, logprobs=True, max_tokens=1).choices[0].logprobs.content[0].top_logprobs == []


def test_lengths_and_stops(knowing) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        choice = ask(knowing, **{name: 6}).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("Hello", "length")
    for stop in ("世", ["xyz", ", "]):
        choice = ask(knowing, stop=stop).choices[0]
        assert choice.finish_reason == "stop"
        assert choice.message.content == HELLO.partition(stop if isinstance(stop, str) else ", ")[0]
    banned = ask(knowing, logit_bias={str(token): -100 for token in range(60, 90)}).choices[0].message.content
    assert banned != HELLO


def test_seeds_repeat_an_answer(babbling) -> None:
    def texts(seed: int) -> list[str]:
        wild = {"temperature": 2, "top_p": 1, "max_tokens": 20, "n": 3, "seed": seed}
        answer = babbling.client.chat.completions.create(model="babbler", messages=HI, **wild)
        assert answer.usage.prompt_tokens == len("User: Hi\n\nAssistant:")
        return [choice.message.content for choice in answer.choices]

    first, same, after = texts(5), texts(5), texts(6)
    assert first == same
    assert len(set(first)) == 3
    assert first[1:] == after[:2], "the choices have seeds in a row"


def test_several_choices_in_one_stream(knowing) -> None:
    texts = ["", "", ""]
    finishes = {}
    for chunk in ask(knowing, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                finishes[choice.index] = choice.finish_reason
    assert texts == [HELLO] * 3
    assert finishes == dict.fromkeys(range(3), "stop")


def test_a_conversation_reads_only_what_is_new(knowing) -> None:
    messages = [{"role": "user", "content": "Is this long enough to be worth keeping?"}]
    first = ask(knowing, messages, max_tokens=8)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, *HI]
    usage = ask(knowing, messages, max_tokens=8).usage
    assert usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    assert usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_plain_completions(knowing, clerk) -> None:
    complete = knowing.client.completions.create
    prompt = "User: Hi\n\nAssistant:"
    answer = complete(model="clerk", prompt=prompt, stop="\n\n", max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (f" {HELLO}", "stop")
    assert answer.object == "text_completion"
    assert complete(model="clerk", prompt=prompt).usage.completion_tokens == 16, "the length that OpenAI gives"
    stream = list(complete(model="clerk", prompt=prompt, stop="\n\n", max_tokens=50, stream=True))
    assert "".join(choice.text for chunk in stream for choice in chunk.choices) == f" {HELLO}"
    assert stream[-1].choices[0].finish_reason == "stop"
    _model, vocabulary = open_model(clerk, device="cpu")
    several = complete(model="clerk", prompt=[vocabulary.encode(prompt), vocabulary.encode("User: G")], n=2, echo=True)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text
    assert several.choices[0].text.startswith(prompt + " Hello")
    assert several.choices[2].text.startswith("User: Go")
    assert several.usage.prompt_tokens == len(prompt) + len("User: G")
    assert complete(model="clerk", prompt="").usage.prompt_tokens == 1


def test_log_probabilities_of_plain_completions(knowing) -> None:
    choice = knowing.client.completions.create(
        model="clerk", prompt="User: Hi\n\nAssistant:", max_tokens=5, logprobs=2
    ).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text == " Hell"
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == max(top.values()) == value


def test_log_probabilities_of_a_prompt(knowing, clerk) -> None:
    model, vocabulary = open_model(clerk, device="cpu")
    prompt = vocabulary.encode("User: Hi\n\nAssistant: Hello, 世界!" + 70 * " Hi")
    asked = {"model": "clerk", "prompt": [prompt, prompt[:5]], "echo": True, "logprobs": 2, "max_tokens": 1}
    first, second = knowing.client.completions.create(**asked).choices
    assert first.text.startswith(vocabulary.decode(prompt))
    with torch.inference_mode():
        expected = model(torch.tensor([prompt]))[0][0].log_softmax(-1)
    found = first.logprobs
    assert len(found.tokens) == len(prompt) + 1, "the prompt and what was added"
    assert "".join(found.tokens) == first.text
    assert found.text_offset == list(range(len(first.text)))
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    given = expected[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert found.token_logprobs[1:-1] == pytest.approx(given.tolist(), abs=1e-4)
    for top, row in zip(found.top_logprobs[1:], expected, strict=True):
        assert sorted(top.values(), reverse=True) == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    assert second.logprobs.token_logprobs[1:5] == pytest.approx(found.token_logprobs[1:5], abs=1e-4)
    only = knowing.client.completions.create(**asked | {"max_tokens": 0})
    assert [choice.text for choice in only.choices] == [vocabulary.decode(prompt), "User:"]
    assert only.choices[0].logprobs.token_logprobs[1:] == pytest.approx(found.token_logprobs[1:-1], abs=1e-4)
    assert only.choices[0].finish_reason == "length"
    assert only.usage.completion_tokens == 0
    chunks = list(knowing.client.completions.create(**asked | {"prompt": prompt, "stream": True}))
    streamed = [value for chunk in chunks if chunk.choices[0].logprobs for value in chunk.choices[0].logprobs.tokens]
    assert streamed == found.tokens


def test_the_end_of_a_document_is_counted_among_the_tokens(knowing) -> None:
    """lm-eval asks for one token more than it wants to know of, and leaves the last one out, whatever it is."""
    prompt = "User: Hi\n\nAssistant: Hello, 世界! 🐦\n\n"
    asked = {"model": "clerk", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 1}
    choice = knowing.client.completions.create(**asked, logit_bias={"0": 100}).choices[0]
    assert (choice.text, choice.finish_reason) == (prompt, "stop")
    assert len(choice.logprobs.tokens) == len(prompt) + 1
    assert choice.logprobs.tokens[-1] == ""
    [plain] = knowing.client.completions.create(**asked | {"echo": False}, logit_bias={"0": 100}).choices
    assert len(plain.logprobs.token_logprobs) == 1


def test_embeddings(knowing, clerk) -> None:
    texts = ["Hi", "User: Go"]
    answer = knowing.client.embeddings.create(model="clerk", input=texts, encoding_format="float")
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (10, 10)
    model, vocabulary = open_model(clerk, device="cpu")
    for text, entry in zip(texts, answer.data, strict=True):
        with torch.inference_mode():
            hidden, _state = model.hidden(torch.tensor([vocabulary.encode(text)]), None)
        expected = torch.nn.functional.normalize(hidden[0].mean(0), dim=0)
        assert entry.embedding == pytest.approx(expected.tolist(), abs=1e-5)
    assert [entry.index for entry in answer.data] == [0, 1]
    # The client asks for base64 when nothing is said, and decodes it.
    assert knowing.client.embeddings.create(model="clerk", input="Hi").data[0].embedding == pytest.approx(
        answer.data[0].embedding
    )
    raw = knowing.http.post("/v1/embeddings", json={"input": vocabulary.encode("Hi"), "encoding_format": "base64"})
    vector = np.frombuffer(base64.b64decode(raw.json()["data"][0]["embedding"]), "<f4")
    assert vector.tolist() == pytest.approx(answer.data[0].embedding)
    assert math.hypot(*vector) == pytest.approx(1)


def test_models(knowing) -> None:
    assert [model.id for model in knowing.client.models.list()] == ["clerk"]
    assert knowing.client.models.retrieve("clerk").object == "model"
    with pytest.raises(openai.NotFoundError):
        knowing.client.models.retrieve("gpt-4")


WRONG = [
    ({"model": "gpt-4"}, openai.NotFoundError, "model", "model_not_found"),
    ({"n": 0}, openai.BadRequestError, "n", None),
    ({"temperature": 3}, openai.BadRequestError, "temperature", None),
    ({"max_tokens": 5000}, openai.BadRequestError, "max_tokens", None),
    ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs", None),
    ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice", None),
    ({"messages": []}, openai.BadRequestError, "messages", None),
    ({"messages": [{"role": "user", "content": "日"}]}, openai.BadRequestError, None, None),
    ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature", "unknown_parameter"),
    ({"stop": ["a"] * 17}, openai.BadRequestError, "stop", None),
    ({"messages": [{"role": "user"}]}, openai.BadRequestError, "messages.0.content", None),
    ({"extra_body": {"state": "nobody"}}, openai.BadRequestError, None, None),
    ({"extra_body": {"adapter": "nobody"}}, openai.BadRequestError, None, None),
    ({"logit_bias": {"4000": 1}}, openai.BadRequestError, None, None),
    ({"n": 128}, openai.BadRequestError, None, None),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
        openai.BadRequestError,
        None,
        None,
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}]},
        openai.BadRequestError,
        "messages.0.content.0.type",
        None,
    ),
]


@pytest.mark.parametrize(("change", "error", "param", "code"), WRONG, ids=[next(iter(case[0])) for case in WRONG])
def test_what_is_wrong_is_told_in_openais_form(knowing, change, error, param, code) -> None:
    with pytest.raises(error) as caught:
        knowing.client.chat.completions.create(**({"model": "clerk", "messages": HI} | change))
    body = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"
    assert (body["param"], body["code"]) == (param, code)
    assert len(body["message"]) < 500


@pytest.mark.parametrize(
    "change", [{"suffix": "x"}, {"best_of": 3}, {"max_tokens": -1}, {"prompt": [[]]}, {"prompt": [4000]}]
)
def test_what_plain_completions_cannot_do(knowing, change) -> None:
    with pytest.raises(openai.BadRequestError):
        knowing.client.completions.create(**({"model": "clerk", "prompt": "Hi"} | change))


def test_the_right_alternative_is_complained_of(knowing) -> None:
    answer = knowing.http.post("/v1/completions", json={"prompt": ["a"] * 200})
    assert answer.json()["error"]["message"] == "prompt: List should have at most 128 items after validation, not 200"
    answer = knowing.http.post("/v1/completions", content=b'{"prompt": "a"}')
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_fields_that_are_null_say_nothing(knowing) -> None:
    fields = dict.fromkeys(("functions", "function_call", "prediction", "stop", "tools", "n", "temperature"))
    answer = knowing.http.post("/v1/chat/completions", json={"messages": HI} | fields)
    assert answer.json()["choices"][0]["message"]["content"] == HELLO


def test_embeddings_of_another_size_cannot_be_had(knowing) -> None:
    with pytest.raises(openai.BadRequestError, match="64 dimensions"):
        knowing.client.embeddings.create(model="clerk", input="Hi", dimensions=32)


def test_unknown_paths_and_methods(knowing) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("PUT", "/v1/models", 405), ("GET", "/docs", 404)):
        answer = knowing.http.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "/v1/nothing; /openapi.json" in knowing.http.get("/v1/nothing").json()["error"]["message"]
    head = knowing.http.head("/health")
    assert (head.status_code, head.content) == (200, b"")


def test_monitoring(knowing) -> None:
    before = knowing.figures()
    ask(knowing)
    after = knowing.wait_until(slots_active=0, accepted=0)
    for name, more in {
        'rookery_requests_total{route="/v1/chat/completions",status="200"}': 1,
        "rookery_answers_total": 1,
        "rookery_prompt_tokens_total": len("User: Hi\n\nAssistant:"),
        "rookery_completion_tokens_total": len(f" {HELLO}\n\n"),
        "rookery_first_token_seconds_count": 1,
        'rookery_answer_seconds_bucket{le="+Inf"}': 1,
    }.items():
        assert after[name] - before.get(name, 0) == more, name
    assert after["rookery_slots"] == 32
    assert knowing.http.get("/health").json() == {
        "status": "ok",
        "model": "clerk",
        "slots": 32,
        "active": 0,
        "waiting": 0,
    }


def test_answers_are_those_of_the_library(babbling, babbler) -> None:
    model, vocabulary = open_model(babbler, device="cpu")
    sampling = Sampling(temperature=0, alpha_presence=0, alpha_frequency=0, max_tokens=30, token_stop=())
    for prompt in ("a", "What is it?"):
        expected = "".join(generate(model, vocabulary, vocabulary.encode(prompt), sampling))
        answer = babbling.client.completions.create(model="babbler", prompt=prompt, max_tokens=30)
        assert answer.choices[0].text == expected
    assert rookery.__version__ in answer.system_fingerprint


def test_the_package_needs_no_client_library(knowing, clerk) -> None:
    """What the greeting tells to try works as it is."""
    assert knowing.greeting[2] == f"Weights: {clerk / 'rwkv-final.pth'}\n"
    command = knowing.greeting[1]
    assert command.startswith(f"curl {knowing.url}/v1/chat/completions")
    body = json.loads(command.partition("-d '")[2].rstrip("'\n"))
    answer = httpx.post(f"{knowing.url}/v1/chat/completions", json=body)
    assert answer.json()["choices"][0]["message"]["content"]
