"""The `rookery` command as a person uses it: help, exit codes, mistakes."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from rookery import cli
from rookery.cli import COMMANDS, run
from rookery.errors import Interrupted, UserError
from rookery.infer import open_model


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: rookery {name}")


def test_help_lists_exactly_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    listed = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed if line.startswith("  ") and line[2] != " "] == list(COMMANDS)


def test_help_in_chinese(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--lang", "zh", "--help"]) == 0
    assert "训练模型" in capsys.readouterr().out
    assert run(["--lang", "zh", "train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "上下文长度" in shown
    assert "接着训练" in shown


def test_train_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    from rookery.config.tree import SECTION_OF

    assert run(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert [leaf for leaf in SECTION_OF if f"--{leaf} " not in shown.replace("\n", " ")] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["--lang", "de", "train"], "de is not one of en, zh"),
        (["train", "--ctx_lne", "3"], "--ctx_lne is not a flag of rookery train; did you mean --ctx_len?"),
        (["train", "nowhere.toml"], "nowhere.toml does not exist"),
        (["train", "--config"], "requires an argument"),
        (["--lang", "zh", "train", "--ctx_lne", "3"], "rookery train 没有参数 --ctx_lne；是不是想写 --ctx_len？"),
        (["inspect", "nowhere.pth"], "nowhere.pth does not exist"),
    ],
)
def test_a_mistake_is_told_in_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 2
    shown = told(capsys)
    assert message in shown
    assert "Traceback" not in shown


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | type[BaseException]], None]:
    """Makes a further subcommand, `rookery extra`, that raises what it is given."""

    def make(error: Exception | type[BaseException]) -> None:
        app = typer.Typer(rich_markup_mode=None)

        @app.command()
        def extra() -> None:
            raise error

        module = types.ModuleType("rookery.cli.extra")
        module.app = app  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "rookery.cli.extra", module)
        monkeypatch.setitem(COMMANDS, "extra", "Raise")

    return make


class WhileCompiling(RuntimeError):
    """How a compilation fails into which Ctrl-C fell: Python drops what is raised where foreign code calls it."""

    def __init__(self) -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt

        ctypes.CFUNCTYPE(None)(interrupt)()
        super().__init__("no compiled object yet")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("recipe.toml:3: no"), 2, "recipe.toml:3: no"),
        (Interrupted("Stopped; the same command goes on."), 130, "Stopped; the same command goes on."),
        (KeyboardInterrupt, 130, "Interrupted."),
        (WhileCompiling, 130, "Interrupted."),
        (PermissionError(13, "denied", "/root/x"), 2, "no permission: /root/x"),
        (typer.Exit(3), 3, ""),
    ],
)
def test_exit_status(
    command: Callable[..., None], error: Exception, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command(error)
    assert run(["extra"]) == status
    assert told(capsys) == message


def test_our_own_fault_shows_where_and_asks_for_a_report(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(ZeroDivisionError("ours"))
    assert run(["extra"]) == 1
    shown = told(capsys)
    assert shown.startswith("Traceback")
    assert shown.endswith(
        "ZeroDivisionError: ours\nThis is a fault of Rookery, not yours: please report it with the text above."
    )


def test_as_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rookery", "--lang", "en", "train", "--precison", "bf16"],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 2
    assert (done.stdout, done.stderr.strip()) == (
        "",
        "--precison is not a flag of rookery train; did you mean --precision?",
    )


def test_explain_says_where_every_value_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("a short text of few characters. " * 40, encoding="utf-8")
    recipe = tmp_path / "r.toml"
    recipe.write_text("[data]\nctx_len = 16\n", encoding="utf-8")
    out = tmp_path / "out"
    flags = "--n_layer 1 --n_embd 64 --vocab_size 0 --micro_bsz 4 --lr_init 1e-3 --explain"
    assert run(["train", str(recipe), *flags.split(), "--data_file", str(text), "--proj_dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert "memory (estimate): weights" in said
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in said.splitlines() if " " in line}
    assert rows["n_layer"] == ["1", "--n_layer 1"]
    assert rows["lr_final"] == ["0.0006", "rule: 0.04/n_embd"]
    assert rows["lr_init"] == ["0.001", "--lr_init 1e-3"]
    assert rows["ctx_len"] == ["16", f"{recipe}:2"]
    assert rows["vocab_size"][1].startswith("data: ")
    assert rows["beta1"] == ["0.9", "default"]
    assert not out.exists(), "--explain writes nothing"


def test_the_console_encoding_cannot_end_a_command() -> None:
    """A Chinese message on a console of another code page is shown with question marks."""
    code = (
        "import sys, io; sys.stdout = io.TextIOWrapper(sys.stdout.buffer, 'cp1252'); "
        "from rookery.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "--lang", "zh", "--help"], capture_output=True)
    assert done.returncode == 0
    assert b"????" in done.stdout


def test_commands_are_translated_again_after_a_change_of_language(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--lang", "zh", "init", "--help"]) == 0
    assert "初始权重" in capsys.readouterr().out
    assert run(["--lang", "en", "init", "--help"]) == 0
    assert "Write the initial weights" in capsys.readouterr().out
    assert cli.COMMANDS["init"] == "Write the initial weights of a new model"


def test_a_reader_that_goes_away_is_not_told_of_a_fault() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rookery", "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _out, error = process.communicate(timeout=60)
    assert error == b""


def test_a_new_model_has_the_vocabulary_of_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("a short text of few characters. " * 40, encoding="utf-8")
    words = ["init", "--n_layer", "1", "--n_embd", "64", "--vocab_size", "0"]
    out = tmp_path / "new" / "small.pth"
    assert run([*words, "--data_file", str(text), "-o", str(out)]) == 0
    characters = len(set(text.read_text(encoding="utf-8")))
    assert f"vocabulary: {out.with_name('small.vocab.json')}, {characters} ids" in capsys.readouterr().out
    model, vocabulary = open_model(out, device="cpu")
    assert (model.shape.vocab_size, vocabulary.vocab_size) == (characters, characters)
    assert vocabulary.decode(vocabulary.encode("short")) == "short"
    assert run([*words, "-o", str(tmp_path / "none.pth")]) == 2
    assert "give --data_file" in capsys.readouterr().err
    assert not (tmp_path / "none.pth").exists()
