"""For eyes, ears and fingers of every kind: names, contrast, keys, and no page wider than a telephone."""

from __future__ import annotations

import pytest
from pages import AUDIT, NOT_REACHED, TAB_STOP, show

PLACES = ("train", "chat", "runs", "models", "data?path=texts", "serve", "settings")


@pytest.mark.parametrize(("width", "theme", "language"), [(1280, "light", "zh"), (390, "dark", "en")])
def test_nothing_is_wrong_with_a_page(page, console, width: int, theme: str, language: str) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    console.ask("api/settings", {"theme": theme, "language": language})
    page.reload()
    for place in PLACES:
        show(page, console, place)
        if place == "train":
            page.locator("details.advanced").evaluate("element => { element.open = true; }")
        page.wait_for_timeout(150)
        assert page.evaluate(AUDIT) == [], place


def test_keys_reach_everything_and_show_where_they_are(page) -> None:
    page.reload()
    page.locator("h1").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the content"
    page.keyboard.press("Enter")
    for _ in range(120):
        page.keyboard.press("Tab")
        at = page.evaluate(TAB_STOP)
        if at is None:
            break
        assert at == "", "the focus cannot be seen"
    assert page.evaluate(NOT_REACHED) == []


def test_arrows_choose_a_method_and_escape_closes_a_dialog(page) -> None:
    page.get_by_role("radio", name="LoRA").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_role("radio", name="PiSSA", checked=True).wait_for()
    button = page.get_by_role("button", name="Load TOML or a command")
    button.focus()
    page.keyboard.press("Enter")
    page.get_by_role("dialog", name="Load TOML or a command").wait_for()
    assert page.evaluate("document.querySelector('dialog').contains(document.activeElement)")
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="hidden")
    assert button.evaluate("element => element === document.activeElement"), "the focus comes back"
