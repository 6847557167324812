"""A person's way with a tiny model in a real browser, and what the form says to those who take a wrong turn."""

from __future__ import annotations

import socket
import time

from pages import fill, go, steps


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
    before = steps(run)
    assert any((run / "checkpoints").iterdir())

    page.get_by_role("button", name="Resume").click()
    page.locator(".phase", has_text="training").wait_for()
    deadline = time.monotonic() + 60
    while steps(run) <= before + 5:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    page.get_by_role("button", name="Stop and save").click()
    page.locator(".phase", has_text="stopped").wait_for()

    go(page, "Models")
    row = page.locator(".model-row", has_text="adapter-").first
    row.get_by_text("trained on models/tiny.pth").wait_for()
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


def test_a_port_that_is_taken_is_told(page) -> None:
    go(page, "Serve")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        fill(page, Model_or_run="models/tiny.pth", Port=listener.getsockname()[1])
        page.get_by_role("button", name="Start", exact=True).click()
        page.get_by_text("is taken by another program").wait_for()


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
