"""`rookery merge`: an adapter or a tuned state into the weights of its model."""

from __future__ import annotations

from pathlib import Path

import typer

from rookery.errors import UserError
from rookery.i18n import N_, _

app = typer.Typer(rich_markup_mode=None, add_completion=False)

KINDS = {"state": N_("tuned state"), "adapter": N_("adapter")}


@app.command("merge", no_args_is_help=True)
def merge(
    base: Path = typer.Argument(..., metavar="BASE", help="The model that was trained on, unquantised"),
    adapter: Path = typer.Argument(
        ...,
        metavar="ADAPTER|STATE",
        help="A file of Rookery, RWKV-PEFT or RWKV Runner, a folder of Hugging Face peft, or a run directory",
    ),
    out: Path = typer.Option(..., "--out", "-o", metavar="OUT", help="What to write: a .pth or .safetensors"),
    alpha: float = typer.Option(None, help="lora_alpha of its training, for a file that does not say it"),
    pissa_init: Path = typer.Option(
        None, "--pissa-init", metavar="FILE", help="What a PiSSA began with: init_pissa.pth, init_lora.pth or a folder"
    ),
    any_base: bool = typer.Option(
        False, "--any-base", help="Accept a base with other weights than those that were trained on"
    ),
    check: bool = typer.Option(True, "--check/--no-check", help="Compare logits before and after"),
    force: bool = typer.Option(False, "--force", help="Replace what is there"),
) -> None:
    """Write a model with an adapter or a tuned state merged in, one tensor at a time. Before the file appears, logits
    are compared with those of the model with the adapter beside it."""
    if pissa_init is not None and not pissa_init.exists():
        raise UserError(_("{path} does not exist", path=pissa_init))
    if out.exists() and not force:
        raise UserError(_("{path} exists; --force replaces it", path=out))

    from rookery.cli.progress import bar
    from rookery.formats import merge as run

    with bar(_("MB written")) as progress:
        done = run(
            base,
            adapter,
            out,
            alpha=alpha,
            pissa_init=pissa_init,
            any_base=any_base,
            check=check,
            progress=lambda written, total: progress(written // 1_000_000, -(-total // 1_000_000)),
        )
    typer.echo(
        _("{path}: {base} with the {kind}, {size} MB", path=out, base=base, kind=_(KINDS[done.kind]),
          size=f"{done.bytes / 1e6:,.1f}")
    )  # fmt: skip
    if done.vocabulary:
        typer.echo(_("vocabulary: {path}", path=done.vocabulary))
    if done.difference is not None:
        typer.echo(
            _(
                "Checked: it changes logits by up to {effect}; merged and beside the model, they differ by at most "
                "{difference}.",
                effect=f"{done.effect:.3g}",
                difference=f"{done.difference:.3g}",
            )
        )
