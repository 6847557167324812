"""`rookery demo`: the arithmetic model from nothing: data, training, evaluation, and what to do next."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rookery.cli.flags import SETTINGS, tell
from rookery.config import parse
from rookery.errors import UserError
from rookery.i18n import _

if TYPE_CHECKING:
    from rookery.config import Parsed
    from rookery.data.arithmetic import Level

app = typer.Typer(rich_markup_mode=None, add_completion=False)

DEFAULT_LEVEL = "scripts"
"""The hardest that two CPU cores learn to 95 % in well under ten minutes."""

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EEXIST)
"""What the system says of a folder that cannot be written or is full."""


@dataclass(frozen=True)
class Recipe:
    """How the model of one level is trained.

    Attributes:
        dialogues: in the training data.
        tokenizer: as `rookery data make --tokenizer` takes it.
        train: leaves of the training configuration; those left out follow its rules.
    """

    dialogues: int
    tokenizer: str = "compact"
    train: dict[str, Any] = field(default_factory=dict)


SMALL = {
    "version": "x070",
    "n_layer": 3,
    "n_embd": 96,
    "head_size": 48,
    "ctx_len": 128,
    "micro_bsz": 8,
    "loss_mask": "answer",
    "lr_init": 4e-3,
    "lr_final": 1e-5,
    "warmup_steps": 20,
    "my_exit_tokens": 10_000_000,
    "epoch_save": 0,
}

RECIPES: dict[str, Recipe] = {
    "basic": Recipe(40_000, train=SMALL),
    "scripts": Recipe(40_000, train=SMALL),
    "equations": Recipe(40_000, train=SMALL),
    "languages": Recipe(40_000, train=SMALL),
    "hundreds": Recipe(40_000, train=SMALL),
    "full": Recipe(
        2_000_000,
        "world",
        {
            "version": "x070",
            "n_layer": 12,
            "n_embd": 768,
            "ctx_len": 512,
            "micro_bsz": 32,
            "lr_init": 6e-4,
            "lr_final": 6e-5,
        },
    ),
}
"""One recipe for each level of `rookery.data.arithmetic`."""


@app.command(context_settings=SETTINGS, options_metavar="[OPTIONS] [--FLAG VALUE]...")
def demo(
    context: typer.Context,
    level: str = typer.Option(None, help="What the data ask: basic, scripts, equations, languages, hundreds or full"),
    out: Path = typer.Option(Path("out/demo"), help="Folder for the data and the run"),
    dialogues: int = typer.Option(None, min=1, help="Dialogues in the training data; the level's recipe when left out"),
    n: int = typer.Option(500, "-n", min=1, help="Held-out problems to evaluate"),
) -> None:
    """Train the arithmetic model from nothing, and see it answer. Flags of rookery train go over the level's recipe.

    Run the same command again to go on with an interrupted demo.
    """
    begun = time.monotonic()
    try:
        plan = Plan.open(out, level, dialogues, context.args)
        plan.make_data()
        plan.train()
        plan.evaluate(n)
        plan.draw()
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(_("Cannot write in {path}: {reason}", path=out, reason=error.strerror or error)) from error
    typer.echo("\n" + _("Finished in {time}.", time=spoken(time.monotonic() - begun)) + "\n" + plan.what_next())


class Plan:
    """The steps of one demo in its folder. Each step that is already done says so and is passed over."""

    def __init__(self, out: Path, level: Level, dialogues: int, flags: list[str]) -> None:
        self.out = out
        self.level = level
        self.dialogues = dialogues
        self.recipe = RECIPES[level.name]
        self.data = out / "data" / "arithmetic"
        self.exact = 0.0
        words = [word for leaf, value in self.recipe.train.items() for word in (f"--{leaf}", str(value))]
        here = ["--data_file", str(self.data), "--proj_dir", str(out)]
        self.parsed: Parsed = parse([*words, *flags, *here])

    @classmethod
    def open(cls, out: Path, level_name: str | None, dialogues: int | None, flags: list[str]) -> Plan:
        """The demo in folder `out`: a new one, or the one that was begun there.

        Raises:
            UserError: the folder belongs to something else, or to a demo of another level or size.
        """
        from rookery.data.arithmetic import find_level

        if any(flag.replace("-", "_").startswith(("__data_file", "__proj_dir")) for flag in flags):
            raise UserError(_("rookery demo sets --data_file and --proj_dir itself. Choose the folder with --out."))
        file = out / "demo.json"
        asked = {"level": level_name, "dialogues": dialogues, "flags": flags or None}
        begun = _read_marker(out, file)
        for name, value in asked.items():
            if begun and value is not None and value != begun[name]:
                raise UserError(
                    _(
                        "{path} holds a demo with {name} {before}, not {after}. Choose another --out, or remove it.",
                        path=out,
                        name=name,
                        before=begun[name],
                        after=value,
                    )
                )
        level = find_level(begun["level"] if begun else level_name or DEFAULT_LEVEL)
        settings = begun or {
            "level": level.name,
            "dialogues": dialogues or RECIPES[level.name].dialogues,
            "flags": flags,
        }
        plan = cls(out, level, settings["dialogues"], settings["flags"])
        tell(plan.parsed)
        if not begun:
            plan.data.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return plan

    def make_data(self) -> None:
        """Dialogues as jsonl, then binidx."""
        from rookery import data
        from rookery.cli.data import progress_display
        from rookery.cli.progress import bar
        from rookery.data import arithmetic

        seed = max(0, self.parsed.config.run.random_seed)
        source = self.data.with_suffix(".jsonl")
        title = _("Data: {n} dialogues of level {level}", n=f"{self.dialogues:,}", level=self.level.name)
        with phase(1, title):
            if source.exists():
                say(_("{path} is there already", path=source))
            else:
                with bar(_("dialogues")) as progress:
                    size = arithmetic.write(source, self.level, self.dialogues, seed=seed, progress=progress)
                say(f"{source}, {size / 1e6:.1f} MB")
        with phase(2, _("Tokens: binidx for training")):
            if all(Path(f"{self.data}{suffix}").exists() for suffix in (".bin", ".idx")):
                say(_("{path} is there already", path=f"{self.data}.bin"))
                return
            with progress_display() as show:
                made = data.make(source, 1, self.data, tokenizer=self.recipe.tokenizer, seed=seed, progress=show)
            say(
                _(
                    "{path}.bin and .idx: {tokens} tokens, {size} token ids",
                    path=self.data,
                    tokens=f"{made.tokens:,}",
                    size=f"{made.tokenizer.vocab_size:,}",
                )
            )

    def train(self) -> None:
        """From initial weights, or from the last checkpoint, to rwkv-final.pth."""
        import torch

        from rookery.train import run

        with phase(3, _("Training RWKV-7; Ctrl-C saves and stops, and the same command goes on")):
            if self.level.name == "full" and not torch.cuda.is_available():
                say(_("Level full is meant for a GPU and will take days here; rookery demo alone takes minutes."))
            run(self.parsed.config, self.parsed.origins)

    def evaluate(self, n: int) -> None:
        """Held-out problems; leaves eval.json."""
        from rookery.cli.eval import print_arithmetic
        from rookery.cli.progress import bar
        from rookery.eval import arithmetic, write_report
        from rookery.infer import open_model

        file = self.out / "eval.json"
        with phase(4, _("Evaluation: {n} problems that are not in the data", n=n)):
            model, vocabulary = open_model(self.out)
            with bar(_("problems")) as progress:
                result = arithmetic.evaluate(model, vocabulary, self.level, n=n, progress=progress)
            write_report(file, {"arithmetic": result.report()})
            typer.echo()
            print_arithmetic(result)
            say(str(file))
        self.exact = result.exact

    def draw(self) -> None:
        """Leaves loss.png."""
        from rookery.eval.plot import draw_loss

        with phase(5, _("Picture of the loss")):
            file = self.out / "loss.png"
            title = f"RWKV-7, arithmetic level {self.level.name}: {self.exact:.1%} exact"
            draw_loss(self.out / "metrics.jsonl", file, title)
            say(str(file))

    def what_next(self) -> str:
        """How to go on from here, as commands to copy."""
        config = self.parsed.config
        shape = f"--n_layer {config.model.n_layer} --n_embd {config.model.n_embd} --head_size {config.model.head_size}"
        size = f"--ctx_len {config.data.ctx_len} --micro_bsz {config.run.micro_bsz}"
        greedy = " --greedy" if self.recipe.tokenizer == "world" else ""
        return "\n".join(
            (
                _("Talk to it:"),
                f"  rookery chat {self.out}{greedy}",
                _("Ask it other problems:"),
                f"  rookery eval {self.out} --arithmetic {self.level.name} --seed 1",
                _("Train on your own data, a file my.jsonl with lines like {example}:", example=EXAMPLE),
                f"  rookery data make my.jsonl 1 {config.data.ctx_len} --tokenizer {self.recipe.tokenizer} -o data/my",
                f"  rookery train --data_file data/my {shape} {size} --proj_dir out/my",
                "  rookery chat out/my",
            )
        )


EXAMPLE = r'{"text": "User: hello\n\nAssistant: hi"}'


def _read_marker(out: Path, file: Path) -> dict[str, Any] | None:
    """What demo.json says of the demo in `out`; None when `out` is missing or empty.

    Raises:
        UserError: `out` is a file, or holds something else than a demo.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(_("{path} is a file. Choose another folder with --out.", path=out))
    if not any(out.iterdir()):
        return None
    try:
        marker = json.loads(file.read_text(encoding="utf-8"))
        return {name: marker[name] for name in ("level", "dialogues", "flags")}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            _("{path} holds files that are not a demo's. Choose another folder with --out.", path=out)
        ) from None


@contextmanager
def phase(number: int, title: str) -> Iterator[None]:
    """Say what is done now, and how long it took."""
    typer.echo(f"\n[{number}/5] {title}")
    begun = time.monotonic()
    yield
    say(_("took {time}", time=spoken(time.monotonic() - begun)))


def say(text: str) -> None:
    """A line below the title of a phase."""
    typer.echo(f"      {text}")


def spoken(seconds: float) -> str:
    """12.3 s, or 8 min 5 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
