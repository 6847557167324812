"""Wrong files given to `rookery train`: one clear message and exit status 2, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rookery.cli import run
from rookery.data import BinIdxWriter
from rookery.formats import read_weights, write_pth
from rookery.tokenizer import World

MODEL = ["--n_layer", "1", "--n_embd", "32", "--head_size", "16", "--vocab_size", "300"]


@pytest.fixture
def data(tmp_path: Path) -> str:
    tokens = np.random.RandomState(0).randint(1, 300, 500)
    for name, dtype in (("tokens", np.uint16), ("wide", np.int32)):
        with BinIdxWriter(tmp_path / name, dtype, World()) as writer:
            writer.add(tokens.astype(dtype))
    return str(tmp_path / "tokens")


@pytest.fixture
def train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command; gives its status and the last of what it said."""

    def start(data_file: object, *words: object) -> tuple[int, str]:
        status = run(
            ["train", "--data_file", str(data_file), "--ctx_len", "16", "--micro_bsz", "2",
             "--my_exit_tokens", "64", "--epoch_steps", "2", "--kernel", "chunked", "--proj_dir", str(tmp_path / "out"),
             "--accelerator", "cpu", *map(str, words)]
        )  # fmt: skip
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return status, said

    return start


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_data_may_be_named_with_or_without_an_ending(train, data: str, suffix: str) -> None:
    assert train(data + suffix, *MODEL)[0] == 0


def test_int32_binidx_trains(train, data: str) -> None:
    assert train(Path(data).with_name("wide"), *MODEL)[0] == 0


def test_int32_ids_given_as_uint16(train, tmp_path: Path) -> None:
    np.arange(1, 200, dtype="<i4").tofile(tmp_path / "raw")
    status, said = train(tmp_path / "raw", *MODEL, "--data_type", "uint16")
    assert (status, "these are int32 ids" in said) == (2, True)


@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
def test_an_id_beyond_the_vocabulary(train, data: str, tmp_path: Path, version: str) -> None:
    tokens = np.full(500, 7)
    tokens[321] = 300
    with BinIdxWriter(data, np.uint16, World()) as writer:
        writer.add(tokens.astype(np.uint16))
    status, said = train(data, *MODEL, "--my_testing", version)
    assert status == 2
    assert "token 321 is id 300, but the vocabulary has 300 ids (0 to 299)" in said
    assert not list((tmp_path / "out").glob("*.pth"))


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_truncated_data(train, data: str, ending: str) -> None:
    path = Path(data + ending)
    path.write_bytes(path.read_bytes()[:-3])
    status, said = train(data, *MODEL)
    assert status == 2
    assert "cut short" in said
    assert str(path) in said


def test_missing_data(train, tmp_path: Path) -> None:
    status, said = train(tmp_path / "nothing", *MODEL)
    assert status == 2
    assert "nothing.bin" in said


@pytest.mark.parametrize("name", ["truncated", "text", "empty", "missing"])
def test_a_damaged_checkpoint(train, data: str, tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.pth"
    write_pth(tmp_path / "good.pth", {"emb.weight": torch.zeros(300, 32)})
    content = (tmp_path / "good.pth").read_bytes()
    contents = {"truncated": content[: len(content) // 2], "text": b"<!DOCTYPE html>" * 50, "empty": b""}
    if name in contents:
        file.write_bytes(contents[name])
    status, said = train(data, "--load_model", file)
    assert status == 2
    assert str(file) in said


@pytest.mark.parametrize(
    ("key", "found"),
    [("blocks.0.att.time_mix_k", "RWKV-4 or older"), ("blocks.0.ffn.s_emb.weight", "RWKV-7a/7b (DeepEmbed)")],
)
def test_a_checkpoint_of_another_version(train, data: str, tmp_path: Path, key: str, found: str) -> None:
    file = tmp_path / "other.pth"
    write_pth(
        file,
        {
            "emb.weight": torch.zeros(300, 32),
            "blocks.0.ffn.key.weight": torch.zeros(128, 32),
            key: torch.zeros(1, 1, 32),
        },
    )
    status, said = train(data, "--load_model", file)
    assert status == 2
    assert f"other.pth is a model of version {found}; Rookery knows x052, x060, x070" in said


def test_half_a_model(train, data: str, tmp_path: Path) -> None:
    assert train(data, *MODEL)[0] == 0
    weights = read_weights(tmp_path / "out" / "rwkv-final.pth")
    del weights["blocks.0.att.w1"]
    write_pth(tmp_path / "half.pth", weights)
    status, said = train(data, "--load_model", tmp_path / "half.pth", "--proj_dir", tmp_path / "other")
    assert status == 2
    assert "half.pth" in said
    assert "blocks.0.att.w1" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data_type", "wds_img"], "images were never finished in the reference"),
        (["--peft", "pissa"], "give --load_model"),
        (["--quant", "nf4"], "add --peft lora"),
        (["--optimizer", "muon"], "AdamW is the only optimiser"),
        (["--my_testing", "mamba"], "must be one of x052, x060, x070"),
        (["--magic_prime", "17"], "magic_prime 17 does not fit 500 tokens at ctx_len 16"),
    ],
)
def test_what_is_answered_with_what_to_do_instead(train, data: str, words: list[str], message: str) -> None:
    status, said = train(data, *MODEL, *words)
    assert status == 2
    assert message in said
