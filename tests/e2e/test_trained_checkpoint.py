"""A checkpoint trained here is one for every other RWKV tool: the `rwkv` package computes the same logits from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import rookery as package

PROGRAM = """
import sys
import torch
from rwkv.model import RWKV
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
logits, _ = model.forward([int(word) for word in sys.argv[2].split()], None, full_output=True)
torch.save(logits, sys.argv[3])
"""


@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
def test_the_rwkv_package_computes_the_same_logits(version: str, rookery, tmp_path) -> None:
    lines = [json.dumps({"text": f"User: {i}+{i}=?\n\nAssistant: {2 * i}"}) for i in range(60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines), encoding="utf-8")
    made = rookery("data", "make", "sums.jsonl", 1, 16, "--tokenizer", "compact", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    shape = ["--version", version, "--n_layer", 2, "--n_embd", 64]
    small = ["--ctx_len", 16, "--micro_bsz", 4, "--my_exit_tokens", 640, "--lr_init", 1e-2, "--proj_dir", "out"]
    done = rookery("train", "--data_file", "sums", "--precision", "fp32", *shape, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    model = package.load(tmp_path / "out", device="cpu")
    tokens = torch.arange(1, 25)
    with torch.no_grad():
        ours = model(tokens[None])[0][0]
    environment = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "1" if version == "x070" else "0"}
    words = " ".join(map(str, tokens.tolist()))
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "out" / "rwkv-final"), words, str(tmp_path / "theirs.pt")],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        timeout=300,
    )
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)
    assert ours.std() > 0.1, "training moved the weights"
    assert (ours - theirs).abs().max() < 5e-5 * max(1, theirs.abs().max())
