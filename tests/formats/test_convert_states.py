"""Tuned states elsewhere: the `rwkv` package computes our logits with one mounted, and Ai00 gets its own axes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rookery
from rookery.errors import UserError
from rookery.formats import read_weights, write_pth
from rookery.formats.convert import convert

GOLDEN = Path(__file__).parent.parent / "golden"

versions = pytest.mark.parametrize("version", ["x052", "x060", "x070"])

PROGRAM = """
import sys
import torch
from rwkv.model import RWKV
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
tokens = [int(word) for word in sys.argv[2].split()]
state = torch.load(sys.argv[3], weights_only=True)
turned = [tensor.mT.contiguous() if i % 3 == 1 else tensor.clone() for i, tensor in enumerate(state)]
logits = [model.forward(tokens, mounted, full_output=True)[0] for mounted in (state, turned, None)]
torch.save(logits, sys.argv[4])
"""


def tuned(version: str) -> Path:
    return GOLDEN / f"{version}_time_state.safetensors"


def first_row(version: str) -> torch.Tensor:
    """Tokens (1, T) for which published logits with that state exist."""
    return load_file(GOLDEN / f"{version}_state_io.safetensors")["dix"][:1, :-1]


@versions
def test_the_rwkv_package_with_the_state_computes_our_logits(version: str, tmp_path: Path) -> None:
    model = tmp_path / "model.pth"
    convert(GOLDEN / f"{version}_ckpt.safetensors", model, precision="fp32")
    done = convert(tuned(version), tmp_path / "state.pth", to="rwkv", version=version)
    assert done.kind == "state"
    # The package also takes a state that was merged into an x052 or x060 model by itself.
    states = {name: tensor.float() for name, tensor in read_weights(tuned(version)).items()}
    write_pth(tmp_path / "merged.pth", read_weights(model) | states)

    tokens = first_row(version)
    words = " ".join(map(str, tokens[0].tolist()))
    environment = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "1" if version == "x070" else "0"}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "merged", words, tmp_path / "state.pth", tmp_path / "logits.pt"],
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    mounted, turned, merged = torch.load(tmp_path / "logits.pt", weights_only=True)
    with torch.no_grad():
        ours = rookery.load(model, device="cpu", state=tuned(version))(tokens)[0][0]
        bare = rookery.load(model, device="cpu")(tokens)[0][0]
    assert (ours - bare).abs().max() > 1, "the state matters"
    assert (mounted - ours).abs().max() < 2e-5
    published = load_file(GOLDEN / f"{version}_state_io.safetensors")["logits"][0]
    assert (mounted - published).abs().max() < 2e-5
    # What a published demo does to x070 states, and what would befall the others without the transposition.
    assert (turned - ours).abs().max() > (3 if version == "x070" else 2)
    assert (merged - (bare if version == "x070" else ours)).abs().max() < 2e-5


@versions
def test_a_state_of_the_rwkv_package_comes_back(version: str, tmp_path: Path) -> None:
    convert(tuned(version), tmp_path / "list.pth", to="rwkv", version=version)
    convert(tmp_path / "list.pth", tmp_path / "back.pth", version=version, precision="bf16")
    back, original = read_weights(tmp_path / "back.pth"), read_weights(tuned(version))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())


@versions
@pytest.mark.parametrize("ending", [".st", ".state"])
def test_ai00_has_the_axes_of_a_state_swapped_in_every_version(version: str, ending: str, tmp_path: Path) -> None:
    original = read_weights(tuned(version))
    convert(tuned(version), tmp_path / f"state{ending}")
    written = load_file(tmp_path / f"state{ending}")
    for name, tensor in original.items():
        assert torch.equal(written[name], tensor.mT.half())

    convert(tmp_path / f"state{ending}", tmp_path / "back.pth")
    back = read_weights(tmp_path / "back.pth")
    assert all(torch.equal(back[name], tensor.half()) for name, tensor in original.items())
    with torch.no_grad():
        tokens = first_row(version)
        checkpoint = GOLDEN / f"{version}_ckpt.safetensors"
        mounted = rookery.load(checkpoint, device="cpu", state=tmp_path / f"state{ending}")(tokens)[0]
        ours = rookery.load(checkpoint, device="cpu", state=tuned(version))(tokens)[0]
    assert (mounted - ours).abs().max() < 0.02, "only fp16's rounding of the state"


def test_the_version_of_a_state_comes_from_its_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    convert(tuned("x060"), run / "rwkv-3.pth")
    (run / "config.toml").write_text('[model]\nversion = "x060"\n', encoding="utf-8")
    convert(run, tmp_path / "list.pth", to="rwkv")
    state = torch.load(tmp_path / "list.pth", weights_only=True)
    original = read_weights(tuned("x060"))
    assert torch.equal(state[4], original["blocks.1.att.time_state"].mT.float())
    assert state[0].shape == state[2].shape == (128,)


def test_a_state_without_a_version_is_asked_for_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --version, one of x052, x060, x070"):
        convert(tuned("x070"), tmp_path / "list.pth", to="rwkv")
    with pytest.raises(UserError, match="give --version"):
        convert(tuned("x070"), tmp_path / "list.pth", to="rwkv", version="x040")


def test_the_state_of_a_conversation_is_no_tuned_state(tmp_path: Path) -> None:
    torch.save([torch.ones(64), torch.ones(1, 64, 64), torch.zeros(64)], tmp_path / "chat.pth")
    with pytest.raises(UserError, match="is the state of a conversation"):
        convert(tmp_path / "chat.pth", tmp_path / "state.pth", version="x070")


@pytest.mark.parametrize("target", ["model.gguf", "folder"])
def test_a_state_alone_or_in_a_model_does_not_go_where_it_has_no_place(target: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no whole model"):
        convert(tuned("x070"), tmp_path / target)
    model = read_weights(GOLDEN / "x070_ckpt.safetensors")
    write_pth(tmp_path / "merged.pth", model | read_weights(tuned("x070")))
    with pytest.raises(UserError, match="holds a tuned state"):
        convert(tmp_path / "merged.pth", tmp_path / target)
    with pytest.raises(UserError, match="is no state"):
        convert(tmp_path / "merged.pth", tmp_path / "list.pth", to="rwkv", version="x070")
