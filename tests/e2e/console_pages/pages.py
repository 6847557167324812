"""What a person does on the pages, and what is wrong with one for those who do not see it or use no mouse."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def fill(page: Any, **fields: object) -> None:
    """Type into fields of the form, by their label."""
    for label, text in fields.items():
        page.get_by_label(label.replace("_", " ")).first.fill(str(text))


def go(page: Any, name: str) -> None:
    """To another page, by the menu."""
    page.get_by_role("navigation").get_by_role("link", name=name).click()


def show(page: Any, console: Any, place: str) -> None:
    """To a place of the console, by its address."""
    page.goto(f"{console.address}#/{place}")
    page.locator("h1").wait_for()


def steps(run: Path) -> int:
    """Lines of metrics that a run has written."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


AUDIT = """() => {
  const faults = [];
  const shown = (e) => e.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true });
  const told = (e) => e.outerHTML.slice(0, 150);
  const all = (what) => [...document.querySelectorAll(what)].filter(shown);
  const named = (e) => e.getAttribute("aria-label") || (e.labels?.length && e.labels[0].textContent.trim()) ||
    e.textContent.trim() || e.getAttribute("alt");
  for (const e of all("input, select, textarea, button, a[href], summary, [role=radio], [role=radiogroup], " +
    "[role=progressbar], [role=img], nav, dialog, pre[tabindex]")) {
    if (!named(e)) faults.push(`has no name: ${told(e)}`);
  }
  for (const e of all("a[href], button, input, select, textarea")) {
    if (e.tabIndex < 0 && e.getAttribute("role") !== "radio") faults.push(`no key reaches it: ${told(e)}`);
    if (e.tabIndex > 0) faults.push(`jumps the queue: ${told(e)}`);
  }
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) faults.push(`id twice: ${id}`);
  for (const name of ["aria-describedby", "aria-labelledby", "for", "list"]) {
    for (const e of document.querySelectorAll(`[${name}]`)) {
      if (!ids.includes(e.getAttribute(name))) faults.push(`${name} leads nowhere: ${told(e)}`);
    }
  }
  if (all("h1").length !== 1) faults.push(`${all("h1").length} headings of the page`);
  if (all("main").length !== 1) faults.push("no main part");
  if (!document.documentElement.lang || !document.title) faults.push("no language or title");

  // WCAG 2: 4.5 for text, 3 for large text. What cannot be used now is exempt.
  const colour = (text) => {
    const part = text.match(/[\\d.]+/g).map(Number);
    const scale = text.startsWith("color(") ? 255 : 1;
    return { rgb: part.slice(0, 3).map((value) => value * scale), alpha: part[3] ?? 1 };
  };
  const over = (top, below) => top.rgb.map((value, at) => value * top.alpha + below[at] * (1 - top.alpha));
  const ground = (e) => {
    if (!e) return [255, 255, 255];
    const own = colour(getComputedStyle(e).backgroundColor);
    return own.alpha === 1 ? own.rgb : over(own, ground(e.parentElement));
  };
  const light = (rgb) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = rgb.map((value) => linear(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || seen.has(e) || !shown(e)) continue;
    if (e.closest(":disabled, svg, option, noscript, script")) continue;
    seen.add(e);
    const style = getComputedStyle(e);
    const back = ground(e);
    const [a, b] = [light(over(colour(style.color), back)), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) faults.push(`contrast ${ratio.toFixed(2)}: ${told(e)}`);
  }
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  if (wide > 0) faults.push(`${wide} pixels wider than the screen`);
  return faults;
}"""
"""What is wrong with the page that is shown: a list of sentences."""

TAB_STOP = """() => {
  const e = document.activeElement;
  if (!e || e === document.body) return null;
  const style = getComputedStyle(e);
  const seen = style.outlineStyle !== "none" || style.boxShadow !== "none";
  e.dataset.reached = "yes";
  return seen ? "" : e.outerHTML.slice(0, 150);
}"""
"""Of the element that has the focus: "" when that can be seen, else what it is; null when none has it."""

NOT_REACHED = """() => [...document.querySelectorAll("main a, main button:enabled, main input:enabled, main select")]
  .filter((e) => e.checkVisibility() && e.tabIndex >= 0 && !e.dataset.reached).map((e) => e.outerHTML.slice(0, 150))"""
