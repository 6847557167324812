"""GGUF: every tensor and fact read back with llama.cpp's library, and logits from llama.cpp where it is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import rookery
from rookery.errors import UserError
from rookery.formats import read_weights, write_pth
from rookery.formats.convert import convert
from rookery.formats.vocabulary import CHAT_TEMPLATE
from rookery.models import ModelShape, create, initialise
from rookery.tokenizer import World

GOLDEN = Path(__file__).parent.parent / "golden"
VOCABULARY = World.compact("你好世界")

versions = pytest.mark.parametrize("version", ["x060", "x070"])


def write(version: str, out: Path, precision: str | None = None) -> gguf.GGUFReader:
    convert(GOLDEN / f"{version}_ckpt.safetensors", out, precision=precision, tokenizer=lambda size: VOCABULARY)
    return gguf.GGUFReader(out)


def content(reader: gguf.GGUFReader) -> dict[str, torch.Tensor]:
    """Tensors in fp32, slowest axis first."""
    return {
        tensor.name: torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).view(
            *reversed(tensor.shape.tolist())
        )
        for tensor in reader.tensors
    }


def facts(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


COMMON = {
    "token_embd.weight": "emb.weight",
    "output.weight": "head.weight",
    "output_norm.weight": "ln_out.weight",
    "output_norm.bias": "ln_out.bias",
    "token_embd_norm.weight": "blocks.0.ln0.weight",
    "token_embd_norm.bias": "blocks.0.ln0.bias",
}
BLOCK = {
    "attn_norm.weight": "ln1.weight",
    "attn_norm.bias": "ln1.bias",
    "attn_norm_2.weight": "ln2.weight",
    "attn_norm_2.bias": "ln2.bias",
    "time_mix_ln.weight": "att.ln_x.weight",
    "time_mix_ln.bias": "att.ln_x.bias",
    "time_mix_receptance.weight": "att.receptance.weight",
    "time_mix_key.weight": "att.key.weight",
    "time_mix_value.weight": "att.value.weight",
    "time_mix_output.weight": "att.output.weight",
    "channel_mix_key.weight": "ffn.key.weight",
    "channel_mix_value.weight": "ffn.value.weight",
}
X060 = {
    "time_mix_gate.weight": "att.gate.weight",
    "time_mix_lerp_x.weight": "att.time_maa_x",
    "time_mix_first.weight": "att.time_faaaa",
    "time_mix_decay.weight": "att.time_decay",
    "channel_mix_lerp_k.weight": "ffn.time_maa_k",
    "channel_mix_lerp_r.weight": "ffn.time_maa_r",
    "channel_mix_receptance.weight": "ffn.receptance.weight",
}
X060_TURNED = {
    "time_mix_w1.weight": "att.time_maa_w1",
    "time_mix_w2.weight": "att.time_maa_w2",
    "time_mix_decay_w1.weight": "att.time_decay_w1",
    "time_mix_decay_w2.weight": "att.time_decay_w2",
}
X070 = {
    "time_mix_k_k.weight": "att.k_k",
    "time_mix_k_a.weight": "att.k_a",
    "time_mix_r_k.weight": "att.r_k",
    "channel_mix_lerp_k.weight": "ffn.x_k",
} | {f"time_mix_{x}0.weight": f"att.{x}0" for x in "wav"}
X070_TURNED = {f"time_mix_{x}{n}.weight": f"att.{x}{n}" for x in "wavg" for n in "12"}


def expected(version: str) -> dict[str, torch.Tensor]:
    """Every tensor that llama.cpp's `load_arch_tensors` asks for, from the checkpoint."""
    weights = {name: tensor.float() for name, tensor in read_weights(GOLDEN / f"{version}_ckpt.safetensors").items()}
    kept, turned = (BLOCK | X060, X060_TURNED) if version == "x060" else (BLOCK | X070, X070_TURNED)
    mixes = [f"time_maa_{x}" for x in "wkvrg"] if version == "x060" else [f"x_{x}" for x in "rwkvag"]
    tensors = {new: weights[old] for new, old in COMMON.items()}
    for layer in range(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))):
        for new, old in kept.items():
            tensor = weights[f"blocks.{layer}.{old}"]
            flat = old.endswith("r_k") or tensor.dim() == 3
            tensors[f"blk.{layer}.{new}"] = tensor.flatten() if flat else tensor
        for new, old in turned.items():
            tensors[f"blk.{layer}.{new}"] = weights[f"blocks.{layer}.{old}"].mT
        fused = torch.stack([weights[f"blocks.{layer}.att.{mix}"].view(1, 1, -1) for mix in mixes])
        tensors[f"blk.{layer}.time_mix_lerp_fused.weight"] = fused
    if version == "x070":
        for part in "012":
            tensors[f"blk.0.time_mix_v{part}.weight"] = tensors[f"blk.0.time_mix_a{part}.weight"]
    return tensors


@versions
def test_every_tensor_in_fp32(version: str, tmp_path: Path) -> None:
    written, wanted = content(write(version, tmp_path / "model.gguf", "fp32")), expected(version)
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert written[name].shape == tensor.shape, name
        assert torch.equal(written[name], tensor), name


@versions
@pytest.mark.parametrize(
    ("precision", "kind", "error"), [("bf16", "BF16", 0), ("fp16", "F16", 1e-3), ("q8_0", "Q8_0", 1e-2)]
)
def test_precisions(version: str, precision: str, kind: str, error: float, tmp_path: Path) -> None:
    reader = write(version, tmp_path / "model.gguf", precision)
    for name, tensor in content(reader).items():
        wanted = expected(version)[name]
        assert (tensor - wanted).abs().max() <= error * wanted.abs().max(), name
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {types[name] for name in ("token_embd.weight", "output.weight", "blk.1.time_mix_key.weight")} == {kind}
    vectors = {tensor.name for tensor in reader.tensors if len(tensor.shape) == 1}
    assert {types[name] for name in vectors | {"blk.0.time_mix_lerp_fused.weight", "blk.1.time_mix_w1.weight"}} == {
        "F32"
    }
    if version == "x070":
        assert types["blk.1.time_mix_g1.weight"] == ("F16" if precision == "q8_0" else kind)
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{kind}"]


def test_the_precision_of_the_source_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    reader = write("x070", tmp_path / "model.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_BF16


def test_columns_that_make_no_whole_blocks_stay_fp16(tmp_path: Path) -> None:
    model = create(ModelShape("x070", 2, 48, 40, 16, 48, 96, {"w": 8, "a": 8, "v": 8, "g": 8}))
    initialise(model, 1)
    write_pth(tmp_path / "model.pth", model.state_dict())
    convert(tmp_path / "model.pth", tmp_path / "model.gguf", precision="q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (types["blk.0.channel_mix_key.weight"], types["blk.0.channel_mix_value.weight"]) == ("F16", "Q8_0")


@versions
def test_dimensions(version: str, tmp_path: Path) -> None:
    told = facts(write(version, tmp_path / "model.gguf"))
    shape = rookery.load(GOLDEN / f"{version}_ckpt.safetensors", device="cpu").shape
    arch = {"x060": "rwkv6", "x070": "rwkv7"}[version]
    assert told["general.architecture"] == arch
    own = {name.removeprefix(f"{arch}."): value for name, value in told.items() if name.startswith(f"{arch}.")}
    common = {
        "embedding_length": shape.n_embd,
        "block_count": shape.n_layer,
        "feed_forward_length": shape.dim_ffn,
        "wkv.head_size": shape.head_size,
        "attention.head_count": 0,
        "context_length": 1 << 20,
        "attention.layer_norm_epsilon": pytest.approx(1e-5),
    }
    ranks = {
        "x060": {"time_mix_extra_dim": 32, "time_decay_extra_dim": 64, "rescale_every_n_layers": 6},
        "x070": {f"attention.{name}_lora_rank": 32 for name in ("decay", "iclr", "value_residual_mix", "gate")},
    }
    assert own == common | ranks[version]


def unescaped(text: str) -> bytes:
    """llama.cpp's reading of a token: \\t, \\n, \\r, \\xNN, and any other escaped character as it is."""
    out, i = bytearray(), 0
    while i < len(text):
        if text[i] != "\\":
            out += text[i].encode()
            i += 1
        elif text[i + 1] == "x":
            out.append(int(text[i + 2 : i + 4], 16))
            i += 4
        else:
            out += {"t": b"\t", "n": b"\n", "r": b"\r"}.get(text[i + 1], text[i + 1].encode())
            i += 2
    return bytes(out)


@pytest.mark.parametrize("vocabulary", [VOCABULARY, World()], ids=["compact", "world"])
def test_tokenizer(vocabulary: World, tmp_path: Path) -> None:
    model = create(ModelShape("x070", 1, 32, vocabulary.vocab_size + 5, 32, 32, 32, dict.fromkeys("wavg", 32)))
    initialise(model, 1)
    write_pth(tmp_path / "model.pth", model.state_dict())
    convert(tmp_path / "model.pth", tmp_path / "model.gguf", tokenizer=lambda size: vocabulary)
    told = facts(gguf.GGUFReader(tmp_path / "model.gguf"))
    tokens, kinds = told["tokenizer.ggml.tokens"], told["tokenizer.ggml.token_type"]
    assert told["tokenizer.ggml.model"] == "rwkv"
    assert len(tokens) == len(kinds) == vocabulary.vocab_size + 5
    data, offsets = vocabulary.token_bytes()
    for i, (start, end) in enumerate(pairwise(offsets)):
        if end > start:
            assert unescaped(tokens[i]) == data[start:end].tobytes()
            assert kinds[i] == gguf.TokenType.NORMAL
    assert (tokens[0], kinds[0]) == ("<s>", gguf.TokenType.CONTROL)
    assert (tokens[-1], kinds[-1]) == (f"[PAD{len(tokens) - 1}]", gguf.TokenType.UNUSED)
    assert told["tokenizer.ggml.bos_token_id"] == told["tokenizer.ggml.eos_token_id"] == 0
    assert told["tokenizer.ggml.eot_token_id"] == vocabulary.encode("\n\n")[0]
    assert told["tokenizer.chat_template"] == CHAT_TEMPLATE


def test_a_file_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    convert(GOLDEN / "x070_ckpt.safetensors", tmp_path / "model.gguf")
    told = facts(gguf.GGUFReader(tmp_path / "model.gguf"))
    assert (told["tokenizer.ggml.model"], told["rwkv7.vocab_size"]) == ("no_vocab", 416)


def test_x052_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is x052; llama\.cpp runs x060 and x070"):
        convert(GOLDEN / "x052_ckpt.safetensors", tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'rookery\[gguf\]'"):
        convert(GOLDEN / "x070_ckpt.safetensors", tmp_path / "model.gguf")


def deep_model(version: str, path: Path) -> Path:
    """A random model of 8 layers: llama.cpp halves RWKV-6's residual stream after the sixth."""
    ranks = {"mix": 32, "decay": 64} if version == "x060" else dict.fromkeys("wavg", 32)
    model = create(ModelShape(version, 8, 64, VOCABULARY.vocab_size, 64, 64, 224, ranks))
    initialise(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    write_pth(path, model.state_dict())
    return path


LLAMA = """
import sys
import numpy as np
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], logits_all=True, n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
tokens = model.tokenize(sys.argv[2].encode(), add_bos=False)
model.eval(tokens)
np.savez(sys.argv[3], tokens=tokens, logits=model.scores[: len(tokens)])
"""


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@versions
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 5e-5), ("q8_0", 0.2)])
def test_llama_cpp_computes_our_logits(version: str, precision: str, tolerance: float, tmp_path: Path) -> None:
    source = deep_model(version, tmp_path / "model.pth")
    convert(source, tmp_path / "model.gguf", precision=precision, tokenizer=lambda size: VOCABULARY)
    text = "User: 你好 1+1=?\n\nAssistant: 世界"
    subprocess.run(
        [sys.executable, "-c", LLAMA, tmp_path / "model.gguf", text, tmp_path / "theirs.npz"],
        check=True,
        capture_output=True,
        timeout=300,
    )
    theirs = np.load(tmp_path / "theirs.npz")
    tokens = VOCABULARY.encode(text)
    assert theirs["tokens"].tolist() == tokens
    with torch.no_grad():
        ours = rookery.load(source, device="cpu")(torch.tensor([tokens]))[0][0]
    assert ours.std() > 0.3
    assert (torch.from_numpy(theirs["logits"]) - ours).abs().max() < tolerance
