"""The console in a real browser: a person's whole way with a tiny model, and the ways that fail."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from console import ConsoleProcess, chromium, running_console

from rookery.formats import write_pth
from rookery.models import ModelShape, create, initialise

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright, which drives the browser, is not installed")

SLOW = 30_000
"""Milliseconds that a step may take on a busy machine of two cores."""

pytestmark = pytest.mark.skipif(chromium() is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def console(workspace) -> Iterator[ConsoleProcess]:
    with running_console(workspace) as console:
        yield console


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox"], env=os.environ | {"LANG": "en_US.UTF-8"}
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser, console):
    """A tab at 1280 pixels. What a page logs as an error, or asks of another machine, fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-US", accept_downloads=True)
    context.set_default_timeout(SLOW)
    tab = context.new_page()
    faults: list[str] = []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    tab.on("request", lambda asked: faults.append(asked.url) if "//127.0.0.1:" not in asked.url else None)
    tab.goto(console.address)
    tab.get_by_role("heading", name="Train", exact=True).wait_for()
    yield tab
    context.close()
    assert [fault for fault in faults if not fault.startswith(("blob:", "data:")) and "status of 4" not in fault] == []


def fill(page, **fields: object) -> None:
    """Type into fields of the form, by their label."""
    for label, text in fields.items():
        page.get_by_label(label.replace("_", " ")).first.fill(str(text))


def go(page, name: str) -> None:
    page.get_by_role("navigation").get_by_role("link", name=name).click()


def test_the_whole_way_of_a_person(page, console, workspace) -> None:
    """Choose a folder of texts, convert, train LoRA, see the curve move, stop, resume, merge, chat, switch to
    Chinese."""
    page.get_by_role("radio", name="LoRA").click()
    assert page.get_by_text("Choose training data.").is_visible()
    assert page.get_by_role("button", name="Train", exact=True).is_disabled()

    page.get_by_label("Training data").locator("..").get_by_role("button", name="Browse").click()
    page.get_by_role("dialog").get_by_role("button", name="texts").click()
    page.get_by_role("dialog").get_by_role("button", name="Use this folder").click()
    page.get_by_role("button", name="Convert", exact=True).click()

    page.get_by_role("heading", name="What is in it").wait_for()
    assert page.get_by_text("12", exact=True).first.is_visible()
    page.locator("form").get_by_role("button", name="Convert", exact=True).click()
    page.get_by_role("button", name="Train on it").click()

    page.get_by_label("Base model").fill("models/tiny.pth")
    fill(page, Context_length=64, Epoch_steps=10, Epoch_count=300, Micro_batch_size=2, Rank=4)
    fill(page, Accumulate_gradient_batches=1, LR_init=1e-2)
    page.get_by_text("RWKV-7 (x070), 2 layers").wait_for()
    page.get_by_text("12 documents, converted").wait_for()
    page.get_by_text("The same from a terminal").click()
    command = page.get_by_label("Command").inner_text()
    assert "rookery train" in command
    assert "--peft lora" in command
    page.get_by_role("button", name="Train", exact=True).click()

    page.wait_for_url("**/#/run?**")
    chart = page.get_by_role("img", name="Loss:").first
    chart.wait_for()
    shown = chart.get_attribute("aria-label")
    page.wait_for_function(
        "before => document.querySelector('.chart').getAttribute('aria-label') !== before", arg=shown
    )
    page.get_by_role("button", name="Stop and save").click()
    page.locator(".phase", has_text="stopped").wait_for()
    run = workspace / "out" / "texts-data-lora"
    before = len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    assert any((run / "checkpoints").iterdir())

    page.get_by_role("button", name="Resume").click()
    page.locator(".phase", has_text="training").wait_for()
    deadline = time.monotonic() + 60
    while len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) <= before + 5:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    page.get_by_role("button", name="Stop and save").click()
    page.locator(".phase", has_text="stopped").wait_for()

    go(page, "Models")
    row = page.locator(".model-row", has_text="adapter-").first
    row.get_by_text("fits models/tiny.pth").wait_for()
    row.get_by_role("button", name="Merge").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("File to write").fill("models/merged.pth")
    dialog.get_by_role("button", name="Merge").click()
    page.locator(".model-row", has_text="merged.pth").get_by_role("link", name="Chat", exact=True).click()

    page.get_by_label("Longest answer").fill("8")
    page.get_by_label("Your message").fill("1+1=?")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("a second").wait_for()

    page.get_by_role("button", name="中文").click()
    page.get_by_role("heading", name="对话", exact=True).wait_for()
    assert page.get_by_text("1+1=?").is_visible(), "switching the language keeps the conversation"
    go(page, "训练")
    assert page.get_by_label("上下文长度").input_value() == "64", "and the form"
    page.get_by_role("button", name="English").click()
    page.get_by_role("heading", name="Train", exact=True).wait_for()


def test_a_base_of_another_shape_is_refused_before_the_start(page) -> None:
    page.get_by_role("radio", name="Full").click()
    fill(page, Training_data="texts", Base_model="models/other.pth")
    page.get_by_text("Advanced").click()
    page.get_by_label("head_size", exact=True).fill("16")
    problem = page.get_by_role("alert")
    problem.get_by_text("RK201").wait_for()
    assert "head_size: 16" in problem.inner_text()
    assert page.get_by_role("button", name="Train", exact=True).is_disabled()


def test_missing_data_are_told_with_code_cause_and_remedy(page) -> None:
    page.get_by_role("radio", name="Pretrain").click()
    fill(page, Training_data="nowhere/to/be/found.jsonl")
    problem = page.get_by_role("alert")
    problem.get_by_text("RK").wait_for()
    assert "nowhere" in problem.inner_text()
    fill(page, Training_data="/etc/passwd")
    page.get_by_text("lies outside the folders of the console").wait_for()


def test_a_wrong_value_is_told_at_its_field(page) -> None:
    page.get_by_role("radio", name="Pretrain").click()
    fill(page, Training_data="texts", Width=33)
    page.get_by_text("must be a multiple of 32, such as 32 / 64").wait_for()
    assert page.get_by_label("Width").get_attribute("aria-invalid") == "true"
    assert page.get_by_role("button", name="Train", exact=True).is_disabled()


def test_a_killed_run_is_found_killed_and_can_be_resumed(page, console, workspace) -> None:
    """Also by a console that did not start it: everything is read from the run directory."""
    values = {
        "data_file": "texts",
        "n_layer": "1",
        "n_embd": "32",
        "head_size": "32",
        "ctx_len": "32",
        "micro_bsz": "1",
    }
    values |= {"epoch_steps": "100000", "epoch_count": "1", "proj_dir": "out/killed", "save_every": "5"}
    assert console.ask("api/train/start", values)[0] == 200
    run = workspace / "out" / "killed"
    page.goto(console.address + f"#/run?run={run}")
    page.locator(".phase", has_text="training").wait_for()
    page.get_by_role("img", name="Loss:").first.wait_for()
    pid = int((run / "run.lock").read_text(encoding="utf-8"))
    os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    page.locator(".phase", has_text="killed").wait_for()
    page.get_by_text("RK504").wait_for()
    with running_console(workspace) as another:
        page.goto(another.address + f"#/run?run={run}")
        page.locator(".phase", has_text="killed").wait_for()
        assert page.get_by_role("button", name="Resume").is_enabled()
        page.goto(console.address + "#/runs")
    page.get_by_role("button", name="Delete killed").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("metrics.jsonl").wait_for()
    dialog.get_by_role("button", name="Delete").click()
    page.get_by_text("killed was deleted.").wait_for()
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


def test_a_port_that_is_taken_is_told(page) -> None:
    go(page, "Serve")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        fill(page, Model_or_run="models/tiny.pth", Port=listener.getsockname()[1])
        page.get_by_role("button", name="Start", exact=True).click()
        page.get_by_text("is taken by another program").wait_for()


@pytest.mark.parametrize("width", [1280, 390])
def test_no_page_is_wider_than_the_screen(page, workspace, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    for name in ("train", "chat", "runs", "models", "data?path=texts", "serve", "settings"):
        page.goto(page.url.partition("#")[0] + f"#/{name}")
        page.locator("h1").wait_for()
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{name} at {width}"


def test_keys_reach_everything(page) -> None:
    """Every control that can be clicked can be focused, and every field has a name for a screen reader."""
    for name in ("train", "chat", "runs", "models", "data", "serve", "settings"):
        page.goto(page.url.partition("#")[0] + f"#/{name}")
        page.locator("h1").wait_for()
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("input, select, textarea, button, a")]
                .filter((e) => e.offsetParent && !e.labels?.length && !e.getAttribute("aria-label"))
                .filter((e) => !e.textContent.trim()).map((e) => e.outerHTML)"""
        )
        assert nameless == [], name
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") != "BODY"


def test_a_recipe_is_saved_and_loaded_again(page, tmp_path) -> None:
    page.get_by_role("radio", name="DoRA").click()
    fill(page, Training_data="texts", Base_model="models/tiny.pth", Context_length=77)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save TOML").click()
    download.value.save_as(tmp_path / "recipe.toml")
    recipe = (tmp_path / "recipe.toml").read_text(encoding="utf-8")
    assert 'peft = "dora"' in recipe
    assert "ctx_len = 77" in recipe
    page.get_by_role("button", name="Reset").click()
    page.get_by_role("radio", name="Full").click()
    page.get_by_role("button", name="Load TOML or a command").click()
    page.get_by_role("dialog").get_by_label("Text").fill(recipe)
    page.get_by_role("dialog").get_by_role("button", name="Load", exact=True).click()
    page.get_by_role("radio", name="DoRA", checked=True).wait_for()
    assert page.get_by_label("Context length").input_value() == "77"
