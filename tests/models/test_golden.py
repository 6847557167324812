"""Every generation against numbers that the published trainers produced (tests/golden; made from them in fp64)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rookery.formats import load, read_weights, write_pth
from rookery.models import Model, State

GOLDEN = Path(__file__).parent.parent / "golden"
VERSIONS = ("x052", "x060", "x070")

versions = pytest.mark.parametrize("version", VERSIONS)
kernels = pytest.mark.parametrize("kernel", ["reference", "chunked", "native"])


@cache
def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def model_of(version: str, dtype: torch.dtype = torch.float64, *, kernel: str = "auto", tuned: bool = False) -> Model:
    state = GOLDEN / f"{version}_time_state.safetensors" if tuned else None
    return load(GOLDEN / f"{version}_ckpt.safetensors", device="cpu", dtype=dtype, kernel=kernel, state=state)


def tokens_and_targets(io: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return io["dix"][:, :-1], io["dix"][:, 1:]


def value_key(version: str, wkv: Tensor) -> Tensor:
    """A state of the golden files in our axis order: theirs is [key, value] for x052 and x060."""
    return wkv if version == "x070" else wkv.mT


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.detach().double(), want.double(), rtol=0, atol=tolerance)


@kernels
@versions
def test_logits_loss_and_final_state(version: str, kernel: str) -> None:
    io = golden(f"{version}_io")
    model = model_of(version, kernel=kernel)
    tokens, targets = tokens_and_targets(io)
    with torch.no_grad():
        logits, state = model(tokens)
        loss, _ = model.loss(tokens, targets)
    close(logits, io["logits"], 1e-6)
    close(loss, io["loss"].squeeze(), 1e-10)
    close(state.wkv, value_key(version, io["final_wkv"]), 2e-6)
    close(state.att_shift, io["final_att_shift"], 1e-6)
    close(state.ffn_shift, io["final_ffn_shift"], 1e-6)


@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"),
    [
        ("reference", torch.float64, 1e-5),
        ("chunked", torch.float64, 1e-5),
        ("native", torch.float64, 1e-5),
        ("native", torch.float32, 1e-4),
    ],
)
@versions
def test_every_gradient(version: str, kernel: str, dtype: torch.dtype, tolerance: float) -> None:
    model = model_of(version, dtype, kernel=kernel)
    loss, _ = model.loss(*tokens_and_targets(golden(f"{version}_io")), l2wrap=False)
    loss.backward()
    wanted = np.load(GOLDEN / f"{version}_grads.npz")
    assert set(wanted.files) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        want = torch.from_numpy(wanted[name])
        if parameter.grad is None:
            assert not want.any(), f"{name} should get a gradient"
        else:
            close(parameter.grad, want, tolerance * float(want.abs().max()))


@versions
def test_fp32(version: str) -> None:
    io = golden(f"{version}_io")
    model = model_of(version, torch.float32)
    tokens, targets = tokens_and_targets(io)
    with torch.no_grad():
        close(model(tokens)[0], io["logits"], 5e-5)
        close(model.loss(tokens, targets)[0], io["loss"].squeeze(), 1e-5)


@versions
def test_bf16(version: str) -> None:
    """Within what the references lose themselves when they train in bf16."""
    io = golden(f"{version}_io")
    model = model_of(version, torch.bfloat16)
    tokens, targets = tokens_and_targets(io)
    error = (model(tokens)[0].detach().double() - io["logits"].double()).abs()
    assert error.mean() <= 0.03
    assert error.max() <= 0.4
    loss, _ = model.loss(tokens, targets, l2wrap=False)
    close(loss, io["loss"].squeeze(), 0.02)
    loss.backward()
    wanted = np.load(GOLDEN / f"{version}_grads.npz")
    errors = []
    for name, parameter in model.named_parameters():
        want = torch.from_numpy(wanted[name])
        if parameter.grad is not None and want.any():
            errors.append(float((parameter.grad.float() - want).norm() / want.norm()))
    assert np.median(errors) <= 0.05
    assert max(errors) <= 0.4


def test_another_length() -> None:
    io = golden("x070_io")
    with torch.no_grad():
        close(model_of("x070")(io["tokens_alt_T"])[0], io["logits_alt_T"], 1e-6)


@pytest.mark.parametrize("length", [1, 2, 16, 33])
@versions
def test_a_shorter_text_gives_the_same_logits(version: str, length: int) -> None:
    io = golden(f"{version}_io")
    with torch.no_grad():
        close(model_of(version)(io["dix"][:, :length])[0], io["logits"][:, :length], 1e-6)


@pytest.mark.parametrize("cuts", [(1,), (16, 17), (5, 6, 30)])
@kernels
@versions
def test_a_split_text_gives_the_same_logits_and_gradients(version: str, kernel: str, cuts: tuple[int, ...]) -> None:
    io = golden(f"{version}_io")
    model = model_of(version, kernel=kernel)
    tokens, targets = tokens_and_targets(io)
    state: State | None = None
    parts = []
    for piece in tokens.tensor_split(cuts, dim=1):
        logits, state = model(piece, state)
        parts.append(logits)
    logits = torch.cat(parts, dim=1)
    close(logits, io["logits"], 1e-6)
    assert state is not None
    close(state.wkv, value_key(version, io["final_wkv"]), 2e-6)

    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    wanted = np.load(GOLDEN / f"{version}_grads.npz")
    for name in ("emb.weight", "blocks.0.att.key.weight", "blocks.1.ffn.key.weight"):
        want = torch.from_numpy(wanted[name])
        grad = model.get_parameter(name).grad
        assert grad is not None
        close(grad, want, 1e-5 * float(want.abs().max()))


@kernels
@versions
def test_tuned_initial_state(version: str, kernel: str) -> None:
    io = golden(f"{version}_state_io")
    model = model_of(version, kernel=kernel, tuned=True)
    tokens, targets = tokens_and_targets(io)
    logits, state = model(tokens)
    close(logits, io["logits"], 1e-6)
    close(state.wkv[-1, 0], value_key(version, io["final_wkv_lastlayer_row0"]), 2e-6)
    loss, _ = model.loss(tokens, targets, l2wrap=False)
    close(loss, io["loss"].squeeze(), 1e-10)
    loss.backward()
    name = f"blocks.{model.shape.n_layer - 1}.att.time_state"
    grad = model.get_parameter(name).grad
    assert grad is not None
    close(grad, io[f"grad.{name}"], 1e-6 * float(io[f"grad.{name}"].abs().max()))


@versions
def test_the_golden_files_tell_a_transposed_state(version: str) -> None:
    """The state file's axis order is the thing most easily got wrong: the wrong one gives other, known logits."""
    io = golden(f"{version}_state_io")
    model = model_of(version, tuned=True)
    with torch.no_grad():
        for block in model.blocks:
            assert block.att.time_state is not None
            block.att.time_state.copy_(block.att.time_state.mT.clone())
        close(model(io["dix"][:1, :-1])[0][0], io["logits_if_transposed_by_mistake_row0"], 1e-6)


@versions
def test_masked_targets(version: str) -> None:
    io = golden(f"{version}_io")
    tokens, targets = tokens_and_targets(io)
    masked = targets.masked_fill(io["mask"] == 0, -100)
    with torch.no_grad():
        loss, _ = model_of(version).loss(tokens, masked)
    close(loss, io["loss_masked"].squeeze(), 1e-10)
    close(loss, io["loss_ignore_index"].squeeze(), 1e-10)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_chunks_with_the_state_cut_off_between_them(version: str) -> None:
    """Truncated backpropagation ("infctx"): the loss of the whole text, gradients that stop at each chunk's start."""
    wanted = json.loads((GOLDEN / f"{version}_infctx.json").read_text(encoding="utf-8"))
    dix = golden(f"{version}_state_io")["dix"][:, : wanted["tokens_used"] + 1]
    model = model_of(version)
    chunk = wanted["chunk_ctx"]
    state: State | None = None
    losses = []
    for start in range(0, wanted["tokens_used"], chunk):
        piece = dix[:, start : start + chunk + 1]
        loss, state = model.loss(piece[:, :-1], piece[:, 1:], state, l2wrap=False)
        state = state.detach()
        losses.append(loss)
    assert [float(loss.detach()) for loss in losses] == pytest.approx(wanted["chunk_losses"], abs=1e-10)
    mean = torch.stack(losses).mean()
    assert float(mean.detach()) == pytest.approx(wanted["loss"], abs=1e-10)
    mean.backward()
    for name, norm in wanted["grad_l2_norms_truncated"].items():
        grad = model.get_parameter(name).grad
        assert grad is not None
        assert float(grad.norm()) == pytest.approx(norm, rel=1e-9), name


PACKAGE = """
import sys
import torch
from rwkv.model import RWKV
path, tokens, out = sys.argv[1:]
model = RWKV(model=path, strategy="cpu fp32")
logits, state = model.forward([int(token) for token in tokens.split()], None, full_output=True)
torch.save([logits, *state], out)
"""


@versions
def test_the_rwkv_package_gives_the_same_logits_and_state(version: str, tmp_path: Path) -> None:
    io = golden(f"{version}_io")
    weights = {name: tensor.float() for name, tensor in read_weights(GOLDEN / f"{version}_ckpt.safetensors").items()}
    write_pth(tmp_path / "model.pth", weights)
    tokens = io["dix"][:1, :-1]
    words = " ".join(map(str, tokens[0].tolist()))
    environment = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "1" if version == "x070" else "0"}
    subprocess.run(
        [sys.executable, "-c", PACKAGE, str(tmp_path / "model"), words, str(tmp_path / "out.pt")],
        env={**os.environ, **environment}, check=True, capture_output=True,
    )  # fmt: skip
    theirs, *their_state = torch.load(tmp_path / "out.pt", weights_only=True)
    close(theirs, io["pip_logits_seq_row0"], 5e-5)

    model = load(tmp_path / "model.pth", device="cpu", dtype=torch.float32)
    with torch.no_grad():
        logits, state = model(tokens)
    close(logits[0], theirs, 5e-5)
    for layer in range(model.shape.n_layer):
        att_shift, wkv, ffn_shift = their_state[3 * layer : 3 * layer + 3]
        close(state.att_shift[layer, 0], att_shift, 1e-5)
        close(state.wkv[layer, 0], value_key(version, wkv), 1e-4)
        close(state.ffn_shift[layer, 0], ffn_shift, 1e-5)
