"""The commands of Rookery that pages start: what they are given, checked, and turned into words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rookery.errors import UserError
from rookery.i18n import _
from rookery.ui import form
from rookery.ui.console import Console

PREVIEW_ROWS = 8


def preview(console: Console, path: str, options: Mapping[str, str]) -> dict[str, Any]:
    """What training would make of a file with these settings: `rookery.data.preview` of it.

    Raises:
        UserError: the file cannot be read, or a setting is not valid.
    """
    words = form.words({"data_file": str(console.places.allowed(path)), **options})
    reply = console.worker.ask("preview", words=words, rows=PREVIEW_ROWS)
    if "error" in reply:
        raise UserError(reply["error"])
    return dict(reply["result"])


def make(console: Console, values: Mapping[str, Any]) -> dict[str, Any]:
    """Start `rookery data make`: ``source``, ``epochs``, ``ctx_len``, ``tokenizer``, ``shuffle``, ``skip``, ``output``.

    Raises:
        UserError: a path elsewhere, or a number that is none.
    """
    source = console.places.allowed(_text(values, "source"))
    folder = console.places.first
    # Data of a folder cannot have its name: the name would mean the folder.
    beside = source.with_name(f"{source.name}-data") if source.is_dir() else source.with_suffix("")
    output = console.places.allowed(_text(values, "output") or beside)
    tokenizer = _text(values, "tokenizer") or "world"
    words = ["data", "make", source, _number(values, "epochs", 1), _number(values, "ctx_len", 1024), "-o", output]
    words += ["--tokenizer", tokenizer]
    words += [] if values.get("shuffle", True) else ["--no-shuffle"]
    words += ["--on-error", "skip"] if values.get("skip") else []
    return console.jobs.start("data", source.name, list(map(str, words)), folder, result=str(output))


def merge(console: Console, values: Mapping[str, Any]) -> dict[str, Any]:
    """Start `rookery merge BASE ADAPTER -o OUT`."""
    if not _text(values, "base") or not _text(values, "adapter"):
        raise UserError(_("choose a base model, and the adapter or state to merge into it"))
    base, adapter = (console.places.allowed(_text(values, name)) for name in ("base", "adapter"))
    output = _new_file(console, _text(values, "output"))
    words = ["merge", str(base), str(adapter), "-o", str(output)]
    return console.jobs.start("merge", output.name, words, console.places.first, result=str(output))


def convert(console: Console, values: Mapping[str, Any]) -> dict[str, Any]:
    """Start `rookery convert IN -o OUT`; without ``to``, the ending of OUT says the format."""
    source = console.places.allowed(_text(values, "source"))
    output = _new_file(console, _text(values, "output"))
    words = ["convert", str(source), "-o", str(output)]
    for option in ("to", "dtype"):
        if given := _text(values, option):
            words += [f"--{option}", given]
    return console.jobs.start("convert", output.name, words, console.places.first, result=str(output))


def serve(console: Console, values: Mapping[str, Any]) -> dict[str, Any]:
    """Start `rookery serve MODEL` with an adapter and a state."""
    model = console.places.allowed(_text(values, "model"))
    options: list[str] = []
    for name in ("adapter", "state"):
        if path := _text(values, name):
            options += [f"--{name}", str(console.places.allowed(path))]
    port = _number(values, "port", 0)
    if not 0 <= port <= 65535:
        raise UserError(_("{port} is no port: take one from 1024 to 65535", port=port))
    return console.servers.start(model, options, port, console.places.first)


def chat_request(console: Console, body: Mapping[str, Any]) -> dict[str, Any]:
    """A question as the page sends it, with files inside the folders only."""
    checked = dict(body)
    for name in ("adapter", "state"):
        if checked.get(name):
            checked[name] = str(console.places.allowed(str(checked[name])))
    return checked


def _new_file(console: Console, path: str) -> Path:
    if not path:
        raise UserError(_("give the file to write a name"))
    file = console.places.allowed(path)
    if file.exists():
        raise UserError(_("{path} exists: choose another name", path=path))
    if not file.parent.is_dir():
        raise UserError(_("the folder {path} does not exist", path=file.parent))
    return file


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name, "")
    return value.strip() if isinstance(value, str) else ""


def _number(values: Mapping[str, Any], name: str, otherwise: int) -> int:
    text = str(values.get(name, "")).strip()
    if not text:
        return otherwise
    if not text.isdigit():
        raise UserError(_("{name}: {text} is no whole number", name=name, text=text))
    return int(text)
