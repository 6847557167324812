"""`rookery train`: its flags are the leaves of the configuration tree; those of the reference trainers work too."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rookery.cli.flags import METAVAR, SETTINGS, FlagsCommand, tell
from rookery.cli.table import print_table
from rookery.config import parse
from rookery.config.launcher import find_place
from rookery.config.memory import Plan, estimate, summary
from rookery.config.tree import TrainConfig
from rookery.i18n import _, language

if TYPE_CHECKING:
    from rookery.config import Parsed, Resolved

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(cls=FlagsCommand, context_settings=SETTINGS, options_metavar=METAVAR, no_args_is_help=True)
def train(
    context: typer.Context,
    config: str = typer.Option(None, "--config", metavar="FILE", help="A recipe in TOML; flags go over it"),
    explain: bool = typer.Option(False, "--explain", help="Print every value and where it comes from, and stop"),
) -> None:
    """Train a model. Run the same command again to go on with an interrupted run."""
    parsed = parse(context.args, config)
    place = find_place()
    device = parsed.config.device
    if place is None and device.devices * device.num_nodes > 1 and not explain:
        from rookery.cli.launch import launch

        recipe = [] if config is None else ["--config", config]
        words = ["--lang", language(), "train", *recipe, *context.args]
        raise typer.Exit(launch(words, device, Path(parsed.config.run.proj_dir)))
    if place is None or place.rank == 0:
        tell(parsed)

    from rookery.train import prepare, run

    if explain:
        resolved = prepare(parsed.config, parsed.origins)
        print_explanation(resolved)
        if resolved.config.run.train_stage != 1:
            typer.echo(summary(estimate(Plan.of(resolved.config)), None))
        return
    if place is not None:
        _run_together(place.rank, parsed)
        return
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("rookery").setLevel(logging.INFO)
    run(parsed.config, parsed.origins)


def _run_together(rank: int, parsed: Parsed) -> None:
    """Train as one of several processes; rank 0 speaks for all."""
    from rookery.train import RankLost, run

    if rank == 0:
        logging.basicConfig(stream=sys.stderr, format="%(message)s")
        logging.getLogger("rookery").setLevel(logging.INFO)
    try:
        run(parsed.config, parsed.origins)
    except RankLost as error:
        if rank == 0:
            typer.echo(str(error), err=True)
        sys.stdout.flush()
        # Whoever waits for a lost rank in the background would keep this process from ending.
        os._exit(1)


def print_explanation(resolved: Resolved) -> None:
    """A table of every leaf, its value and its origin, section by section."""
    rows: list[tuple[str, str, str]] = []
    for section in TrainConfig.model_fields:
        rows.append((f"[{section}]", "", ""))
        for leaf, value in getattr(resolved.config, section):
            rows.append((leaf, "-" if value in (None, "") else str(value), str(resolved.origins[leaf])))
    tell(resolved)
    print_table(rows, headings=(_("setting"), _("value"), _("from")))
