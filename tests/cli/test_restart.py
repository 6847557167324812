"""Where `rookery train` and `rookery init` begin, through the command line, for every version."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rookery.cli import run
from rookery.data import BinIdxWriter
from rookery.formats import read_weights, write_pth
from rookery.models import ModelShape, create, initialise
from rookery.tokenizer import World

VOCAB, CTX, BATCH, EPOCH_STEPS = 300, 16, 2, 3
VERSIONS = ("x052", "x060", "x070")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "small"
    with BinIdxWriter(prefix, np.uint16, World()) as writer:
        writer.add(np.random.RandomState(0).randint(1, VOCAB, 1000).astype(np.uint16))
    return prefix


class Runs:
    """Commands in one run directory."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self.data = data

    def train(self, epochs: int, *words: object) -> int:
        tokens = epochs * EPOCH_STEPS * BATCH * CTX
        flags = {
            "data_file": self.data, "ctx_len": CTX, "micro_bsz": BATCH, "epoch_steps": EPOCH_STEPS, "epoch_save": 1,
            "my_exit_tokens": tokens, "proj_dir": self.folder, "accelerator": "cpu", "kernel": "chunked",
            "lr_init": 1e-3, "lr_final": 1e-4,
        }  # fmt: skip
        return run(
            ["train", *(str(word) for flag, value in flags.items() for word in (f"--{flag}", value)), *map(str, words)]
        )

    def forget_checkpoints(self) -> None:
        """As RWKV-LM leaves a run directory: weights only."""
        for checkpoint in (self.folder / "checkpoints").iterdir():
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()

    def epochs(self) -> list[str]:
        """First and last field of each mini-epoch in train_log.txt: its number, and that of this session."""
        lines = (self.folder / "train_log.txt").read_text(encoding="utf-8").splitlines()
        return [f"{line.split()[0]} {line.split()[-1]}" for line in lines if line[0].isdigit()]

    def steps(self) -> list[int]:
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["step"] for line in lines]


@pytest.fixture
def runs(tmp_path: Path, data: Path) -> Runs:
    return Runs(tmp_path / "out", data)


def write_official(file: Path, version: str) -> ModelShape:
    """A checkpoint with dimensions that no default gives, as it comes from somewhere else: bf16, vectors squeezed."""
    ranks = {"x052": {}, "x060": {"mix": 16, "decay": 24}, "x070": {"w": 8, "a": 16, "v": 8, "g": 24}}[version]
    shape = ModelShape(version, 3, 32, VOCAB, 16, 32, 128 if version == "x070" else 64, ranks)
    model = create(shape)
    initialise(model, 5)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_pth(file, {name: tensor.bfloat16().squeeze() for name, tensor in model.state_dict().items()})
    return shape


@pytest.mark.parametrize("version", VERSIONS)
def test_stages_and_restarts(runs: Runs, version: str, capsys: pytest.CaptureFixture[str]) -> None:
    dimensions = ("--n_layer", 2, "--n_embd", 32, "--head_size", 16, "--vocab_size", VOCAB, "--my_testing", version)
    assert runs.train(3, *dimensions, "--train_stage", 1) == 0
    assert [file.name for file in runs.folder.glob("*.pth")] == ["rwkv-init.pth"]
    initial = read_weights(runs.folder / "rwkv-init.pth")

    # Stage 3 finds the file, and needs none of the dimensions again.
    assert runs.train(3, "--my_exit", 1) == 0
    assert runs.epochs() == ["0 0", "1 1"]
    assert torch.equal(read_weights(runs.folder / "rwkv-init.pth")["head.weight"], initial["head.weight"])

    runs.forget_checkpoints()
    (runs.folder / "rwkv-final.pth").unlink()
    second = read_weights(runs.folder / "rwkv-1.pth")
    assert runs.train(3) == 0
    assert runs.epochs() == ["0 0", "1 1", "2 0"]
    assert runs.steps() == list(range(1, 10))
    assert not torch.equal(read_weights(runs.folder / "rwkv-2.pth")["head.weight"], second["head.weight"])

    # A damaged file is passed over, and its mini-epoch trained again.
    runs.forget_checkpoints()
    for name in ("rwkv-1.pth", "rwkv-2.pth"):
        content = (runs.folder / name).read_bytes()
        (runs.folder / name).write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert runs.train(3) == 0
    said = capsys.readouterr()
    assert "rwkv-2.pth is passed over" in said.out + said.err
    assert runs.epochs() == ["0 0", "1 0", "2 1"]
    assert runs.steps() == list(range(1, 10))
    assert read_weights(runs.folder / "rwkv-2.pth").keys() == second.keys()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("place", ["load_model", "rwkv-init.pth"])
def test_an_official_model_needs_no_dimensions(
    runs: Runs, tmp_path: Path, version: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = runs.folder / place if place == "rwkv-init.pth" else tmp_path / "official.pth"
    shape = write_official(file, version)
    words = [] if place == "rwkv-init.pth" else ["--load_model", file]
    official = read_weights(file)
    assert runs.train(1, *words, "--n_layer", 2, "--n_embd", 64, "--ctx_len", CTX) == 2
    said = capsys.readouterr().err
    assert "n_layer: 2 (--n_layer 2), the file has 3" in said
    assert "n_embd: 64 (--n_embd 64), the file has 32" in said

    assert runs.train(1, *words, "--n_layer", shape.n_layer) == 0
    final = read_weights(runs.folder / "rwkv-final.pth")
    unused = {f"blocks.0.att.{x}" for x in ("v0", "v1", "v2")} if version == "x070" else set()
    assert {name: t.shape for name, t in final.items() if name not in unused} == {
        name: t.shape for name, t in official.items() if name not in unused
    }
    change = (final["blocks.0.att.receptance.weight"] - official["blocks.0.att.receptance.weight"]).abs().max()
    assert 0 < change < 0.1


def test_weights_that_cannot_be_read_are_not_replaced_by_new_ones(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.folder.mkdir()
    (runs.folder / "rwkv-init.pth").write_bytes(b"half of a download")
    assert runs.train(1, "--n_layer", 2, "--n_embd", 32, "--head_size", 16) == 2
    assert "holds weights, but none that can be used" in capsys.readouterr().err
    assert (runs.folder / "rwkv-init.pth").read_bytes() == b"half of a download"


def test_mini_epochs_may_begin_at_any_number(runs: Runs) -> None:
    words = ["--n_layer", 1, "--n_embd", 32, "--head_size", 16, "--vocab_size", VOCAB, "--epoch_begin", 2]
    assert runs.train(3, *words) == 0
    assert runs.epochs() == ["2 0"]
    assert (runs.folder / "rwkv-2.pth").exists()


def test_init_grows_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.pth", tmp_path / "new.pth"
    write_official(old, "x070")
    words = ["init", "--load_model", str(old), "-o", str(new)]
    assert run([*words, "--vocab_size", "400", "--n_layer", "4", "--n_embd", "64", "--precision", "bf16"]) == 0
    assert "4 layers, width 64" in capsys.readouterr().out
    before, after = read_weights(old), read_weights(new)
    assert after["emb.weight"].shape == (400, 64)
    assert after["emb.weight"].dtype == torch.bfloat16
    assert after["blocks.3.att.w1"].shape == (64, 8), "ranks are those of the file"
    assert torch.equal(after["emb.weight"][:VOCAB, ::2], before["emb.weight"])
    assert run([*words, "--force", "--my_testing", "x060"]) == 2
    assert "version: x060 (--my_testing x060), the file has x070" in capsys.readouterr().err
    assert run([*words, "--force", "--n_layer", "2"]) == 2
    assert "blocks.2." in capsys.readouterr().err
