"""`rookery train` from a recipe and flags, through the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rookery.cli import run


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    text = tmp_path / "corpus.txt"
    text.write_text("the cat sat on the mat. " * 100, encoding="utf-8")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        [model]
        n_layer = 1
        n_embd = 32
        head_size = 16
        vocab_size = 0
        [data]
        data_file = '{text}'
        ctx_len = 16
        my_exit_tokens = 256
        [run]
        micro_bsz = 4
        kernel = 'chunked'
        proj_dir = '{tmp_path / "out"}'
        """,
        encoding="utf-8",
    )
    return ["train", str(recipe), "--accelerator", "cpu"]


def test_the_same_command_goes_on_and_another_one_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--fla", "--enable_progress_bar", "True", "--strategy", "deepspeed_stage_2"]) == 0
    said = capsys.readouterr()
    assert "--fla: wkv7: back-end 'fla' cannot serve this call: runs on a GPU" in said.out
    assert (tmp_path / "out" / "rwkv-final.pth").exists()
    assert (tmp_path / "out" / "vocab.json").exists()

    assert run(words) == 0, "the vocabulary of the first session is found again"
    said = capsys.readouterr()
    assert "all 4 steps were already trained" in said.out + said.err

    assert run([*words, "--lr_init", "1e-4"]) == 2
    assert "lr_init: 0.01 -> 0.0001" in capsys.readouterr().err


def test_a_checkpoint_of_other_dimensions_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 0
    assert run([*words, "--n_layer", "2"]) == 2
    assert "n_layer: 2 (--n_layer 2), the file has 1" in capsys.readouterr().err


STARVED = """
import resource, sys
import psutil, rookery.train.run
from rookery.cli import run
room = psutil.Process().memory_info().vms + (400 << 20)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process is Linux's")
def test_memory_that_runs_out_ends_in_one_message(words: list[str], tmp_path: Path) -> None:
    """A process that may not have what the machine has, so that the estimate beforehand does not see it."""
    starved = [sys.executable, "-c", STARVED, *words, "--micro_bsz", "20160", "--my_exit_tokens", str(1 << 21)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(starved, env=env, capture_output=True, text=True, encoding="utf-8", check=False)
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
    assert "ran out of memory at step 1" in ended.stderr
    assert "--micro_bsz" in ended.stderr


def test_memory_that_runs_out_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "op", "linear", "--n_embd", "100000000", "--rounds", "1"]) == 2
    assert "Out of memory: can't allocate" in capsys.readouterr().err
