"""`rookery train`: its flags are the leaves of the configuration tree; those of the reference trainers work too."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import typer

from rookery.cli.flags import METAVAR, SETTINGS, FlagsCommand, tell
from rookery.cli.table import print_table
from rookery.config import parse
from rookery.config.tree import TrainConfig
from rookery.i18n import _

if TYPE_CHECKING:
    from rookery.config import Resolved

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(cls=FlagsCommand, context_settings=SETTINGS, options_metavar=METAVAR, no_args_is_help=True)
def train(
    context: typer.Context,
    config: str = typer.Option(None, "--config", metavar="FILE", help="A recipe in TOML; flags go over it"),
    explain: bool = typer.Option(False, "--explain", help="Print every value and where it comes from, and stop"),
) -> None:
    """Train a model. Run the same command again to go on with an interrupted run."""
    parsed = parse(context.args, config)
    tell(parsed)

    from rookery.train import prepare, run

    if explain:
        print_explanation(prepare(parsed.config, parsed.origins))
        return
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("rookery").setLevel(logging.INFO)
    run(parsed.config, parsed.origins)


def print_explanation(resolved: Resolved) -> None:
    """A table of every leaf, its value and its origin, section by section."""
    rows: list[tuple[str, str, str]] = []
    for section in TrainConfig.model_fields:
        rows.append((f"[{section}]", "", ""))
        for leaf, value in getattr(resolved.config, section):
            rows.append((leaf, "-" if value in (None, "") else str(value), str(resolved.origins[leaf])))
    tell(resolved)
    print_table(rows, headings=(_("setting"), _("value"), _("from")))
