"""`rookery data`: make binidx data, look into them, and see what training would make of any data."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rookery.cli import flags
from rookery.cli.flags import FlagsCommand
from rookery.cli.progress import percent, when_due
from rookery.i18n import N_, _

if TYPE_CHECKING:
    from rookery.data import BinIdx

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True, help="Make and inspect data.")

# As everywhere in the field, --ctx_len and --ctx-len are the same.
SETTINGS = {"token_normalize_func": lambda name: name.replace("_", "-")}


class OnError(StrEnum):
    """What to do about lines that hold no document."""

    stop = "stop"
    skip = "skip"


@app.command(no_args_is_help=True, context_settings=SETTINGS)
def make(
    source: Path = typer.Argument(
        ..., metavar="IN.jsonl", help="A .jsonl, .json or .txt file, or a folder of .txt files"
    ),
    epochs: int = typer.Argument(1, metavar="N", min=1, help="How often each document is written"),
    ctx_len: int = typer.Argument(1024, metavar="CTX_LEN", min=1, help="Tokens of a sample, for the magic prime"),
    output: Path = typer.Option(None, "--output", "-o", metavar="PREFIX", help="Where PREFIX.bin and PREFIX.idx go"),
    no_shuffle: bool = typer.Option(False, "--no-shuffle", help="Keep the order of the input"),
    seed: int = typer.Option(0, min=0, help="Decides the order of the documents"),
    tokenizer: str = typer.Option(
        "world", help="world, char, compact (bytes, chat marks and the characters of the data) or a file"
    ),
    on_error: OnError = typer.Option(OnError.stop, "--on-error", help="Stop at a bad line, or skip it"),
    workers: int = typer.Option(0, min=0, help="Processes; 0 = as the machine and the input suggest"),
    data_format: str = typer.Option(
        "auto", "--data-format", help="What the rows are: text, messages, sharegpt, alpaca or prompt; auto detects it"
    ),
    template: str = typer.Option("world", help="How conversations become text: world or g1"),
    sft_field: tuple[str, str] = typer.Option(
        ("", ""),
        "--sft-field",
        metavar="PROMPT COMPLETION",
        show_default=False,
        help="The two fields of a row, when they are other ones",
    ),
) -> None:
    """Turn text into binidx training data, as the reference's make_data.py does."""
    from rookery import data

    begun = time.monotonic()
    with progress_display() as progress:
        made = data.make(
            source,
            epochs,
            output,
            tokenizer=tokenizer,
            shuffle=not no_shuffle,
            seed=seed,
            on_error="skip" if on_error is OnError.skip else "stop",
            workers=workers,
            data_format=data_format,
            fields=sft_field if all(sft_field) else None,
            template=template,  # type: ignore[arg-type]  # checked there
            progress=progress,
        )
    if made.reader.format != "text":
        typer.echo(
            _(
                "rows of format {format} became text (template {template}); binidx cannot hold what is to be trained: "
                "--loss_mask answer finds the answers again",
                format=made.reader.format,
                template=made.reader.template,
            )
        )
    if made.skipped:
        typer.echo(_("left out {count} bad lines; the first of them:", count=made.skipped))
        for fault in made.faults:
            typer.echo(f"  {fault}")
    typer.echo(
        _(
            "{prefix}.bin and .idx: {documents} documents, {tokens} tokens, {dtype}, in {seconds:.1f} s",
            prefix=made.prefix,
            documents=made.documents,
            tokens=made.tokens,
            dtype=made.dtype.name,
            seconds=time.monotonic() - begun,
        )
    )
    if made.tokenizer.name != "world":
        vocabulary = f"{made.prefix}.vocab{made.tokenizer.file_suffix}"
        typer.echo(_("vocabulary: {path}, {size} ids", path=vocabulary, size=made.tokenizer.vocab_size))
    echo_prime(made.tokens, ctx_len)


@app.command(no_args_is_help=True, context_settings=SETTINGS)
def info(
    name: str = typer.Argument(..., metavar="NAME", help="Prefix of binidx data, with or without .bin or .idx"),
    ctx_len: int = typer.Option(1024, "--ctx-len", min=1, help="Tokens of a sample, for the magic prime"),
) -> None:
    """Say what is in binidx data: documents, tokens, lengths, ids, and the flags to train on them."""
    import numpy as np

    from rookery import tokenizer
    from rookery.data import BinIdx

    data = BinIdx(name)
    highest, lowest = id_range(data)
    kept = tokenizer.load_beside(data.prefix + ".vocab")
    vocabulary = kept or tokenizer.load("world")
    rows = [
        (_("documents"), f"{len(data)}"),
        (_("tokens"), f"{data.tokens}"),
        (_("token type"), data.dtype.name),
        (
            _("document length"),
            _(
                "{shortest} to {longest} tokens, {mean:.1f} on average, half are no longer than {median:.0f}",
                shortest=data.sizes.min(),
                longest=data.sizes.max(),
                mean=data.sizes.mean(),
                median=np.median(data.sizes),
            ),
        ),
        (_("highest token id"), f"{highest}"),
        (_("its vocabulary"), kept.name if kept else _("none kept beside the data; taken to be World")),
    ]
    if lowest >= 0 and highest < vocabulary.vocab_size:
        start = vocabulary.decode_bytes(data.get(0, 0, min(int(data.sizes[0]), 32)).tolist())
        rows.append((_("begins with"), repr(start.decode("utf-8", "replace"))))
    for label, value in rows:
        typer.echo(f"{label}: {value}")
    echo_prime(data.tokens, ctx_len)


class DataFlagsCommand(FlagsCommand):
    """A command for which only the data matter."""

    sections = ("data",)


@app.command(
    cls=DataFlagsCommand,
    context_settings=flags.SETTINGS,
    options_metavar="FILE [--FLAG VALUE]...",
    no_args_is_help=True,
)
def preview(
    context: typer.Context,
    rows: int = typer.Option(3, min=0, help="Documents to show"),
    everything: bool = typer.Option(False, "--all", help="Look at all of a large file, not only at its beginning"),
    as_json: bool = typer.Option(False, "--json", help="Print JSON"),
) -> None:
    """Show what training would make of data: the first documents with what is trained, and how long all of them are.

    FILE is whatever --data_file takes; the other flags are those of rookery train, or its recipe.toml.
    """
    from rookery.cli.preview import print_preview
    from rookery.config import parse
    from rookery.data.preview import preview as look

    words = list(context.args)
    if words and not words[0].startswith("-") and not words[0].endswith(".toml"):
        words.insert(0, "--data_file")
    parsed = parse(words)
    flags.tell(parsed)
    with progress_display() as progress:
        found = look(parsed.config.data, rows=rows, everything=everything, progress=progress)
    if as_json:
        typer.echo(json.dumps(asdict(found), ensure_ascii=False))
    else:
        print_preview(found)


def id_range(data: BinIdx) -> tuple[int, int]:
    """Highest and lowest id, read in parts."""
    part = 1 << 24
    highest: list[int] = []
    lowest: list[int] = []
    with progress_display() as progress:
        for start in range(0, data.tokens, part):
            tokens = data.stream[start : start + part]
            highest.append(int(tokens.max()))
            lowest.append(int(tokens.min()))
            progress(N_("reading"), min(start + part, data.tokens) * data.dtype.itemsize, data.stream.nbytes)
    return max(highest), min(lowest)


def echo_prime(tokens: int, ctx_len: int) -> None:
    """The flags that the reference trainers need for this data."""
    from rookery.data import magic_prime

    prime = magic_prime(tokens, ctx_len)
    if prime:
        typer.echo(f"--my_exit_tokens {tokens} --magic_prime {prime} --ctx_len {ctx_len}")
    else:
        typer.echo(
            _(
                "Too few tokens for a magic prime at ctx_len {ctx_len}: the reference trainers need {needed}. "
                "rookery train needs none.",
                ctx_len=ctx_len,
                needed=3 * ctx_len,
            )
        )


@contextmanager
def progress_display() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar with rate and time left on a terminal; elsewhere a line now and then. On stderr."""
    if not sys.stderr.isatty():
        yield _progress_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(_(phase), total=total)
            bar.update(tasks[phase], completed=done)

        yield show


def _progress_lines() -> Callable[[str, int, int], None]:
    due = when_due()
    begun: dict[str, float] = {}

    def show(phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        begun.setdefault(phase, now)
        if not due(done, total):
            return
        rate = done / max(now - begun[phase], 1e-3)
        line = _(
            "{phase}: {percent:.0f} %, {rate:.1f} MB/s, {left:.0f} s left",
            phase=_(phase),
            percent=percent(done, total),
            rate=rate / 1e6,
            left=(total - done) / rate,
        )
        print(line, file=sys.stderr, flush=True)

    return show
