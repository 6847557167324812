"""`rookery eval`: exact answers on held-out arithmetic, perplexity and bits per byte of a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rookery.errors import UserError
from rookery.i18n import _

if TYPE_CHECKING:
    from rookery.eval.arithmetic import Result

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command("eval", no_args_is_help=True)
def evaluate(
    path: Path = typer.Argument(..., metavar="PATH", help="A .pth or .safetensors file, or a run directory"),
    arithmetic: str = typer.Option("", metavar="LEVEL", help="Ask held-out problems of this level of the demo's data"),
    n: int = typer.Option(500, "-n", min=1, help="How many problems"),
    seed: int = typer.Option(0, help="Which problems"),
    answers: Path = typer.Option(
        None, metavar="FILE", help="Ask for the last answer of each conversation of this .jsonl, and compare"
    ),
    text: Path = typer.Option(None, metavar="FILE", help="Perplexity and bits per byte of this text"),
    state: Path = typer.Option(None, metavar="FILE", help="Tuned states to mount"),
    adapter: Path = typer.Option(None, metavar="FILE", help="Adapter to add"),
    out: Path = typer.Option(None, "--out", "-o", metavar="FILE", help="Write the results as JSON"),
    tokenizer: str = typer.Option("", help="world or a vocabulary file; found beside the weights when left out"),
    device: str = typer.Option("auto", help="cpu, cuda or auto"),
) -> None:
    """Measure a model: exact answers to questions that it never saw, or how well it predicts a text."""
    from rookery.data.arithmetic import LEVELS, find_level

    if not arithmetic and text is None and answers is None:
        levels = ", ".join(LEVELS)
        raise UserError(
            _(
                "Say what to measure: --arithmetic LEVEL (one of {levels}), --answers FILE, or --text FILE.",
                levels=levels,
            )
        )
    level = find_level(arithmetic) if arithmetic else None

    from rookery.cli.progress import bar
    from rookery.eval import answers as exact
    from rookery.eval import arithmetic as suite
    from rookery.eval import perplexity, write_report
    from rookery.infer import open_model

    model, vocabulary = open_model(path, tokenizer_name=tokenizer, device=device, state=state, adapter=adapter)
    results: dict[str, Any] = {}
    if level:
        with bar(_("problems")) as progress:
            result = suite.evaluate(model, vocabulary, level, n=n, seed=seed, progress=progress)
        results["arithmetic"] = result.report()
        print_arithmetic(result)
    if answers:
        with bar(_("answers")) as progress:
            asked = exact.evaluate(model, vocabulary, answers, progress=progress)
        results["answers"] = exact.report(answers, asked)
        print_samples(results["answers"]["samples"])
        share, count = f"{results['answers']['exact']:.1%}", len(asked)
        typer.echo(_("{path}: {share} of {n} answered exactly.", path=answers, share=share, n=count))
    if text:
        with bar(_("tokens")) as progress:
            measured = perplexity.measure_file(model, vocabulary, text, progress=progress)
        results["text"] = {"file": str(text), **measured.report()}
        typer.echo(
            _(
                "{path}: loss {loss}, perplexity {perplexity} per token, {bits} bits per byte ({tokens} tokens)",
                path=text,
                loss=f"{measured.loss:.4f}",
                perplexity=f"{measured.perplexity:.3f}",
                bits=f"{measured.bits_per_byte:.4f}",
                tokens=measured.tokens,
            )
        )
    if out:
        write_report(out, results)
        typer.echo(_("Results: {path}", path=out))


def print_arithmetic(result: Result) -> None:
    """Ten answers, right and wrong, and the shares of right ones."""
    report = result.report()
    print_samples(report["samples"])
    for heading, part in ((_("by form"), report["by_form"]), (_("by script"), report["by_script"])):
        shares = "  ".join(f"{name} {value:.1%}" for name, value in part.items())
        typer.echo(f"{heading}: {shares}")
    typer.echo(
        _(
            "Level {level}: {share} of {n} held-out problems answered exactly.",
            level=report["level"],
            share=f"{report['exact']:.1%}",
            n=report["n"],
        )
    )


def print_samples(samples: list[dict[str, Any]]) -> None:
    """Questions and answers, each marked right or wrong."""
    for sample in samples:
        mark = "✓" if sample["right"] else "✗ " + _("expected {answer}", answer=sample["expected"])
        typer.echo(f"  User: {sample['user']}\n  Assistant: {sample['assistant']}   {mark}\n")
