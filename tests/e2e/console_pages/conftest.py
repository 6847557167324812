"""A console with a small folder before it, and a real browser: one of each for all tests of its pages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from console import ConsoleProcess, chromium, running_console

from rookery.formats import write_pth
from rookery.models import ModelShape, create, initialise

SLOW = 90_000
"""Milliseconds that a step may take on a busy machine of two cores."""


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A folder as a person has it: some texts and a small model with the World vocabulary."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "texts").mkdir()
    for number in range(12):
        text = "".join(f"User: {number}+{i}=?\n\nAssistant: {number + i}\n\n" for i in range(40))
        (folder / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / "models").mkdir()
    for name, version, width in (("tiny", "x070", 32), ("other", "x060", 64)):
        ranks = dict.fromkeys("wavg", 32) if version == "x070" else {"mix": 32, "decay": 64}
        model = create(ModelShape(version, 2, width, 65536, 32, width, 4 * width, ranks))
        initialise(model, 0)
        write_pth(folder / "models" / f"{name}.pth", {n: t.to(torch.bfloat16) for n, t in model.state_dict().items()})
    return folder


@pytest.fixture(scope="session")
def console(workspace) -> Iterator[ConsoleProcess]:
    with running_console(workspace) as console:
        yield console
        # Training outlives the console; what a failed test has left must not outlive the tests.
        for run in (workspace / "out").glob("*"):
            console.ask("api/runs/stop", {"run": str(run)})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Not for the session: as long as it is open, its event loop runs in this thread, and no other can."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright, which drives the browser, is missing")
    if chromium() is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox"], env=os.environ | {"LANG": "en_US.UTF-8"}
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser, console) -> Iterator[Any]:
    """A tab at 1280 pixels. What a page logs as an error, or asks of another machine, fails the test, unless the test
    took the console away and emptied `page.faults`."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-US", accept_downloads=True)
    context.set_default_timeout(SLOW)
    tab = context.new_page()
    tab.faults = faults = []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    tab.on("request", lambda asked: faults.append(asked.url) if "//127.0.0.1:" not in asked.url else None)
    console.ask("api/settings", {"language": "en", "theme": "auto"})
    tab.goto(console.address)
    tab.get_by_role("heading", name="Train", exact=True).wait_for()
    yield tab
    context.close()
    assert [fault for fault in faults if not fault.startswith(("blob:", "data:")) and "status of 4" not in fault] == []
