"""`rookery init`: the initial weights of a new model, as RWKV-LM's trainer writes them at stage 1, or grown."""

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
    """Write the initial weights of a new model. Takes the flags of rookery train; --precision is that of the file.
    With --load_model they come from that model, which may grow to the layers, width and token ids that are given."""
    parsed = parse(context.args)
    source = parsed.config.model.load_model
    facts = vocabulary = data_facts = None
    if source:
        from dataclasses import asdict

        from rookery.formats import read_weights, shape_of

        tensors = read_weights(source)
        facts = asdict(shape_of(tensors, source)) | {"file": source}
    elif not parsed.config.model.vocab_size and parsed.config.data.data_file:
        from rookery.data import open_datasets

        dataset, _validation = open_datasets(parsed.config.data, vocab_size=parsed.config.model.vocab_size)
        vocabulary, data_facts = dataset.tokenizer, vars(dataset.facts)
    elif parsed.config.model.vocab_size == 0:
        raise UserError(_("--vocab_size 0 makes a vocabulary of the data: give --data_file"))
    # Stage 1 is where a loaded model may grow.
    parsed.config.run.train_stage = 1
    resolved = resolve(parsed.config, parsed.origins, model_facts=facts, data_facts=data_facts)
    config = resolved.config
    tell(parsed)
    tell(resolved)
    path = out or Path(config.run.proj_dir) / "rwkv-init.pth"
    if path.exists() and not force:
        raise UserError(_("{path} exists; --force replaces it", path=path))

    import torch

    from rookery.formats import write_initial
    from rookery.formats.beside import carry, carry_from
    from rookery.models import ModelShape, create

    shape = ModelShape.of_config(config.model)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(str(config.run.precision), torch.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_initial(path, shape, config.run.random_seed, dtype, tensors if source else {}, source)
    kept = carry(vocabulary, path) if vocabulary else carry_from(source, path) if source else None
    with torch.device("meta"):
        size = sum(tensor.numel() for tensor in create(shape).parameters())
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
    if kept:
        typer.echo(_("vocabulary: {path}, {size} ids", path=kept, size=config.model.vocab_size))
