"""Fifty steps of training equal those of an independent restatement of the published recipe."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import published_recipe
import pytest
import torch
from published_recipe import Recipe

import rookery.train
from rookery.config import TrainConfig
from rookery.data import BinIdxWriter
from rookery.tokenizer import Character

VOCAB = 40
CTX_LEN = 24
STEPS = 50


def write_stream(prefix: Path) -> np.ndarray:
    """A token stream with structure to learn, as binidx; returns what is in the .bin file."""
    random = np.random.RandomState(0)
    tokenizer = Character([chr(ord("0") + i) for i in range(VOCAB)])
    with BinIdxWriter(prefix, np.uint16, tokenizer) as writer:
        for _ in range(28):
            writer.add((random.randint(0, 4, 101).cumsum() % VOCAB).astype(np.uint16))
    return np.fromfile(prefix.with_suffix(".bin"), dtype="<u2")


@pytest.mark.parametrize(("version", "adam_eps"), [("x052", 1e-8), ("x060", 1e-18), ("x070", 1e-18)])
def test_fifty_steps(version: str, adam_eps: float, tmp_path: Path) -> None:
    stream = write_stream(tmp_path / "data")
    # With larger rates fp32 itself is the limit: the restatement in fp32 and in fp64 then differ by more than 1e-4.
    hyper = {
        "ctx_len": CTX_LEN, "micro_bsz": 4, "my_exit_tokens": 60 * 4 * CTX_LEN, "magic_prime": 113, "lr_init": 1e-3,
        "lr_final": 1e-4, "warmup_steps": 6, "weight_decay": 0.1, "adam_eps": adam_eps,
    }  # fmt: skip
    run = {
        "version": version, "n_layer": 2, "n_embd": 64, "head_size": 32, "data_file": str(tmp_path / "data"),
        "proj_dir": str(tmp_path / "run"), "precision": "fp32", "accelerator": "cpu", "random_seed": 1,
    }  # fmt: skip
    rookery.train.run(TrainConfig(**hyper, **run, train_stage=1))
    initial = torch.load(tmp_path / "run" / "rwkv-init.pth", weights_only=True)
    assert all(tensor.dtype == torch.float32 for tensor in initial.values())
    rookery.train.run(TrainConfig(**hyper, **run, train_stage=3))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ours = [row["loss"] for row in map(json.loads, lines) if "loss" in row][:STEPS]

    published = published_recipe.train(Recipe(version=version, steps=STEPS, **hyper), initial, stream)
    assert ours == pytest.approx(published, abs=1e-4)
    assert published[-1] < published[0] - 1.5


def test_the_restatement_is_independent() -> None:
    tree = ast.parse(Path(published_recipe.__file__).read_text(encoding="utf-8"))
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert modules == {"__future__", "collections", "dataclasses", "math", "numpy", "torch"}
