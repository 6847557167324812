"""What the form says of real faults before anything starts: each of RWKV Runner's hints, with a stable code."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from rookery.formats import write_pth
from rookery.models import ModelShape, create, initialise
from rookery.tokenizer import Character
from rookery.ui import form

SOUND = {
    "data_file": "text.txt", "load_model": "model/base.pth", "peft": "lora", "ctx_len": "16", "micro_bsz": "1",
    "accumulate_grad_batches": "1", "epoch_steps": "5", "epoch_count": "1", "lora_r": "4",
}  # fmt: skip


class Code:
    def __reduce__(self):
        return print, ("run",)


def write_model(file: Path, width: int, vocab_size: int) -> None:
    model = create(ModelShape("x070", 1, width, vocab_size, 32, width, 4 * width, dict.fromkeys("wavg", 32)))
    initialise(model, 0)
    write_pth(file, model.state_dict())


@pytest.fixture(scope="module")
def faults(folder, console) -> Path:
    """A folder with a sound model and text, and much that is none."""
    (folder / "model").mkdir()
    vocabulary = Character.build("abcdefghij klmn\n", documents=True)
    vocabulary.save(folder / "model" / "vocab.json")
    write_model(folder / "model" / "base.pth", 32, vocabulary.vocab_size)
    write_model(folder / "model" / "wide.pth", 64, vocabulary.vocab_size)
    whole = (folder / "model" / "base.pth").read_bytes()
    (folder / "model" / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "model" / "page.pth").write_text("<!DOCTYPE html>", encoding="utf-8")
    torch.save({"emb.weight": Code()}, folder / "model" / "code.pth")
    (folder / "model" / "old.pkl").write_bytes(pickle.dumps({}))
    x051 = {"emb.weight": torch.zeros(8, 4), "blocks.0.att.time_mix_k": torch.zeros(1, 1, 4)}
    write_pth(folder / "model" / "v4.pth", x051)
    (folder / "elsewhere").mkdir()
    shutil.copy(folder / "model" / "base.pth", folder / "elsewhere" / "base.pth")
    (folder / "text.txt").write_text("abc def ghi jkl " * 200, encoding="utf-8")
    (folder / "short.txt").write_text("abc", encoding="utf-8")
    (folder / "foreign.txt").write_text("xyz" * 100, encoding="utf-8")
    (folder / "bad.jsonl").write_text('{"text": "abc"}\n{nope\n', encoding="utf-8")
    (folder / "empty").mkdir()
    return folder


CASES = {
    "no data": ({"data_file": ""}, "RK101"),
    "a folder without text": ({"data_file": "empty"}, "RK101"),
    "no such data": ({"data_file": "nowhere.jsonl"}, "RK106"),
    "a malformed line": ({"data_file": "bad.jsonl"}, "RK104"),
    "characters that the model does not know": ({"data_file": "foreign.txt"}, "RK103"),
    "a prime that does not fit": ({"magic_prime": "7"}, "RK105"),
    "no base": ({"load_model": ""}, "RK206"),
    "no such base": ({"load_model": "model/none.pth"}, "RK106"),
    "data as a base": ({"load_model": "bad.jsonl"}, "RK202"),
    "a folder without weights": ({"load_model": "empty"}, "RK202"),
    "a version that is not supported": ({"load_model": "model/v4.pth"}, "RK202"),
    "an error page of a web site": ({"load_model": "model/page.pth"}, "RK203"),
    "a download that was cut": ({"load_model": "model/cut.pth"}, "RK203"),
    "a file that would run code": ({"load_model": "model/code.pth"}, "RK204"),
    "another shape than was asked for": ({"peft": "none", "n_layer": "7"}, "RK201"),
    "an adapter that is none": ({"adapter_load": "model/wide.pth"}, "RK207"),
    "no vocabulary": ({"load_model": "elsewhere/base.pth"}, "RK103"),
    "a batch that does not divide": (
        {"peft": "none", "load_model": "", "n_layer": "1", "n_embd": "64", "epoch_steps": "", "epoch_count": "",
         "accumulate_grad_batches": "11", "tokenizer": "char"}, "RK506",
    ),
    "a width that no heads fill": (
        {"peft": "none", "load_model": "", "n_layer": "1", "n_embd": "32", "tokenizer": "char"}, "RK510",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("values", "code"), CASES.values(), ids=CASES.keys())
def test_a_fault_is_told_before_the_start(console, faults, values: dict[str, str], code: str) -> None:
    said = {leaf: text for leaf, text in (SOUND | values).items() if text}
    answer = console.ask("api/train/check", said)[1]
    assert answer["failure"]["code"] == code, answer["error"]
    assert answer["failure"]["remedy"]
    assert "Traceback" not in answer["error"]


@pytest.mark.parametrize("method", form.METHODS)
def test_every_method_is_ready_with_sound_values(console, faults, method: str) -> None:
    values = SOUND | form.METHODS[method][2]
    if method == "pretrain":
        values |= {"load_model": "", "n_layer": "1", "n_embd": "64", "tokenizer": "char"}
    answer = console.ask("api/train/check", {leaf: text for leaf, text in values.items() if text})[1]
    assert "error" not in answer
    assert answer["memory"]["verdict"] == "fits"
    assert answer["data"]["tokens"] > 3000


def test_what_will_not_fit_comes_with_what_would(console, faults) -> None:
    answer = console.ask("api/train/check", SOUND | {"peft": "none", "micro_bsz": "1000000"})[1]
    assert answer["memory"]["verdict"] == "will not fit"
    assert any("--micro_bsz" in flags for flags, _total in answer["memory"]["remedies"])


def test_too_little_data_and_a_missing_gpu_are_said_and_do_not_stop(console, faults) -> None:
    answer = console.ask("api/train/check", SOUND | {"data_file": "short.txt", "accelerator": "gpu"})[1]
    assert any("too few for the prime rule" in note for note in answer["notes"])
    if not torch.cuda.is_available():
        assert any("there is no GPU that PyTorch can use here" in note for note in answer["notes"])
        assert answer["values"]["accelerator"] == "cpu"


def test_nothing_to_merge_is_told(console, faults) -> None:
    status, answer = console.ask("api/models/merge", {"base": "model/base.pth", "adapter": "", "output": "x.pth"})
    assert status == 400
    assert "choose a base model, and the adapter" in answer["error"]
