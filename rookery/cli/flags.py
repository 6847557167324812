"""Commands whose flags are the leaves of the configuration tree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import typer
from typer.core import TyperCommand

from rookery.config.tree import TrainConfig, allowed, leaf_field, section_model
from rookery.i18n import _

if TYPE_CHECKING:
    from rookery.config import Parsed, Resolved

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Typer's context settings of such a command: the words it does not know are left to `rookery.config.parse`."""

METAVAR = "[recipe.toml] [--FLAG VALUE]..."


class FlagsCommand(TyperCommand):
    """A command that lists the leaves of `sections` in its help."""

    sections: ClassVar[tuple[str, ...]] = tuple(TrainConfig.model_fields)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        for section in self.sections:
            model = section_model(section)
            about = _(model.__doc__ or "").rstrip(".。")
            with formatter.section(f"[{section}] {about}"):
                formatter.write_dl([(f"--{leaf}", describe(leaf)) for leaf in model.model_fields])


class ModelFlagsCommand(FlagsCommand):
    """A command for which only the architecture matters."""

    sections = ("model",)


def describe(leaf: str) -> str:
    """Description of a leaf with its type or choices, and its default."""
    field = leaf_field(leaf)
    default = "" if field.default in (None, "", []) else "; " + _("default {value}", value=field.default)
    return f"{_(field.description or '')} ({allowed(leaf)}{default})"


def tell(noted: Parsed | Resolved) -> None:
    """Print what was noted on the way, one line each, on stderr."""
    for note in noted.notes:
        typer.echo(note, err=True)
