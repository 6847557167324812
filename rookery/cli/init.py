"""`rookery init`: the initial weights of a new model, as RWKV-LM's trainer writes them at stage 1."""

from __future__ import annotations

from pathlib import Path

import typer

from rookery.cli.flags import METAVAR, SETTINGS, ModelFlagsCommand, tell
from rookery.config import parse, resolve
from rookery.errors import UserError
from rookery.i18n import _

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(cls=ModelFlagsCommand, context_settings=SETTINGS, options_metavar=METAVAR, no_args_is_help=True)
def init(
    context: typer.Context,
    out: Path = typer.Option(None, "--out", "-o", help="The file to write; rwkv-init.pth in --proj_dir when left out"),
    force: bool = typer.Option(False, "--force", help="Replace the file if it exists"),
) -> None:
    """Write the initial weights of a new model. Takes the flags of rookery train; --precision is that of the file."""
    parsed = parse(context.args)
    config = resolve(parsed.config, parsed.origins).config
    tell(parsed)
    if config.model.load_model:
        raise UserError(_("rookery init makes a new model: leave --load_model out"))
    path = out or Path(config.run.proj_dir) / "rwkv-init.pth"
    if path.exists() and not force:
        raise UserError(_("{path} exists; --force replaces it", path=path))

    import torch

    from rookery.formats import write_pth
    from rookery.models import ModelShape, create, initialise

    model = create(ModelShape.of_config(config.model))
    initialise(model, config.run.random_seed)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(str(config.run.precision), torch.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_pth(path, {name: tensor.to(dtype) for name, tensor in model.state_dict().items()})
    size = sum(tensor.numel() for tensor in model.parameters())
    typer.echo(
        _(
            "{path}: {version}, {n_layer} layers, width {n_embd}, {size} parameters",
            path=path,
            version=config.model.version,
            n_layer=config.model.n_layer,
            n_embd=config.model.n_embd,
            size=f"{size:,}",
        )
    )
