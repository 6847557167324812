"""Each method of the form trains, and what it leaves is a model, an adapter or a state that goes on living."""

from __future__ import annotations

import re

from pages import fill, go, show

METHODS = [("PiSSA", "int8"), ("DoRA", "nf4"), ("MiSS", ""), ("State", "int8"), ("Full", ""), ("Pretrain", "")]
"""Method of the form, and the choice of the base weights."""


def test_every_method_trains_and_its_result_is_mounted(page, console, workspace) -> None:
    """All at once: the list shows several that train."""
    from playwright.sync_api import expect

    for method, quant in METHODS:
        show(page, console, "train")
        page.get_by_role("radio", name=method).click()
        fill(page, Training_data="texts", Context_length=32, Epoch_steps=3, Epoch_count=2, Micro_batch_size=1)
        fill(page, Accumulate_gradient_batches=1)
        if method == "Pretrain":
            fill(page, Layers=1, Width=64)
        else:
            fill(page, Base_model="models/tiny.pth")
        if quant:
            page.get_by_label("Base weights").select_option(quant)
        if page.get_by_label("Rank (r)").count():
            fill(page, Rank=4)
        page.get_by_role("button", name="Train", exact=True).click()
        page.wait_for_url("**/#/run?**")
    go(page, "Runs")
    for method, _quant in METHODS:
        row = page.locator(".run-row").filter(has=page.get_by_text(f"texts-{method.lower()}", exact=True))
        row.locator(".phase-done").wait_for(timeout=120_000)
        assert row.locator(".run-steps b").inner_text() == "6"
        assert row.locator(".spark polyline").count() == 1
    page.get_by_role("link", name="texts-dora DoRA").click()
    page.get_by_role("img", name="Loss:").wait_for()
    page.get_by_text("DoRA, nf4", exact=True).wait_for()

    go(page, "Models")
    for method in ("pissa", "dora", "miss", "state"):
        row = page.locator(".model-row", has_text=f"out/texts-{method}").first
        row.get_by_text("trained on models/tiny.pth").wait_for()
        assert row.get_by_role("button", name="Merge").is_enabled()
    for method in ("full", "pretrain"):
        page.locator(".model-row", has_text=f"out/texts-{method}").first.get_by_role("link", name="Chat").wait_for()
    page.locator(".model-row", has_text="out/texts-state").first.get_by_role("link", name="Mount and chat").click()
    expect(page.get_by_label("State", exact=True)).to_have_value(re.compile(r"rwkv-final\.pth$"))
    fill(page, Longest_answer=4, Your_message="1+1=?")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("a second").wait_for()
