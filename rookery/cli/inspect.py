"""`rookery inspect`: what is inside a model, state, adapter or data file, or a run directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from rookery.cli.table import print_table
from rookery.i18n import N_, _

app = typer.Typer(rich_markup_mode=None, add_completion=False)

LABELS = {
    "kind": N_("kind"),
    "file": N_("file"),
    "bytes": N_("size"),
    "version": N_("version"),
    "n_layer": N_("layers"),
    "n_embd": N_("width"),
    "dim_att": N_("time mixing width"),
    "dim_ffn": N_("channel mixing width"),
    "n_head": N_("heads"),
    "head_size": N_("head size"),
    "vocab_size": N_("vocabulary"),
    "ranks": N_("ranks"),
    "parts": N_("optional parts"),
    "dtypes": N_("dtypes"),
    "parameters": N_("parameters"),
    "tensors": N_("tensors"),
    "state": N_("tuned state"),
    "adapter": N_("adapter"),
    "base": N_("base"),
    "status": N_("status"),
    "weights": N_("weight files"),
    "checkpoints": N_("full checkpoints"),
    "documents": N_("documents"),
    "tokens": N_("tokens"),
    "dtype": N_("dtype"),
    "shortest": N_("shortest document"),
    "longest": N_("longest document"),
}
"""Fact -> how it is called in the table, in the order of the table."""

KINDS = {
    "model": N_("model"),
    "state": N_("tuned state"),
    "adapter": N_("adapter"),
    "run": N_("run directory"),
    "data": N_("training data"),
}


@app.command(no_args_is_help=True)
def inspect(
    path: Path = typer.Argument(help="A .pth, .safetensors or .st file, a run directory, or binidx data"),
    tensors: bool = typer.Option(False, "--tensors", help="Also list every tensor with its shape and dtype"),
    as_json: bool = typer.Option(False, "--json", help="Print JSON"),
) -> None:
    """Say what is inside a file: version, dimensions, ranks, precision, parameters, tuned state, adapter and its
    base."""
    from rookery.formats.describe import describe

    facts = describe(path)
    listing = list_tensors(path) if tensors and facts["kind"] != "data" else []
    if as_json:
        typer.echo(json.dumps({**facts, "list": listing} if tensors else facts, ensure_ascii=False, indent=1))
        return
    print_table(rows(facts))
    if listing:
        print_table((name, str(shape), dtype) for name, shape, dtype in listing)


def list_tensors(path: Path) -> list[tuple[str, list[int], str]]:
    """(name, shape, dtype) of every tensor."""
    from rookery.formats import read_weights

    return [
        (name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in read_weights(path).items()
    ]


def rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(label, text) for each fact; those of a run's newest weights follow its own."""
    for fact, label in LABELS.items():
        if facts.get(fact) not in (None, {}, []):
            yield _(label), _text(fact, facts[fact])
    if "model" in facts:
        yield "", ""
        yield from rows(facts["model"])


def _text(fact: str, value: Any) -> str:
    if fact == "kind":
        return _(KINDS[value])
    if fact == "bytes":
        return f"{value / 1e6:,.1f} MB" if value >= 1e5 else f"{value:,} B"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text('', item)}" for name, item in value.items() if item not in (None, "", [], {}))
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
