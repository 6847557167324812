"""The pages say what is so: of runs that were killed, deleted or changed behind their back, and without the console."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from console import running_console
from pages import show

POINTS = "points => document.querySelector('.chart')?.dataset.points === String(points)"
"""Whether a chart draws that many points."""


def write_run(folder: Path, name: str, steps: int) -> Path:
    """A run directory as the trainer leaves it."""
    run = folder / "out" / name
    run.mkdir(parents=True)
    (run / "config.toml").write_text("[data]\nctx_len = 8\n", encoding="utf-8")
    (run / "status.json").write_text(json.dumps({"phase": "done", "step": steps, "progress": 1.0}), encoding="utf-8")
    add_steps(run, 1, steps)
    return run


def add_steps(run: Path, first: int, last: int) -> None:
    lines = ({"step": s, "loss": 3 / s, "lr": 1e-3, "grad_norm": 0.5, "time": 1e9 + s} for s in range(first, last + 1))
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_run_that_is_dead_is_shown_dead_and_can_be_deleted(page, console, workspace) -> None:
    """Its status still says that it trains; `test_console_processes` kills a real one."""
    run = write_run(workspace, "dead", 20)
    status = {"phase": "training", "step": 20, "total_steps": 99, "pid": 2**22 + 1, "started": 1.0, "updated": 2.0}
    (run / "status.json").write_text(json.dumps(status), encoding="utf-8")
    show(page, console, f"run?run={run}")
    page.locator(".phase", has_text="killed").wait_for()
    page.get_by_role("alert").get_by_text("RK504").wait_for()
    assert page.get_by_role("button", name="Resume").is_enabled()
    assert page.get_by_role("button", name="Stop and save").count() == 0
    show(page, console, "runs")
    page.get_by_role("button", name="Delete dead").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("metrics.jsonl").wait_for()
    dialog.get_by_role("button", name="Cancel").click()
    assert run.exists()
    page.get_by_role("button", name="Delete dead").click()
    dialog.get_by_role("button", name="Delete").click()
    page.get_by_text("dead was deleted.").wait_for()
    assert not run.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="limits on the size of files are POSIX")
def test_a_full_disk_is_told_and_what_to_do(page, workspace) -> None:
    """A quota of 4 MB, which the console's processes inherit: the first weights of a run are larger."""

    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))

    with running_console(workspace, before=limit) as console:
        values = {"data_file": "texts", "load_model": "models/tiny.pth", "peft": "none", "proj_dir": "out/full"}
        values |= {"ctx_len": "32", "micro_bsz": "1", "epoch_steps": "5", "epoch_count": "1"}
        assert console.ask("api/train/start", values)[0] == 200
        page.goto(console.address + f"#/run?run={workspace / 'out' / 'full'}")
        page.locator(".phase", has_text="failed").wait_for()
        problem = page.get_by_role("alert")
        problem.get_by_text("RK303").wait_for()
        assert "Make room and press Resume" in problem.inner_text()
        page.goto("about:blank")


def test_a_run_that_is_deleted_while_it_is_open(page, console, workspace) -> None:
    run = write_run(workspace, "shortly", 40)
    show(page, console, f"run?run={run}")
    page.wait_for_function(POINTS, arg=40)
    shutil.rmtree(run)
    page.get_by_text("There is no run in").wait_for()
    page.reload()
    page.get_by_text("There is no run in").wait_for()
    page.wait_for_timeout(500)
    assert page.get_by_text("The console does not answer").count() == 0


def test_a_page_outlives_the_console_and_shows_each_step_once(page, browser, tmp_path) -> None:
    """The console ends, the run goes on, another console comes: in two tabs at once."""
    folder = tmp_path / "work"
    folder.mkdir()
    run = write_run(folder, "goes-on", 30)
    other = page.context.new_page()
    with running_console(folder) as console:
        for tab in (page, other):
            show(tab, console, f"run?run={run}")
            tab.wait_for_function(POINTS, arg=30)
        add_steps(run, 31, 35)
        for tab in (page, other):
            tab.wait_for_function(POINTS, arg=35)
        port = console.address.rstrip("/").rpartition(":")[2]
    page.get_by_text("The console does not answer").wait_for()
    add_steps(run, 36, 50)
    with running_console(folder, "--port", port):
        for tab in (page, other):
            tab.wait_for_function(POINTS, arg=50)
            tab.get_by_text("The console does not answer").wait_for(state="hidden")
    page.faults.clear()  # of the time without a console


def test_twenty_thousand_steps_are_shown_soon(page, console, workspace) -> None:
    run = write_run(workspace, "long", 20_000)
    show(page, console, f"run?run={run}")
    begun = page.evaluate("performance.now()")
    page.wait_for_function(POINTS, arg=2000)
    assert page.evaluate("performance.now()") - begun < 10_000, "0.4 s on an idle machine"
    page.get_by_role("button", name="Last half").click()
    page.get_by_text("Steps 10,005 to 20,000").wait_for()
    for _ in range(3):
        page.get_by_role("button", name="Last half").click()
    page.wait_for_function(POINTS, arg=1250)
    shutil.rmtree(run)
