"""`rookery eval`: exact answers on held-out arithmetic, perplexity of a text or data, the tasks of lm-eval."""

from __future__ import annotations

from datetime import datetime
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
    text: Path = typer.Option(
        None, metavar="FILE", help="Perplexity and bits per byte of this text, or of binidx data by their prefix"
    ),
    tasks: list[str] = typer.Option(
        [],
        metavar="NAME|FILE.yaml",
        help="A task of lm-eval, or a task file of your own, which may run Python beside it; can be repeated",
    ),
    few_shot: int = typer.Option(None, min=0, help="Solved examples before each question of a task"),
    as_chat: bool = typer.Option(False, "--as-chat", help="Put the questions of tasks as a user's"),
    limit: int = typer.Option(0, min=0, help="Only the first so many examples of each task, or documents of data"),
    state: Path = typer.Option(None, metavar="FILE", help="Tuned states to mount"),
    adapter: Path = typer.Option(None, metavar="FILE", help="Adapter to add"),
    out: Path = typer.Option(
        None,
        "--out",
        "-o",
        metavar="FILE",
        help="Where the results go as JSON; eval-DATE-TIME.json in a run directory when left out",
    ),
    tokenizer: str = typer.Option("", help="world or a vocabulary file; found beside the weights when left out"),
    device: str = typer.Option("auto", help="cpu, cuda or auto"),
) -> None:
    """Measure a model: exact answers to questions that it never saw, tasks, or how well it predicts a text."""
    from rookery.data.arithmetic import LEVELS, find_level

    if not arithmetic and text is None and answers is None and not tasks:
        levels = ", ".join(LEVELS)
        raise UserError(
            _(
                "Say what to measure: --arithmetic LEVEL (one of {levels}), --answers FILE, --text FILE, or "
                "--tasks NAME.",
                levels=levels,
            )
        )
    level = find_level(arithmetic) if arithmetic else None
    if tasks:
        from rookery.eval import lm_eval_tasks

    from rookery.cli.progress import bar
    from rookery.eval import answers as exact
    from rookery.eval import arithmetic as suite
    from rookery.eval import check_place, perplexity, write_report
    from rookery.infer import open_model

    if out is None and (path / "config.toml").exists():
        out = path / f"eval-{datetime.now():%Y%m%d-%H%M%S}.json"
    if out:
        check_place(out)
    model, vocabulary = open_model(path, tokenizer_name=tokenizer, device=device, state=state, adapter=adapter)
    results: dict[str, Any] = {"model": model_facts(path, state, adapter)}
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
            measured = perplexity.measure_file(model, vocabulary, text, limit=limit, progress=progress)
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
    if tasks:
        names = [name for names in tasks for name in names.split(",")]
        with bar(_("requests")) as progress:
            results["tasks"] = lm_eval_tasks.evaluate(
                model, vocabulary, names, few_shot=few_shot, limit=limit, as_chat=as_chat, progress=progress
            )
        print_tasks(results["tasks"]["results"])
    if out:
        write_report(out, results)
        typer.echo(_("Results: {path}", path=out))


def model_facts(path: Path, state: Path | None, adapter: Path | None) -> dict[str, Any]:
    """What eval.json holds under "model": what was measured, and when."""
    from rookery.formats.load import files_of

    own = files_of(path)
    mounted = [file for file in (state, adapter) if file]
    return {
        "path": str(path),
        "files": [str(file) for file in (own[:1] + mounted if mounted else own)],
        "measured": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


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


def print_tasks(results: dict[str, dict[str, Any]]) -> None:
    """The figures of each task, each with its standard error."""
    from rookery.cli.table import print_table

    rows = []
    for name, figures in results.items():
        for metric, value in figures.items():
            plain, _comma, filtered = metric.partition(",")
            if isinstance(value, float) and not plain.endswith("_stderr"):
                error = figures.get(f"{plain}_stderr{_comma}{filtered}")
                spread = f"± {error:.4f}" if isinstance(error, float) else ""
                rows.append((name, metric, f"{value:.4f}", spread, str(figures["n"] or "")))
    print_table(rows, (_("task"), _("measure"), _("value"), "", _("examples")))
