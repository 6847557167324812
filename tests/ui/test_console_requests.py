"""What the console's server answers, and what it refuses."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from console import running_console

from rookery.cli.ui import listen
from rookery.errors import UserError
from rookery.i18n import catalogue
from rookery.ui import failures


def test_a_page_of_another_site_can_change_nothing(console) -> None:
    """By a form, by a script, or by a name that leads here."""
    refused = [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"X-Rookery": ""},
    ]
    for headers in refused:
        status, answer = console.ask("api/settings", {"theme": "dark"}, headers)
        assert status == 403, headers
        assert "does not come from a page" in answer["error"]
    assert console.ask("api/hello")[1]["settings"]["theme"] == "auto"
    own = {"Origin": console.address.rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    assert console.ask("api/settings", {"theme": "dark"}, own)[1]["theme"] == "dark"
    assert console.ask("api/settings", {"theme": "auto"})[0] == 200


@pytest.mark.parametrize("name", ["evil.example", "127.0.0.1.evil.example", "10.0.0.8", ""])
def test_it_answers_to_its_own_name_only(console, name: str) -> None:
    host, port = console.address.removeprefix("http://").rstrip("/").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.putrequest("GET", "/api/hello", skip_host=True)
    connection.putheader("Host", f"{name}:{port}" if name else "")
    connection.endheaders()
    assert connection.getresponse().status in (400, 403)
    connection.close()


def test_another_address_needs_the_token(folder) -> None:
    folder.mkdir(exist_ok=True)
    with running_console(folder, "--host", "0.0.0.0", "--token", "s3cret-but-long") as console:
        assert console.address.endswith("?token=s3cret-but-long")
        port = console.address.rpartition(":")[2].partition("/")[0]
        console.address = f"http://127.0.0.1:{port}/?token=s3cret-but-long"
        assert console.ask("api/hello")[0] == 200
        assert console.ask("api/hello", headers={"Cookie": ""})[0] == 401
        assert console.ask("api/hello", headers={"Cookie": "rookery_token=guess"})[0] == 401
        assert console.ask("static/main.js", headers={"Cookie": ""})[0] == 401
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
        connection.request("GET", "/?token=s3cret-but-long")
        response = connection.getresponse()
        cookie = response.getheader("Set-Cookie") or ""
        connection.close()
        assert response.status == 303
        assert "HttpOnly" in cookie
        assert "samesite=strict" in cookie.lower()
        status, answer = console.ask("api/settings", {"folders": [str(folder.parent)]})
        assert status == 400, "folders are not added from afar"
        assert "--folder" in answer["error"]


def test_paths_outside_the_folders_are_refused(console, folder) -> None:
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret.txt").write_text("x", encoding="utf-8")
    with suppress(OSError):  # Windows without the right to make links
        (folder / "way-out").symlink_to(outside, target_is_directory=True)
    for path in ("..", "/etc", str(outside), "way-out", f"{folder}/../outside/secret.txt"):
        if path == "way-out" and not (folder / "way-out").exists():
            continue
        assert console.ask(f"api/files?path={path}")[0] == 403, path
        assert console.ask(f"api/data/preview?path={path}")[0] == 403, path
        assert console.ask("api/runs/delete", {"run": path})[0] == 403, path
        assert console.ask("api/models/merge", {"base": path, "adapter": path, "output": "x.pth"})[0] == 403, path
        assert console.ask("api/servers/start", {"model": path})[0] == 403, path
        assert console.ask("api/train/start", {"proj_dir": path, "data_file": "x"})[0] == 403, path
    assert console.ask("api/files?path=%00")[0] == 403


def test_runs_are_found_wherever_they_were_started(console, folder, make_run) -> None:
    path = make_run("by-hand", started=time.time(), pid=os.getpid())
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "config.toml").write_text("[model]\n", encoding="utf-8")
    found = console.wait("api/runs/config?run=out/by-hand", lambda answer: "values" in answer)
    assert found["values"] == {"ctx_len": "8"}
    metrics = console.ask(f"api/runs/metrics?run={path}&first=10&last=12")[1]
    assert metrics["step"] == [10, 11, 12]
    assert console.ask("api/runs/metrics?run=deep/er")[0] == 400, "a recipe alone is no run"
    assert {entry["name"] for entry in console.ask(f"api/runs/contents?run={path}")[1]} >= {
        "checkpoints/",
        "config.toml",
    }


def test_events_tell_of_runs_and_of_the_one_that_is_watched(console, make_run) -> None:
    path = make_run("watched", exit_reason="trained", loss=0.1, total_steps=30, progress=1.0)
    (path / "console.log").write_text("first line\n第二行\n", encoding="utf-8")
    console.ask("api/settings", {"folders": []})  # looks for runs now
    events = console.events(f"run={path}&count=28&generation=0")
    summary = events["runs"][str(path)]
    assert (summary["phase"], summary["step"], summary["method"]) == ("done", 30, "pretrain")
    assert len(summary["spark"]) == 30
    assert events["run"]["steps"]["step"] == [29, 30]
    assert events["run"]["log"]["text"] == "first line\n第二行\n"
    assert events["machine"]["memory"] > events["machine"]["free"] > 0


@pytest.mark.parametrize(
    ("phase", "reason", "code"),
    [
        ("failed", "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "RK301"),
        ("failed", "no training data: give data_file", "RK101"),
        ("failed", catalogue()["no training data: give data_file"], "RK101"),
        ("failed", "out cannot be written: [Errno 28] No space left on device. Make room", "RK303"),
        ("failed", "something nobody has seen", "RK900"),
        ("training", "", "RK504"),
    ],
)
def test_a_failed_run_has_a_code_in_any_language(console, make_run, phase: str, reason: str, code: str) -> None:
    path = make_run(f"{code}-{len(reason)}", phase=phase, exit_reason=reason, pid=2**22 + 1, started=1.0)
    console.ask("api/settings", {"folders": []})
    summary = console.events()["runs"][str(path)]
    assert summary["phase"] == ("killed" if phase == "training" else "failed")
    assert summary["failure"]["code"] == code
    assert summary["failure"]["remedy"]


def test_a_run_of_another_machine_is_not_taken_for_dead(console, make_run) -> None:
    """Its process cannot be seen from here; what it wrote a moment ago can."""
    now = time.time()
    far = {"phase": "training", "pid": 2**22 + 1, "host": "another-machine", "started": now - 9000}
    lively, silent = make_run("lively", updated=now, **far), make_run("silent", updated=now - 3600, **far)
    console.ask("api/settings", {"folders": []})
    found = console.events()["runs"]
    assert found[str(lively)]["phase"] == "training"
    assert found[str(silent)]["phase"] == "killed"


def test_a_run_of_another_machine_is_believed_by_the_clock_of_this_one(console, make_run) -> None:
    """The other clock may go an hour ahead or behind: what counts is that something new was written."""
    far = {"phase": "training", "pid": 2**22 + 1, "host": "another-machine", "started": 1.0}
    late = make_run("late", updated=time.time() - 3600, **far)
    console.ask("api/settings", {"folders": []})
    assert console.events()["runs"][str(late)]["phase"] == "killed"
    status = {"updated": time.time() - 3599, **far}
    (late / "status.json").write_text(json.dumps(status), encoding="utf-8")
    assert console.events()["runs"][str(late)]["phase"] == "training"


def test_only_the_machine_of_a_run_can_stop_it(console, make_run) -> None:
    """The number of its process means another one here."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        now = time.time()
        path = make_run("far", phase="training", pid=bystander.pid, host="another-machine", started=now, updated=now)
        status, answer = console.ask("api/runs/stop", {"run": str(path)})
        assert status == 400
        assert "another machine, another-machine: stop it there" in answer["error"]
        assert bystander.poll() is None
        bystander.communicate(b"\n")


def test_a_run_that_is_gone_stops_nothing_else(console, make_run) -> None:
    path = make_run("shortly")
    assert "runs" in console.events(f"run={path.parent / 'nowhere'}")
    assert console.ask("api/runs/delete", {"run": str(path)})[0] == 200
    assert str(path) not in console.events(f"run={path}&count=30&generation=0")["runs"]


def test_a_status_that_makes_no_sense_harms_no_page(console, make_run) -> None:
    odd = make_run("odd", phase=3, started="yesterday", loss=float("nan"), eta=float("inf"), updated=None)
    (odd / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 1, "val_loss": NaN}\n', encoding="utf-8")
    broken = make_run("broken", phase="done")
    (broken / "status.json").write_text('{"phase": "trai', encoding="utf-8")
    console.ask("api/settings", {"folders": []})
    found = console.events()["runs"]
    assert (found[str(odd)]["phase"], found[str(odd)]["loss"]) == ("unknown", None)
    assert found[str(broken)]["phase"] == "unknown"
    assert console.ask(f"api/runs/metrics?run={odd}")[1]["validations"] == [[1, None]]


@pytest.mark.parametrize(("config", "code"), [("[model]\nload_model = 'm.pth'\n", ["RK701"]), ("[model]\n", [])])
def test_a_loss_above_5_is_warned_of_where_a_model_was_trained_before(console, make_run, config, code) -> None:
    path = make_run(f"high{len(code)}", steps=0, config=config)
    lines = "".join(json.dumps({"step": s, "loss": 9.0}) + "\n" for s in range(1, 21))
    (path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    console.ask("api/settings", {"folders": []})
    assert [warning["code"] for warning in console.events()["runs"][str(path)]["warnings"]] == code


def test_a_run_directory_is_never_written_over(console, make_run) -> None:
    path = make_run("used")
    before = (path / "config.toml").read_text(encoding="utf-8")
    status, answer = console.ask("api/train/start", {"data_file": "x.jsonl", "proj_dir": "out/used"})
    assert status == 400
    assert "holds a run already" in answer["error"]
    assert (path / "config.toml").read_text(encoding="utf-8") == before
    answer = console.ask("api/train/check", {"data_file": "x.jsonl", "proj_dir": "out/used"})[1]
    assert "holds a run already" in answer["fields"]["proj_dir"], "and the form says it beforehand"


def test_of_two_pages_that_start_the_same_run_one_does(console, folder) -> None:
    values = {"data_file": "nothing.jsonl", "proj_dir": "out/both", "n_layer": "1", "n_embd": "64"}
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda _page: console.ask("api/train/start", values)[0], range(4)))
    assert sorted(answers) == [200, 400, 400, 400]


def test_deleting_asks_for_a_run_and_takes_nothing_else(console, folder, make_run) -> None:
    path = make_run("old")
    (folder / "precious").mkdir()
    assert console.ask("api/runs/delete", {"run": "precious"})[0] == 400
    assert (folder / "precious").exists()
    busy = make_run("busy", phase="training", pid=os.getpid(), started=time.time())
    assert "is training" in console.ask("api/runs/delete", {"run": str(busy)})[1]["error"]
    assert console.ask("api/runs/delete", {"run": str(path)})[0] == 200
    assert not path.exists()
    assert busy.exists()


def test_settings_are_kept_and_nonsense_is_not(console, folder) -> None:
    more = folder.parent / "more"
    more.mkdir(exist_ok=True)
    kept = console.ask("api/settings", {"language": "zh", "folders": [str(more)], "theme": "purple"})[1]
    assert kept["language"] == "zh"
    assert kept["theme"] == "auto"
    assert str(more) in kept["folders"]
    assert "不是文件夹" in console.ask("api/settings", {"folders": [str(folder / "nothing")]})[1]["error"]
    stored = json.loads((folder.parent / "work-settings.json").read_text(encoding="utf-8"))
    assert stored == {"language": "zh", "theme": "auto", "folders": [str(more)]}
    assert console.ask("api/settings", {"language": "en", "folders": []})[0] == 200


@pytest.mark.parametrize("value", [None, 5, float("inf"), [5], {"a": 1}, "\0", "x" * 5000, "~nobody/at/home"])
def test_nonsense_is_refused_and_breaks_nothing(console, value: object) -> None:
    for path, name in (("settings", "folders"), ("runs/stop", "run"), ("train/check", "data_file"), ("files", "path")):
        status, _answer = console.ask(f"api/{path}", {name: value})
        assert 400 <= status < 500, path
    assert console.ask("api/settings", {"language": value, "theme": value})[1]["theme"] == "auto"


def test_a_long_log_is_understood_at_once() -> None:
    """Beginnings of what Rookery says, on a thousand lines."""
    log = "step 1/5  loss 3.2: rank 0 holds {\n" * 1000
    begun = time.process_time()
    assert failures.find(log).code == "RK900"
    assert time.process_time() - begun < 1


def test_the_console_never_loads_torch(folder) -> None:
    """It starts quickly and leaves the memory to training."""
    folder.mkdir(exist_ok=True)
    code = """
import sys
from pathlib import Path
from rookery.ui.app import create_app
from rookery.ui.console import Console
from rookery.ui.events import Changes
console = Console([Path(sys.argv[1])], Path(sys.argv[1]) / "none.json")
create_app(console)
Changes(console, None, 0, 0).collect()
console.places.listing("", "any")
print(sorted({"torch", "numba", "numpy", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_file_of_the_pages_is_in_the_package_and_none_comes_from_elsewhere(console) -> None:
    status, page = console.ask("")
    assert status == 200
    assert "https://" not in page
    for name in ("style.css", "main.js", "core.js", "pages/train.js", "vendor/preact.mjs", "vendor/uPlot.iife.min.js"):
        status, text = console.ask(f"static/{name}")
        assert status == 200, name
        if "vendor" not in name:
            assert "://" not in text.replace("http://www.w3.org", ""), name
    assert console.ask("static/../settings.py")[0] == 404


def test_a_taken_port_is_told(console) -> None:
    port = int(console.address.rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}: .*another --port"):
        listen("127.0.0.1", port)
