"""Who may ask, from where, and how much."""

from __future__ import annotations

import json
import socket
import subprocess
import time

import httpx
import pytest
from serving import COMMAND, ENVIRONMENT, Server

HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
KEYS = ("a key that nobody guesses", "another key, quite as long")


def refused(*words: object) -> str:
    """What the command says when it will not start."""
    done = subprocess.run(
        [*COMMAND, *map(str, words)], capture_output=True, encoding="utf-8", env=ENVIRONMENT, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def test_other_machines_need_a_key_or_a_word(babbler, tmp_path) -> None:
    assert "--no-auth" in refused(babbler, "--host", "0.0.0.0")
    assert "16 characters" in refused(babbler, "--host", "0.0.0.0", "--api-key", "secret")
    (tmp_path / "empty").write_text("\n \n", encoding="utf-8")
    assert "holds no key" in refused(babbler, "--api-key-file", tmp_path / "empty")
    assert "nowhere" in refused(babbler, "--api-key-file", tmp_path / "nowhere")


def test_a_port_that_is_taken(babbler) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        begun = time.process_time()
        assert f"127.0.0.1:{port}" in refused(babbler, "--port", port)
        assert time.process_time() - begun < 5


def test_wrong_words_on_the_command_line(babbler, tmp_path) -> None:
    assert "is no folder" in refused(babbler, "--states-dir", tmp_path / "none")
    assert "--think" in refused(babbler, "--think", "hard")
    assert "nothing.pth" in refused(babbler, "--state", "x=nothing.pth", "--port", "0")
    assert "letters" in refused(babbler, "--state", "a b=nothing.pth", "--port", "0")


@pytest.fixture(scope="module")
def locked(babbler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys").write_text("\n".join(KEYS) + "\n", encoding="utf-8")
    server = Server(babbler, "--host", "0.0.0.0", "--api-key-file", folder / "keys", log=folder / "log", key=KEYS[0])
    yield server
    assert server.end() == 0
    assert server.errors == ""


def test_a_key_is_asked_for(locked) -> None:
    assert "Bearer KEY" in locked.greeting[1]
    assert "127.0.0.1" in locked.url
    wrong = [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEYS[0]}"},
        {"Authorization": f"Bearer {KEYS[0]}x"},
        {"Authorization": f"Bearer {KEYS[0][:-1]}"},
        {"Authorization": b"Bearer \xff\xfe"},
        {"X-Api-Key": KEYS[0]},
    ]
    for headers in wrong:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/states", "/nothing"):
            answer = httpx.get(locked.url + path, headers=headers)
            assert answer.status_code == 401, (headers, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    assert httpx.post(f"{locked.url}/v1/chat/completions", json=HI).status_code == 401
    assert httpx.get(f"{locked.url}/health").status_code == 200
    for key in KEYS:
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{locked.url}/v1/models", headers=headers).status_code == 200
        assert httpx.post(f"{locked.url}/v1/chat/completions", headers=headers, json=HI).status_code == 200
    # Where a key is needed, the name by which the server is reached does not matter.
    named = {"Host": "rookery.example", "Authorization": f"Bearer {KEYS[0]}"}
    assert httpx.get(f"{locked.url}/v1/models", headers=named).status_code == 200


def test_another_sites_name_does_not_lead_here(babbling) -> None:
    """DNS rebinding: the browser believes that evil.example is this machine."""
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1", "localhost.evil"):
        answer = babbling.http.get("/v1/models", headers={"Host": host})
        assert answer.status_code in (400, 403), host
    port = babbling.url.rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert babbling.http.get("/v1/models", headers={"Host": host}).status_code == 200, host


def test_pages_of_other_sites_may_not_ask(babbling) -> None:
    for origin in ("https://evil.example", "null", "http://localhost:1", "http://[bad"):
        plain = {"Origin": origin, "Content-Type": "text/plain"}
        answer = babbling.http.post("/v1/states", headers=plain, content='{"name": "x", "file": "poet.pth"}')
        assert answer.status_code == 403, origin
        assert answer.json()["error"]["code"] == "unknown_origin"
        assert "access-control-allow-origin" not in answer.headers
        asked = babbling.http.options("/v1/models", headers={"Origin": origin, "Access-Control-Request-Method": "GET"})
        assert asked.status_code == 403
    own = babbling.http.get("/v1/models", headers={"Origin": babbling.url})
    assert own.status_code == 200


def test_a_site_that_is_allowed(serve, babbler) -> None:
    site = "https://chat.example"
    server = serve(babbler, "--allow-origin", site, "--allow-host", "rookery.lan", "--api-key", KEYS[0], key=KEYS[0])
    wanted = {
        "Origin": site,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    before = httpx.options(f"{server.url}/v1/chat/completions", headers=wanted)
    assert before.status_code == 200
    assert before.headers["access-control-allow-origin"] == site
    answer = server.http.post("/v1/chat/completions", headers={"Origin": site, "Host": "rookery.lan"}, json=HI)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == site
    assert httpx.post(f"{server.url}/v1/chat/completions", headers={"Origin": site}, json=HI).status_code == 401
    assert server.http.get("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403


def test_bodies_that_are_too_large(babbling) -> None:
    """The limit of this server is 1 MB."""
    text = json.dumps({"messages": [{"role": "user", "content": "x" * 2_000_000}]}).encode()
    for content in (text, iter([text[:1000], text[1000:]])):
        answer = babbling.http.post(
            "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


def test_prompts_that_are_too_long(babbling) -> None:
    """The limit of this server is 300 tokens."""
    answer = babbling.http.post("/v1/completions", json={"prompt": "x" * 301, "max_tokens": 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert babbling.http.post("/v1/completions", json={"prompt": "x" * 300, "max_tokens": 1}).status_code == 200


BROKEN = [
    b"",
    b"{",
    b"null",
    b"[1]",
    b"\xff\xfe",
    b'"text"',
    b"[" * 50_000,
    b'{"messages": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": 1e999}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "seed": 99999999999999999999999}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": true}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "stop": ""}',
    b'{"messages": [{"role": "assistant"}, {"role": "robot", "content": "Hi"}]}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "tools": [{"type": "function", "function": {"name": "f", '
    b'"parameters": {"properties": [1]}}}]}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "tools": [{"type": "function", "function": {"name": "f", '
    b'"parameters": {"properties": {"\\ud800": {}}}}}]}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "response_format": {"type": "json_schema", "json_schema": '
    b'{"name": "x", "schema": ' + b'{"items": ' * 800 + b"{}" + b"}" * 800 + b"}}}",
]


@pytest.mark.parametrize("body", BROKEN, ids=range(len(BROKEN)))
def test_broken_bodies(babbling, body: bytes) -> None:
    answer = babbling.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
