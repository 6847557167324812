"""`rookery demo`, shrunk, through the real command: from an empty folder to a model that answers, and again."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import time

import pytest
from command import COMMAND, environment

from rookery.cli.demo import RECIPES
from rookery.config import parse
from rookery.data.arithmetic import LEVELS

STEPS = 24
TINY = (
    *("--dialogues", "60", "-n", "20"),
    *("--n_layer", "1", "--n_embd", "32", "--head_size", "32", "--ctx_len", "64", "--micro_bsz", "4"),
    *("--my_exit_tokens", str(64 * 4 * STEPS), "--warmup_steps", "2"),
)


@pytest.fixture(scope="module")
def finished(rookery, tmp_path_factory):
    """A finished demo: its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out" / "demo"
    done = rookery("demo", "--out", out, *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_it_leaves_everything_it_promises(finished) -> None:
    out, _screen = finished
    lines = (out / "data" / "arithmetic.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 60
    assert all(json.loads(line)["text"].startswith("User: ") for line in lines)
    for name in (
        "data/arithmetic.bin",
        "data/arithmetic.idx",
        "rwkv-init.pth",
        "rwkv-final.pth",
        "vocab.txt",
        "config.toml",
    ):
        assert (out / name).stat().st_size > 0, name
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert len(losses) == STEPS
    vocab_size = len((out / "vocab.txt").read_text(encoding="utf-8").splitlines()) + 1
    assert losses[-1] < losses[0]
    assert abs(losses[0] - math.log(vocab_size)) < 0.5, "an untrained model knows nothing"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "eval.json").read_text(encoding="utf-8"))["arithmetic"]
    assert result["n"] == 20
    assert result["level"] == json.loads((out / "demo.json").read_text(encoding="utf-8"))["level"]
    assert 0 <= result["exact"] <= 1
    assert len(result["samples"]) == 10


def test_it_shows_each_phase_and_ten_answers(finished) -> None:
    out, screen = finished
    assert [int(number) for number in re.findall(r"^\[(\d)/5\] ", screen, re.M)] == [1, 2, 3, 4, 5]
    assert len(re.findall(r"took [\d.]+ s", screen)) == 5
    assert len(re.findall(r"^  User: .*\n  Assistant: ", screen, re.M)) == 10
    assert re.search(rf"step {STEPS}/{STEPS}  loss [\d.]+  lr \S+  \S+ tokens/s", screen)
    assert f"rookery chat {out}" in screen


def test_the_commands_it_ends_with_work(finished, rookery, tmp_path) -> None:
    _out, screen = finished
    commands = [line.split()[1:] for line in screen.splitlines() if line.startswith("  rookery ")]
    assert [words[0] for words in commands] == ["chat", "eval", "data", "train", "chat"]
    chat, evaluate, make, train, chat_own = commands
    done = rookery(*chat, text="1+2=?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    done = rookery(*evaluate, "-n", 20)
    assert "of 20 held-out problems" in done.stdout, done.stderr

    example = re.search(r"lines like (\{.*\})", screen)
    assert example
    (tmp_path / "my.jsonl").write_text(f"{example[1]}\n" * 40, encoding="utf-8")
    for words in (make, train):
        done = rookery(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    done = rookery(*chat_own, "--max-tokens", 4, text="hello\n", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_again_it_says_that_it_is_finished_and_evaluates(finished, rookery) -> None:
    out, _screen = finished
    weights = (out / "rwkv-final.pth").stat().st_mtime_ns
    before = (out / "eval.json").read_bytes()
    (out / "eval.json").unlink()
    done = rookery("demo", "--out", out, "-n", 20)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is there already") == 2
    assert f"all {STEPS} steps were already trained" in done.stdout
    assert (out / "rwkv-final.pth").stat().st_mtime_ns == weights
    assert (out / "eval.json").read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to one child on Windows")
def test_interrupted_it_goes_on_to_the_same_end(finished, rookery, tmp_path) -> None:
    whole, _screen = finished
    out = tmp_path / "demo"
    process = subprocess.Popen(
        [*COMMAND, "demo", "--out", str(out), *TINY],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
    )
    metrics = out / "metrics.jsonl"
    end = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") >= 3):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    screen = process.communicate(timeout=60)[0].decode("utf-8")
    if process.returncode == 130:
        assert "The same command goes on" in screen
    done = rookery("demo", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr

    def losses(folder):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    assert losses(out) == losses(whole)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--level", "basics"], "no arithmetic level 'basics'"),
        (["--out", "{tmp}/file"], "is a file"),
        (["--out", "{tmp}"], "files that are not a demo's"),
        (["--out", "{done}", "--level", "basic"], "holds a demo with level scripts, not basic"),
        (["--out", "{done}", "--dialogues", "61"], "holds a demo with dialogues 60, not 61"),
        (["--out", "{tmp}/new", "--proj_dir", "x"], "--out"),
        (["--out", "{tmp}/new", "--n_emb", "32"], "n_embd"),
    ],
)
def test_what_cannot_be_is_one_message(finished, rookery, tmp_path, args, message) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    done = rookery("demo", *(arg.format(tmp=tmp_path, done=finished[0]) for arg in args), cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the administrator may write everywhere")
def test_a_folder_that_cannot_be_written(rookery, tmp_path) -> None:
    tmp_path.chmod(0o500)
    done = rookery("demo", "--out", tmp_path / "demo")
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk(rookery, tmp_path) -> None:
    out = tmp_path / "demo"
    (out / "data").mkdir(parents=True)
    (out / "demo.json").write_text('{"level": "basic", "dialogues": 60, "flags": []}', encoding="utf-8")
    (out / "data" / "arithmetic.jsonl.partial").symlink_to("/dev/full")
    done = rookery("demo", "--out", out)
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_level_has_a_recipe_that_parses() -> None:
    assert set(RECIPES) == set(LEVELS)
    for recipe in RECIPES.values():
        words = [word for leaf, value in recipe.train.items() for word in (f"--{leaf}", str(value))]
        assert parse(words).config.run.micro_bsz >= 1
