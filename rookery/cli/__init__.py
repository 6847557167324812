"""The `rookery` command: one file a subcommand, loaded only when it is called, so that help needs no torch."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from rookery import __version__
from rookery.errors import Interrupted, UserError, ran_out_of_memory
from rookery.i18n import LANGUAGES, N_, _, set_language

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

COMMANDS = {
    "demo": N_("Train the arithmetic model from nothing and see it answer"),
    "data": N_("Make training data, and look into it"),
    "init": N_("Write the initial weights of a new model"),
    "train": N_("Train a model"),
    "inspect": N_("Say what is inside a model, state or data file"),
    "merge": N_("Put an adapter or a tuned state into a model"),
    "convert": N_("Write weights in the format of another program"),
    "chat": N_("Talk to a model"),
    "serve": N_("Serve a model over HTTP, with OpenAI's API"),
    "eval": N_("Measure a model"),
    "ui": N_("Open the web console"),
    "bench": N_("Measure speed and memory on this machine, beside other programs"),
    "doctor": N_("Say what this machine can do, and what would make it faster"),
}
"""Subcommand -> what it does; each is the `app` of the module of its name in this package."""

OK, FAULT, USER_FAULT, INTERRUPTED = 0, 1, 2, 130


class LazyGroup(TyperGroup):
    """Lists its subcommands from `COMMANDS` and imports the module of one only to run it or to print its own help."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and load_command(str(name)), rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _translate(self)  # not before, since --lang is read first
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        with _dropped_interrupts() as dropped:
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                raise Interrupted(_("Interrupted.")) from None
            except Exception:
                if dropped:
                    raise Interrupted(_("Interrupted.")) from None
                raise


@contextmanager
def _dropped_interrupts() -> Iterator[list[type[BaseException]]]:
    """What Python drops of Ctrl-C where foreign code calls it back: Numba's compiler does, and fails after that."""
    dropped: list[type[BaseException]] = []
    before = sys.unraisablehook

    def note(found: Any) -> None:
        if issubclass(found.exc_type, KeyboardInterrupt):
            dropped.append(found.exc_type)
        else:
            before(found)

    sys.unraisablehook = note
    try:
        yield dropped
    finally:
        sys.unraisablehook = before


def load_command(name: str) -> Any:
    """The subcommand `name`, with its help in the language in use."""
    command = typer.main.get_command(import_module(f"rookery.cli.{name}").app)
    _translate(command)
    command.name = name
    return command


def _translate(command: Any) -> None:
    """Put the help of a command, its options and its own subcommands into the language in use."""
    command.help = _(" ".join(command.help.split())) if command.help else None
    for parameter in command.params:
        if getattr(parameter, "help", None):
            parameter.help = _(parameter.help)
    command.get_help_option(typer.Context(command)).help = _("Show this message and exit")
    for subcommand in getattr(command, "commands", {}).values():
        _translate(subcommand)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rookery {__version__}")
        raise typer.Exit


def _choose_language(name: str | None) -> None:
    if name is None:
        return
    if name not in LANGUAGES:
        raise typer.BadParameter(_("{name} is not one of {known}", name=name, known=", ".join(LANGUAGES)))
    set_language(name)


app = typer.Typer(cls=LazyGroup, add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _options(
    lang: str = typer.Option(
        None, "--lang", metavar="en|zh", is_eager=True, callback=_choose_language, help="Language of messages and help"
    ),
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_say_version, help="Print the version and exit"
    ),
) -> None:
    """Raise RWKV language models: data, pretraining, fine-tuning, chat."""


def build() -> LazyGroup:
    """The root command."""
    root = typer.main.get_command(app)
    assert isinstance(root, LazyGroup)
    root.commands = {name: TyperCommand(name, help=text, rich_markup_mode=None) for name, text in COMMANDS.items()}
    return root


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 the user's input is at fault, 1 our fault, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        # A console that cannot show a character must not end a run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # PyTorch's idle OpenMP threads spin for milliseconds, at the cost of the threads our own loops run on: 20 % of a
    # training step on two cores. GNU's OpenMP reads this when torch is imported, which has not happened yet.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Whoever is asked to end takes back what is half written, as after Ctrl-C; the second is Windows' Ctrl-Break.
    for name in ("SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    sys.exit(run(sys.argv[1:] if args is None else list(args)))


def run(args: list[str]) -> int:
    """Run the command line and return its exit status, every error told on stderr."""
    try:
        build().main(args, prog_name="rookery")
    except UserError as error:
        typer.echo(str(error), err=True)
        return USER_FAULT
    except Interrupted as interruption:
        typer.echo(str(interruption), err=True)
        return INTERRUPTED
    except PermissionError as error:
        typer.echo(_("no permission: {path}", path=error.filename), err=True)
        return USER_FAULT
    except BrokenPipeError:
        # Whoever read our output has seen enough (`rookery ... | head`); Python must not complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else OK
    except Exception as error:
        if ran_out_of_memory(error):
            reason = str(error).rpartition("DefaultCPUAllocator: ")[2].strip() or type(error).__name__
            typer.echo(_("Out of memory: {reason}", reason=reason), err=True)
            typer.echo(_("Close other programs, or take a smaller model, shorter texts or fewer at a time."), err=True)
            return USER_FAULT
        traceback.print_exc()
        typer.echo(_("This is a fault of Rookery, not yours: please report it with the text above."), err=True)
        return FAULT
    return OK
