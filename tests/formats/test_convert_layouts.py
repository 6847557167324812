"""Models and adapters through `convert`: Ai00's layout against what its own converter wrote, and every way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import rookery
from rookery.adapters import AdapterConfig
from rookery.errors import UserError
from rookery.formats import Base, Pending, read_adapter, read_weights, write_adapter, write_pth, write_weights
from rookery.formats.convert import convert
from rookery.formats.stream import pending

GOLDEN = Path(__file__).parent.parent / "golden"
CONVERTED = json.loads((GOLDEN / "st_conversion.json").read_text(encoding="utf-8"))
VERSIONS = ("x052", "x060", "x070")

versions = pytest.mark.parametrize("version", VERSIONS)


def checkpoint(version: str) -> Path:
    return GOLDEN / f"{version}_ckpt.safetensors"


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name], tensor), name


def original_name(name: str, transposed: list[str]) -> str:
    """What the converter's tensor was called in the .pth it read; x060 calls time_mix what x052 calls so too."""
    name = name.replace("time_first", "time_faaaa").replace("lora.0", "lora_A").replace("lora.1", "lora_B")
    if any("time_maa" in other for other in transposed):
        name = name.replace("time_mix", "time_maa")
    return name


@versions
def test_st_is_what_the_converter_of_ai00_writes(version: str, tmp_path: Path) -> None:
    shapes, transposed = CONVERTED[version], CONVERTED[f"{version}_transposed"]
    tensors = {}
    for name, shape in shapes.items():
        old = original_name(name, transposed)
        size = (*shape[:-2], shape[-1], shape[-2]) if old in transposed else shape
        tensors[old] = torch.randn(size).bfloat16()
    assert set(transposed) <= tensors.keys()
    write_pth(tmp_path / "model.pth", tensors)

    convert(tmp_path / "model.pth", tmp_path / "model.st")
    written = load_file(tmp_path / "model.st")
    assert {name: list(tensor.shape) for name, tensor in written.items()} == shapes
    for name, tensor in written.items():
        old = original_name(name, transposed)
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, (tensors[old].mT if old in transposed else tensors[old]).half()), name
    with safe_open(tmp_path / "model.st", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}

    same(read_weights(tmp_path / "model.st"), {name: tensor.half() for name, tensor in tensors.items()})


def test_an_x070_st_of_the_other_converter_is_read(tmp_path: Path) -> None:
    """The one written in Rust leaves the matrices of x070 as they are."""
    original = {name: tensor.half() for name, tensor in read_weights(checkpoint("x070")).items()}
    save_file(original, tmp_path / "model.st")
    same(read_weights(tmp_path / "model.st"), original)


@versions
@pytest.mark.parametrize("endings", [(".pth", ".safetensors"), (".safetensors", ".pth"), (".st", ".pth")])
def test_every_way_there_and_back_keeps_every_bit(version: str, endings: tuple[str, str], tmp_path: Path) -> None:
    first, second = (tmp_path / f"model{ending}" for ending in endings)
    original = read_weights(checkpoint(version))
    if first.suffix == ".st":
        original = {name: tensor.half() for name, tensor in original.items()}
    done = convert(checkpoint(version), first)
    assert (done.kind, done.tensors, done.bytes) == ("model", len(original), first.stat().st_size)
    convert(first, second)
    same(read_weights(second), original)
    assert rookery.load(second).shape == rookery.load(checkpoint(version)).shape


def test_a_written_pth_is_one_of_pytorch_and_maps(tmp_path: Path) -> None:
    convert(checkpoint("x070"), tmp_path / "model.pth")
    original = read_weights(checkpoint("x070"))
    for mmap in (False, True):
        same(torch.load(tmp_path / "model.pth", weights_only=True, mmap=mmap), original)


def test_tensors_are_aligned_in_a_file_for_whoever_maps_it(tmp_path: Path) -> None:
    odd = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(5).half(), "c": torch.ones(()), "d": torch.ones(0, 2)}
    write_weights(tmp_path / "odd.pth", pending(odd))
    mapped = torch.load(tmp_path / "odd.pth", weights_only=True, mmap=True)
    same(mapped, odd)
    assert {tensor.data_ptr() % 64 for tensor in mapped.values()} == {0}
    write_weights(tmp_path / "odd.safetensors", pending(odd))
    same(load_file(tmp_path / "odd.safetensors"), odd)
    content = (tmp_path / "odd.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert [header[name]["data_offsets"][0] % tensor.itemsize for name, tensor in odd.items()] == [0, 0, 0, 0]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    def fail() -> Tensor:
        raise OSError("no space left on device")

    for name in ("model.pth", "model.safetensors"):
        (tmp_path / name).write_text("before", encoding="utf-8")
        items = [Pending("a", (2,), torch.float32, lambda: torch.ones(2)), Pending("b", (2,), torch.float32, fail)]
        with pytest.raises(UserError, match=r"cannot write .*: no space left on device"):
            write_weights(tmp_path / name, items)
        assert (tmp_path / name).read_text(encoding="utf-8") == "before"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_asked_for(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {name: tensor.float() * 1.0001 for name, tensor in read_weights(checkpoint("x060")).items()}
    write_pth(tmp_path / "model.pth", weights | {"count": torch.tensor([7])})
    convert(tmp_path / "model.pth", tmp_path / "other.pth", precision=precision)
    converted = read_weights(tmp_path / "other.pth")
    assert converted.pop("count").dtype == torch.int64
    same(converted, {name: tensor.to(dtype) for name, tensor in weights.items()})


def test_what_fp16_cannot_hold_is_refused(tmp_path: Path) -> None:
    weights = {name: tensor.float() for name, tensor in read_weights(checkpoint("x070")).items()}
    weights["blocks.1.ffn.value.weight"][3, 4] = -70000
    write_pth(tmp_path / "model.pth", weights)
    with pytest.raises(UserError, match=r"blocks\.1\.ffn\.value\.weight has values beyond the range of fp16"):
        convert(tmp_path / "model.pth", tmp_path / "model.st")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]


def test_adapters_there_and_back(tmp_path: Path) -> None:
    adapter = {
        f"blocks.{layer}.att.key.lora_{part}": torch.randn(shape).half()
        for layer in range(2)
        for part, shape in {"A": (4, 64), "B": (64, 4)}.items()
    } | {"blocks.0.ln1.weight": torch.ones(64).half()}
    write_pth(tmp_path / "adapter.pth", adapter)
    done = convert(tmp_path / "adapter.pth", tmp_path / "adapter.st")
    assert done.kind == "adapter"
    assert load_file(tmp_path / "adapter.st")["blocks.1.att.key.lora.0"].shape == (64, 4)
    convert(tmp_path / "adapter.st", tmp_path / "back.pth")
    same(read_weights(tmp_path / "back.pth"), adapter)


@pytest.mark.parametrize("part", ["lora_magnitude_vector", "init_lora_A", "disha", "bone"])
def test_ai00_gets_no_adapter_of_which_it_knows_half(part, tmp_path: Path) -> None:
    tensors = {f"blocks.0.att.key.{name}": torch.ones(4, 64) for name in ("lora_A", "lora_B", part)}
    write_pth(tmp_path / "adapter.pth", tensors)
    with pytest.raises(UserError, match=f"Ai00 would leave out {part}"):
        convert(tmp_path / "adapter.pth", tmp_path / "adapter.st")
    assert not (tmp_path / "adapter.st").exists()


def test_the_description_of_an_adapter_survives(tmp_path: Path) -> None:
    tensors = {"blocks.0.att.key.lora_A": torch.ones(4, 64), "blocks.0.att.key.lora_B": torch.ones(64, 4)}
    config = AdapterConfig("lora", r=4, alpha=32.0, targets=("att.key",))
    base = Base.of(read_weights(checkpoint("x070")), checkpoint("x070"))
    write_adapter(tmp_path / "a.safetensors", tensors, config, base)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", precision="bf16")
    found = read_adapter(tmp_path / "b.safetensors")
    assert (found.config, found.base) == (config, base)
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.bfloat16}


def test_an_adapter_between_trainers(tmp_path: Path) -> None:
    """A slim .pth to a file that says what it is, to a folder of Hugging Face peft, and back."""
    tensors = {"blocks.0.att.key.lora_A": torch.ones(4, 64), "blocks.0.att.key.lora_B": torch.ones(64, 4)}
    write_pth(tmp_path / "slim.pth", tensors)
    with pytest.raises(UserError, match="does not say its alpha"):
        convert(tmp_path / "slim.pth", tmp_path / "own.safetensors")
    convert(tmp_path / "slim.pth", tmp_path / "own.safetensors", alpha=32)
    assert read_adapter(tmp_path / "own.safetensors").config.alpha == 32.0
    done = convert(tmp_path / "own.safetensors", tmp_path / "peft", to="hf")
    assert (done.kind, done.tensors) == ("adapter", 2)
    assert read_adapter(tmp_path / "peft").config.alpha == 32.0
    convert(tmp_path / "peft", tmp_path / "back.pth")
    same(read_weights(tmp_path / "back.pth"), tensors)
    with pytest.raises(UserError, match="is a folder of Hugging Face peft, which becomes"):
        convert(tmp_path / "peft", tmp_path / "back.st")
