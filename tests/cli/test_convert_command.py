"""`rookery convert` from the command line: what it says, what it writes, and what it does not touch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rookery.cli import run
from rookery.formats import read_weights, write_pth
from rookery.formats.describe import describe
from rookery.infer import open_model
from rookery.models import ModelShape, create, initialise
from rookery.tokenizer import Character, World, save_beside

VOCABULARY = World.compact("你好")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A run directory of a small model with a vocabulary of its own."""
    folder = tmp_path / "run"
    folder.mkdir()
    model = create(ModelShape("x070", 2, 64, VOCABULARY.vocab_size, 64, 64, 128, dict.fromkeys("wavg", 32)))
    initialise(model, 1)
    write_pth(folder / "rwkv-final.pth", model.state_dict())
    save_beside(VOCABULARY, folder / "vocab")
    return folder


def convert(*words: object) -> int:
    return run(["convert", *map(str, words)])


@pytest.mark.parametrize("out", ["model.pth", "model.safetensors", "model.ST", "model.gguf", "hf", "new/folder/a.pth"])
def test_the_ending_says_the_format(out: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(model, "-o", tmp_path / out) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / out}: model, {len(read_weights(model))} tensors, 0.")
    assert "MB" in said


def test_a_directory_for_hugging_face_is_a_model_to_talk_to(model: Path, tmp_path: Path) -> None:
    assert convert(model, "-o", tmp_path / "hf") == 0
    facts = describe(tmp_path / "hf")
    assert (facts["kind"], facts["version"], facts["tensors"]) == ("model", "x070", len(read_weights(model)))
    loaded, vocabulary = open_model(tmp_path / "hf", device="cpu")
    assert loaded.shape.n_layer == 2
    assert vocabulary.encode("User: 你好") == VOCABULARY.encode("User: 你好")


@pytest.mark.parametrize("out", ["other/small.pth", "other/small.safetensors", "other/small.st"])
def test_a_vocabulary_goes_with_its_model(out: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert convert(model, "-o", tmp_path / out) == 0
    assert f"vocabulary: {tmp_path / 'other' / 'small.vocab.txt'}" in capsys.readouterr().out
    _loaded, vocabulary = open_model(tmp_path / out, device="cpu")
    assert vocabulary.encode("User: 你好") == VOCABULARY.encode("User: 你好")
    assert convert(model, "-o", model / "copy.safetensors") == 0
    assert "vocabulary:" not in capsys.readouterr().out, "the folder has it"
    assert not list(model.glob("copy.vocab*"))
    save_beside(World.compact("好"), tmp_path / "other" / "vocab")
    again = open_model(tmp_path / out, device="cpu")[1]
    assert again.encode("你好") == VOCABULARY.encode("你好"), "its own comes first"
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "你好你好你好"}\n' * 20, encoding="utf-8")
    words = ["train", "--load_model", tmp_path / out, "--data_file", data, "--ctx_len", 8, "--explain"]
    assert run([*map(str, words), "--proj_dir", str(tmp_path / "next")]) == 0, "training finds it too"


def test_a_vocabulary_goes_with_what_is_merged(model: Path, tmp_path: Path) -> None:
    write_pth(tmp_path / "state.pth", {f"blocks.{layer}.att.time_state": torch.zeros(1, 64, 64) for layer in range(2)})
    assert run(["merge", *map(str, (model, tmp_path / "state.pth", "-o", tmp_path / "merged.pth"))]) == 0
    _loaded, vocabulary = open_model(tmp_path / "merged.pth", device="cpu")
    assert vocabulary.encode("你好") == VOCABULARY.encode("你好")


def test_to_says_the_format_when_the_ending_does_not(model: Path, tmp_path: Path) -> None:
    assert convert(model, "-o", tmp_path / "folder.v2", "--to", "hf", "--dtype", "bf16") == 0
    assert read_weights(tmp_path / "folder.v2")["emb.weight"].dtype == torch.bfloat16
    state = {f"blocks.{layer}.att.time_state": torch.randn(1, 64, 64) for layer in range(2)}
    write_pth(tmp_path / "state.pth", state)
    assert convert(tmp_path / "state.pth", "-o", tmp_path / "list.pth", "--to", "rwkv", "--version", "x060") == 0
    assert torch.equal(torch.load(tmp_path / "list.pth")[4], state["blocks.1.att.time_state"].mT)


def test_nothing_is_replaced_unasked(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.st"
    out.write_text("precious", encoding="utf-8")
    assert convert(model, "-o", out) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == "precious"
    assert convert(model, "-o", out, "--force") == 0
    assert read_weights(out)["emb.weight"].dtype == torch.float16


def test_files_under_another_name(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(model, "-o", tmp_path / "a.safetensors") == convert(model, "-o", tmp_path / "a.gguf") == 0
    capsys.readouterr()
    for right, wrong, said in (
        (model / "rwkv-final.pth", "b.safetensors", "is a .pth under another name"),
        (tmp_path / "a.safetensors", "b.pth", "is a .safetensors under another name"),
        (tmp_path / "a.gguf", "c.pth", "is a GGUF model"),
    ):
        right.rename(tmp_path / wrong)
        assert convert(tmp_path / wrong, "-o", tmp_path / "out.pth") == 2
        assert f"{tmp_path / wrong} {said}" in capsys.readouterr().err
        assert not (tmp_path / "out.pth").exists()
        (tmp_path / wrong).rename(right)


@pytest.mark.parametrize("source", ["run", "run/rwkv-final.pth"])
def test_a_file_is_not_read_and_written_at_once(
    source: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (model / "rwkv-final.pth").read_bytes()
    assert convert(tmp_path / source, "-o", model / "rwkv-final.pth", "--dtype", "bf16", "--force") == 2
    assert "would be read and written at once" in capsys.readouterr().err
    assert (model / "rwkv-final.pth").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "model.onnx"], "the ending says no format; end it with .pth, .safetensors, .st, .state, .gguf"),
        (["-o", "model.pth", "--to", "onnx"], "--to onnx: expected one of pth, safetensors, st, gguf, hf, rwkv"),
        (["-o", "model.st", "--dtype", "bf16"], "--dtype bf16: st takes fp16"),
        (["-o", "model.pth", "--dtype", "q8_0"], "--dtype q8_0: pth takes fp32, bf16, fp16"),
        (["-o", "model.gguf", "--dtype", "q4_0"], "--dtype q4_0: gguf takes fp32, fp16, bf16, q8_0"),
        (["-o", ".", "--to", "pth"], ". is a directory; pth is a file"),
        (["-o", "run/vocab.txt", "--to", "hf"], "is a file; the Hugging Face layout is a directory"),
        (["-o", "list.pth", "--to", "rwkv", "--version", "x070"], "is no state"),
    ],
)
def test_what_cannot_be_done_is_said(
    words: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert convert(model, *words) == 2
    assert message in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run"]


def test_a_vocabulary_is_needed_where_it_goes_along(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone.pth"
    (model / "rwkv-final.pth").rename(alone)
    assert convert(alone, "-o", tmp_path / "alone.gguf") == 2
    assert "Name the vocabulary with --tokenizer FILE" in capsys.readouterr().err
    assert convert(alone, "-o", tmp_path / "alone.gguf", "--tokenizer", model / "vocab.txt") == 0
    assert convert(alone, "-o", tmp_path / "hf", "--tokenizer", "none") == 0
    assert not (tmp_path / "hf" / "tokenizer_config.json").exists()
    save_beside(Character(list("ab")), tmp_path / "vocab")
    assert convert(alone, "-o", tmp_path / "other") == 2
    assert "--tokenizer none leaves the tokenizer out" in capsys.readouterr().err


def test_an_interrupted_conversion_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def interrupted(*_args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "reshape", lambda tensor, shape, real=torch.Tensor.reshape: (
        interrupted(), real(tensor, shape))[1])  # fmt: skip
    for out in ("model.pth", "model.gguf", "hf"):
        calls = 0
        assert convert(model, "-o", tmp_path / out) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    assert "Interrupted." in capsys.readouterr().err
