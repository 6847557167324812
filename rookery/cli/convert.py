"""`rookery convert`: models, states and adapters in the formats of other programs."""

from __future__ import annotations

from pathlib import Path

import typer

from rookery.i18n import N_, _

app = typer.Typer(rich_markup_mode=None, add_completion=False)

KINDS = {"model": N_("model"), "state": N_("tuned state"), "adapter": N_("adapter")}


@app.command("convert", no_args_is_help=True)
def convert(
    path: Path = typer.Argument(..., metavar="IN", help="A file of weights, a Hugging Face or a run directory"),
    out: Path = typer.Option(
        ..., "--out", "-o", metavar="OUT", help="What to write; its ending says the format, none is a directory"
    ),
    to: str = typer.Option(None, metavar="FORMAT", help="pth, safetensors, st, gguf, hf, or rwkv for a state"),
    dtype: str = typer.Option(None, help="fp32, bf16, fp16, or q8_0 for GGUF; that of the file when left out"),
    tokenizer: str = typer.Option(
        "", help="world, a vocabulary file, or none; found beside the weights when left out (gguf and hf carry it)"
    ),
    version: str = typer.Option(None, help="x052, x060 or x070: the model of a state, for --to rwkv"),
    alpha: float = typer.Option(None, help="lora_alpha of its training, for a file that does not say it"),
    pissa_init: Path = typer.Option(
        None, "--pissa-init", metavar="FILE", help="What a PiSSA began with: init_pissa.pth, init_lora.pth or a folder"
    ),
    force: bool = typer.Option(False, "--force", help="Replace what is there"),
) -> None:
    """Write a model, a tuned state or an adapter in the format of another program, one tensor at a time."""
    from rookery.cli.progress import bar
    from rookery.formats.convert import convert as run
    from rookery.infer.open import find_tokenizer
    from rookery.tokenizer import Tokenizer

    def vocabulary(size: int) -> Tokenizer | None:
        return None if tokenizer == "none" else find_tokenizer(path, size, tokenizer)

    with bar(_("MB written")) as progress:
        done = run(
            path,
            out,
            to=to,
            precision=dtype,
            tokenizer=vocabulary,
            version=version,
            alpha=alpha,
            pissa_init=pissa_init,
            force=force,
            progress=lambda written, total: progress(written // 1_000_000, -(-total // 1_000_000)),
        )
    typer.echo(
        _(
            "{path}: {kind}, {tensors} tensors, {size} MB",
            path=done.path,
            kind=_(KINDS[done.kind]),
            tensors=done.tensors,
            size=f"{done.bytes / 1e6:,.1f}",
        )
    )
    if done.vocabulary:
        typer.echo(_("vocabulary: {path}", path=done.vocabulary))
