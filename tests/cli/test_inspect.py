"""`rookery init`, `rookery inspect` and `rookery doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rookery.cli import run
from rookery.data import BinIdxWriter
from rookery.formats import read_weights, write_pth
from rookery.tokenizer import World

SMALL = ["--n_layer", "2", "--n_embd", "64", "--vocab_size", "100"]


def inspect(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["inspect", str(path), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "rwkv-init.pth"
    assert run(["init", *SMALL, "-o", str(path)]) == 0
    return path


def test_init_writes_a_model_of_the_shape_asked_for(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect(weights, capsys)
    assert (facts["kind"], facts["version"], facts["n_layer"], facts["n_embd"]) == ("model", "x070", 2, 64)
    assert (facts["vocab_size"], facts["head_size"], facts["n_head"], facts["dim_ffn"]) == (100, 64, 1, 256)
    assert facts["ranks"] == {"w": 32, "a": 32, "v": 32, "g": 32}
    assert facts["dtypes"] == {"float32": facts["tensors"]}
    tensors = read_weights(weights)
    assert facts["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert tensors["head.weight"].abs().sum() > 0
    assert tensors["blocks.0.att.output.weight"].abs().sum() == 0


def test_init_repeats_for_a_seed_and_takes_the_flags_of_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("a.pth", "b.pth", "c.pth")]
    for file, seed in zip(files, ("5", "5", "6"), strict=True):
        assert run(["init", *SMALL, "--random_seed", seed, "--out", str(file), "--rank_rule", "g1"]) == 0
    heads = [read_weights(file)["head.weight"] for file in files]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])

    assert run(["init", *SMALL, "--my_testing", "x070", "--precision", "bf16", "--proj_dir", str(tmp_path / "p")]) == 0
    assert list(inspect(tmp_path / "p" / "rwkv-init.pth", capsys)["dtypes"]) == ["bfloat16"]


def test_init_does_not_replace_a_file_unasked(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = weights.read_bytes()
    assert run(["init", *SMALL, "--random_seed", "3", "-o", str(weights)]) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert weights.read_bytes() == before
    assert run(["init", *SMALL, "--random_seed", "3", "-o", str(weights), "--force"]) == 0
    assert weights.read_bytes() != before


def test_inspect_a_model_for_people(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["--lang", "zh", "inspect", str(weights), "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert "x070" in shown
    assert "低秩维度" in shown
    assert "blocks.1.att.r_k" in shown
    assert "[1, 64]" in shown


def test_inspect_a_state_and_a_model_with_one(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = {f"blocks.{layer}.att.time_state": torch.zeros(1, 64, 64) for layer in range(2)}
    write_pth(tmp_path / "state.pth", states)
    facts = inspect(tmp_path / "state.pth", capsys)
    assert (facts["kind"], facts["state"], facts["parameters"]) == ("state", {"layers": 2, "shape": [1, 64, 64]}, 0)

    write_pth(tmp_path / "both.pth", read_weights(weights) | states)
    facts = inspect(tmp_path / "both.pth", capsys)
    assert (facts["kind"], facts["state"]["layers"]) == ("model", 2)


@pytest.mark.parametrize(
    ("tensors", "kinds", "ranks"),
    [
        ({"att.key.lora_A": (8, 64), "att.key.lora_B": (64, 8)}, ["lora"], [8]),
        ({"att.key.lora_A.weight": (16, 64), "att.key.lora_B.weight": (64, 16)}, ["lora"], [16]),
        ({"ffn.key.init_lora_A": (4, 64), "ffn.key.init_lora_B": (256, 4)}, ["pissa"], [4]),
        ({"att.value.disha": (32, 64)}, ["miss"], [32]),
        ({"att.value.bone": (4, 16, 16)}, ["miss"], [16]),
    ],
)
def test_inspect_an_adapter(
    tmp_path: Path,
    tensors: dict[str, tuple[int, ...]],
    kinds: list[str],
    ranks: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = {f"blocks.0.{name}": torch.zeros(shape) for name, shape in tensors.items()}
    write_pth(tmp_path / "adapter.pth", content | {"blocks.0.ln1.weight": torch.ones(64)})
    facts = inspect(tmp_path / "adapter.pth", capsys)
    assert facts["kind"] == "adapter"
    assert (facts["adapter"]["kinds"], facts["adapter"]["ranks"]) == (kinds, ranks)
    assert facts["adapter"]["modules"] == [".".join(next(iter(tensors)).split(".")[:2])]
    assert facts["adapter"]["also_trained"] == ["blocks.0.ln1.weight"]


def test_inspect_a_run_directory(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = weights.parent
    (run_dir / "status.json").write_text('{"phase": "training", "step": 7}', encoding="utf-8")
    (run_dir / "checkpoints" / "step-00000007").mkdir(parents=True)
    facts = inspect(run_dir, capsys)
    assert (facts["kind"], facts["status"]["step"]) == ("run", 7)
    assert (facts["weights"], facts["checkpoints"]) == (["rwkv-init.pth"], ["step-00000007"])
    assert facts["model"]["n_layer"] == 2
    assert run(["inspect", str(run_dir)]) == 0
    assert "step 7" in capsys.readouterr().out


def test_inspect_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = tmp_path / "corpus"
    with BinIdxWriter(prefix, np.uint16, World()) as writer:
        writer.add(np.array([1, 2, 0], np.uint16))
        writer.add(np.array([3, 0], np.uint16))
    for name in ("corpus", "corpus.bin", "corpus.idx"):
        facts = inspect(tmp_path / name, capsys)
        assert (facts["documents"], facts["tokens"], facts["dtype"]) == (2, 5, "uint16")
        assert (facts["shortest"], facts["longest"]) == (2, 3)


@pytest.mark.parametrize("content", [b"", b"not a model\n", b"PK\x03\x04 cut short", bytes(range(256)) * 8])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.pth"
    file.write_bytes(content)
    assert run(["inspect", str(file)]) == 2
    shown = capsys.readouterr().err
    assert str(file) in shown
    assert "Traceback" not in shown


def test_a_directory_and_tensors_that_say_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(tmp_path)]) == 2
    assert "is no run directory" in capsys.readouterr().err
    write_pth(tmp_path / "other.pth", {"bert.weight": torch.zeros(2)})
    assert run(["inspect", str(tmp_path / "other.pth")]) == 2
    assert "its first tensor is bert.weight" in capsys.readouterr().err


def test_doctor_names_the_back_end_of_each_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["machine"]["memory"] > 2**28
    on_cpu = {answer["op"]: answer for answer in facts["ops"] if answer["device"] == "cpu"}
    assert on_cpu.keys() == {"wkv7", "wkv6", "mix7", "token_shift", "relu_square"}
    for answer in on_cpu.values():
        assert answer["uses"] == "native"
    assert "GPU" in on_cpu["wkv7"]["refused"]["triton"]
    assert run(["doctor"]) == 0
    assert "uses native" in capsys.readouterr().out
