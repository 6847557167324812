"""Clients that go away, too many clients, too little time, and the end of the server."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time

import httpx
import openai
import pytest

from rookery.infer import Engine, Sampling, open_form
from rookery.serve.app import create_app
from rookery.serve.mounts import Mounts
from rookery.serve.prompts import Prompter
from rookery.serve.server import Server
from rookery.serve.service import Limits, Service

LONG = {"model": "babbler", "prompt": "Once", "max_tokens": 3000}


def stream(server, **change):
    """Begin an answer and wait for its first piece."""
    answer = server.client.completions.create(**(LONG | {"stream": True} | change))
    return answer, [next(answer)]


def text_of(chunks) -> str:
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)


def test_a_client_that_goes_away_frees_its_slot(serve, babbler) -> None:
    server = serve(babbler, "--name", "babbler", "--max-tokens", "1000000", "--slots", "2", "--queue", "2")
    forever = LONG | {"max_tokens": 1000000}
    for round_ in range(2):
        streams = [stream(server, max_tokens=1000000)[0] for _n in range(2)]
        # Two more wait in the queue: one a stream, one not.
        waiting = post(server, forever | {"stream": True})
        silent = post(server, forever)
        server.wait_until(slots_active=2, queue=2)
        waiting.close()
        silent.close()
        server.wait_until(slots_active=2, queue=0, accepted=2)
        streams[0].close()
        server.wait_until(slots_active=1, accepted=1)
        streams[1].close()
        figures = server.wait_until(slots_active=0, accepted=0)
        assert figures["rookery_abandoned_total"] == 4 * (round_ + 1)
    # One that waits for a whole answer, in a slot.
    silent = post(server, forever)
    server.wait_until(slots_active=1)
    silent.close()
    server.wait_until(slots_active=0, accepted=0)
    assert server.client.completions.create(**(LONG | {"max_tokens": 3})).usage.completion_tokens == 3
    assert server.errors == ""


def post(server, body: dict) -> socket.socket:
    """Send a request and do not wait for the answer."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
    return connection


def test_a_full_server_refuses_at_once_and_finishes_what_it_took(serve, babbler) -> None:
    server = serve(babbler, "--name", "babbler", "--slots", "1", "--queue", "1")
    alone = server.client.completions.create(**LONG).choices[0].text
    running, chunks = stream(server)
    waited: list[str] = []
    thread = threading.Thread(target=lambda: waited.append(server.client.completions.create(**LONG).choices[0].text))
    thread.start()
    server.wait_until(accepted=2)
    for body in (LONG, LONG | {"stream": True}):
        begun = time.monotonic()
        with pytest.raises(openai.RateLimitError) as caught:
            server.client.completions.create(**body)
        assert time.monotonic() - begun < 2
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.body["code"] == "queue_full"
        assert caught.value.body["type"] == "rate_limit_error"
    assert server.http.post("/v1/embeddings", json={"input": "x"}).status_code == 429
    assert text_of([*chunks, *running]) == alone
    thread.join()
    assert waited == [alone]
    assert server.figures()["rookery_refused_total"] == 3
    assert server.client.completions.create(**(LONG | {"max_tokens": 2})).usage.completion_tokens == 2
    # More than there ever is room for: another time would not help.
    with pytest.raises(openai.BadRequestError):
        server.client.completions.create(**(LONG | {"n": 3}))


def test_time_is_limited(serve, babbler) -> None:
    server = serve(babbler, "--name", "babbler", "--slots", "1", "--timeout", "1.5", "--max-tokens", "1000000")
    endless = LONG | {"max_tokens": 1000000}
    chunks = list(server.client.completions.create(**endless, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"
    assert 10 < len(text_of(chunks)) < 1000000
    # Of two, one never gets the slot.
    with pytest.raises(openai.InternalServerError) as caught:
        server.client.completions.create(**endless, n=2)
    assert caught.value.status_code == 503
    assert caught.value.body["code"] == "timeout"
    with pytest.raises(openai.APIError, match="waited too long"):
        list(server.client.completions.create(**endless, n=2, stream=True))
    server.wait_until(slots_active=0, queue=0, accepted=0)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_a_signal_lets_running_answers_finish(serve, babbler) -> None:
    server = serve(babbler, "--name", "babbler", "--slots", "1")
    alone = server.client.completions.create(**LONG).choices[0].text
    running, chunks = stream(server)
    waiting = server.client.completions.create(**(LONG | {"stream": True, "max_tokens": 1000}))
    server.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + 10
    while server.http.get("/health").json()["status"] != "draining":
        assert time.monotonic() < end
    assert server.http.get("/health").status_code == 503
    with pytest.raises(openai.InternalServerError) as caught:
        server.client.completions.create(**LONG)
    assert (caught.value.status_code, caught.value.body["code"]) == (503, "draining")
    assert caught.value.response.headers["retry-after"]
    assert server.http.post("/v1/states", json={"name": "x", "file": "x"}).status_code == 503
    assert text_of([*chunks, *running]) == alone
    assert text_of(waiting) == alone[:1000]
    assert server.wait() == 0
    assert server.errors == ""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_the_end_does_not_wait_for_ever(serve, babbler) -> None:
    server = serve(babbler, "--name", "babbler", "--max-tokens", "1000000", "--drain", "0.5")
    running, chunks = stream(server, max_tokens=1000000)
    server.process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    chunks += running
    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.wait() == 0
    assert 0.4 < time.monotonic() - begun < 10


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_a_second_signal_cuts_answers_short(serve, babbler) -> None:
    server = serve(babbler, "--name", "babbler", "--max-tokens", "1000000", "--drain", "600")
    running, chunks = stream(server, max_tokens=1000000)
    server.process.send_signal(signal.SIGINT)
    end = time.monotonic() + 10
    while server.http.get("/health").json()["status"] != "draining":
        assert time.monotonic() < end
    server.process.send_signal(signal.SIGINT)
    chunks += running
    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.wait() == 0


def test_clients_that_say_nothing_do_not_keep_their_connection(babbler) -> None:
    form, vocabulary = open_form(babbler, device="cpu")
    sampling = Sampling(temperature=0, alpha_presence=0, alpha_frequency=0, max_tokens=100000)
    engine = Engine(form.model, vocabulary, form=form).start()
    nothing = Mounts(lambda name, file: None, lambda name: None, None, "")
    service = Service(engine, "m", Prompter(vocabulary, sampling), Limits(body_seconds=0.5), nothing, nothing)
    server = Server(create_app(service), service)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve_on, args=(listener,))
    thread.start()
    try:
        place = listener.getsockname()
        with socket.create_connection(place) as mute, socket.create_connection(place) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nX: ")
            with httpx.Client(base_url="http://{}:{}".format(*place), timeout=30) as client:
                asked = {"prompt": "a", "max_tokens": 100000, "stream": True}
                with client.stream("POST", "/v1/completions", json=asked) as answer:
                    begun, pieces = time.monotonic(), answer.iter_lines()
                    for connection in (mute, slow):
                        connection.settimeout(20)
                        assert connection.recv(100) == b"", "closed by the server"
                    while time.monotonic() < begun + 3:
                        assert next(pieces) is not None, "who gets an answer keeps the connection"
    finally:
        server.should_exit = True
        thread.join()
        engine.close(drain=False)
