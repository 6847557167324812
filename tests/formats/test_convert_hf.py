"""RWKV-7 for Hugging Face: what flash-linear-attention's `RWKV7ForCausalLM` has, and back without losing a bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import torch
from safetensors.torch import load_file, save_file

import rookery
from rookery.errors import UserError
from rookery.formats import read_weights, write_pth
from rookery.formats.convert import convert
from rookery.formats.vocabulary import CHAT_TEMPLATE
from rookery.models import ModelShape, create, initialise
from rookery.tokenizer import Character, World
from rookery.tokenizer.chat import Message, prompt

GOLDEN = Path(__file__).parent.parent / "golden"
MODEL = GOLDEN / "x070_ckpt.safetensors"
NAMES = json.loads((GOLDEN / "hf_rwkv7_shapes.json").read_text(encoding="utf-8"))["shapes"]
UNUSED = {f"blocks.0.att.v{part}" for part in "012"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    convert(MODEL, tmp_path / "hf", tokenizer=lambda size: World.compact("你好"))
    return tmp_path / "hf"


def test_names_and_shapes_are_those_of_fla(folder: Path) -> None:
    written = load_file(folder / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in written.items()} == NAMES
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["architectures"]) == ("rwkv7", ["RWKV7ForCausalLM"])
    shape = rookery.load(MODEL, device="cpu").shape
    assert (config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]) == (416, 128, 3)
    assert (config["head_dim"], config["intermediate_size"]) == (64, shape.dim_ffn)
    ranks = {
        kind: config[f"{name}_low_rank_dim"] for kind, name in zip("wgav", ("decay", "gate", "a", "v"), strict=True)
    }
    assert ranks == shape.ranks
    assert config["torch_dtype"] == "bfloat16"


def test_there_and_back_keeps_every_bit(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "back.pth")
    original, back = read_weights(MODEL), read_weights(tmp_path / "back.pth")
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert back[name].shape == tensor.shape, name
        # Nothing reads the value residual of block 0, and the layout has no place for it.
        assert not back[name].any() if name in UNUSED else torch.equal(back[name], tensor), name

    convert(tmp_path / "back.pth", tmp_path / "again")
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_directory_is_a_model_everywhere(folder: Path) -> None:
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        assert torch.equal(rookery.load(folder, device="cpu")(tokens)[0], rookery.load(MODEL, device="cpu")(tokens)[0])


def test_large_models_are_in_parts(tmp_path: Path) -> None:
    convert(MODEL, tmp_path / "hf", shard_bytes=400_000)
    parts = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert [part.name for part in parts] == [
        f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)
    ]
    assert len(parts) > 2
    assert all(part.stat().st_size < 420_000 for part in parts)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"] == {name: part.name for part in parts for name in load_file(part)}
    original = read_weights(MODEL)
    read = read_weights(tmp_path / "hf")
    assert all(torch.equal(read[name], original[name]) for name in original.keys() - UNUSED)


def test_mixes_fused_by_early_versions_of_fla_are_read(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        rows = [tensors.pop(f"model.layers.{layer}.attn.x_{mix}").flatten() for mix in "rwkvag"]
        tensors[f"model.layers.{layer}.attn.x_x"] = torch.stack(rows)
    save_file(tensors, tmp_path / "old.safetensors")
    original, read = read_weights(MODEL), read_weights(tmp_path / "old.safetensors")
    assert all(torch.equal(read[name], original[name]) for name in original.keys() - UNUSED)


def test_force_replaces_a_model_and_leaves_other_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--force replaces it"):
        convert(MODEL, folder)
    (folder / "README.md").write_text("mine", encoding="utf-8")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of an older, larger model")
    convert(MODEL, folder, precision="fp32", force=True)
    assert (folder / "README.md").read_text(encoding="utf-8") == "mine"
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    assert {tensor.dtype for tensor in read_weights(folder).values()} == {torch.float32}
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("version", ["x052", "x060"])
def test_other_versions_are_refused(version: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"is {version}; the Hugging Face layout that is written here is that of x070"):
        convert(GOLDEN / f"{version}_ckpt.safetensors", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_head_size_that_fla_normalises_otherwise_is_refused(tmp_path: Path) -> None:
    model = create(ModelShape("x070", 1, 64, 50, 32, 64, 256, dict.fromkeys("wavg", 32)))
    initialise(model, 1)
    write_pth(tmp_path / "model.pth", model.state_dict())
    with pytest.raises(UserError, match="head size 32: fla would normalise it with another epsilon"):
        convert(tmp_path / "model.pth", tmp_path / "hf")


def test_a_vocabulary_that_the_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a token of id 0"):
        convert(MODEL, tmp_path / "hf", tokenizer=lambda size: Character(list("abc")))
    assert list(tmp_path.iterdir()) == []


TOKENIZE = """
import json, sys, warnings
warnings.simplefilter("ignore")
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
texts, chat = json.loads(sys.argv[2])
ids = [tokenizer(text)["input_ids"] for text in texts]
print(json.dumps({
    "ids": ids, "texts": [tokenizer.decode(row) for row in ids],
    "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    "end": tokenizer("a<|rwkv_tokenizer_end_of_text|>b")["input_ids"],
    "chat": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
}))
"""


def test_transformers_loads_the_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    world = World()
    model = create(ModelShape("x070", 1, 64, 65536, 64, 64, 64, dict.fromkeys("wavg", 32)))
    initialise(model, 1)
    write_pth(tmp_path / "model.pth", model.state_dict())
    convert(tmp_path / "model.pth", tmp_path / "hf", precision="bf16", tokenizer=lambda size: world)
    texts = ["User: 你好 1+1=?\n\nAssistant: 世界 \x00é🙂", "def f(x):\n    return x\n\n", " a  b\t\r\n", ""]
    chat = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "hi"}]
    result = subprocess.run(
        [sys.executable, "-c", TOKENIZE, tmp_path / "hf", json.dumps([texts, chat])],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["ids"] == [world.encode(text) for text in texts]
    assert told["texts"] == texts
    assert told["special"] == [0, 0, 0]
    assert told["end"] == [*world.encode("a"), 0, *world.encode("b")]
    assert told["chat"] == prompt([Message("system", "be brief"), Message("user", "hi")])
    stops = json.loads((tmp_path / "hf" / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert stops == [0, 261]


def test_the_template_writes_what_chat_writes() -> None:
    template = jinja2.Template(CHAT_TEMPLATE)
    turns = [("system", "Be brief."), ("user", "1+1=?"), ("assistant", "2"), ("user", "time?"), ("tool", "12:00")]
    messages = [{"role": role, "content": text} for role, text in turns]
    ours = [Message(role, text) for role, text in turns]  # type: ignore[arg-type]
    for options, thinking in (
        ({}, "none"),
        ({"enable_thinking": True}, "think"),
        ({"enable_thinking": False}, "quick"),
    ):
        text = template.render(messages=messages, add_generation_prompt=True, **options)
        assert text == prompt(ours, thinking)  # type: ignore[arg-type]
    assert template.render(messages=messages, add_generation_prompt=False) == prompt(ours).removesuffix("Assistant:")
