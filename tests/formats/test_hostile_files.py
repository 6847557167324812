"""Weight files from strangers: whatever is in them, the answer is a model or one clear message, and soon."""

from __future__ import annotations

import json
import pickle
import re
import sys
import tempfile
import zipfile
from collections import OrderedDict
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import rookery
from rookery.errors import UserError
from rookery.formats import read_weights, write_pth
from rookery.formats.convert import convert
from rookery.formats.describe import describe
from rookery.models import ModelShape, create, initialise

RANKS: dict[str, dict[str, int]] = {"x070": dict.fromkeys("wavg", 8), "x060": {"mix": 8, "decay": 8}, "x052": {}}
KINDS = (".pth", ".safetensors", ".st", ".old.pth")
USES = (read_weights, describe, lambda path: rookery.load(path, device="cpu"))

fuzz = settings(
    max_examples=150,
    deadline=10_000,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)


def tiny(version: str) -> dict[str, torch.Tensor]:
    model = create(ModelShape(version, 2, 16, 20, 8, 16, 32, RANKS[version]))
    initialise(model, 1)
    return {name: tensor.half() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound file of each version and kind."""
    folder = tmp_path_factory.mktemp("hostile")
    for version in RANKS:
        write_pth(folder / f"{version}.pth", tiny(version))
        torch.save(tiny(version), folder / f"{version}.old.pth", _use_new_zipfile_serialization=False)
        for kind in (".safetensors", ".st"):
            convert(folder / f"{version}.pth", folder / f"{version}{kind}")
    return folder


def refused_or_used(path: Path) -> None:
    """Nothing but a UserError comes out of any use."""
    for use in USES:
        with suppress(UserError):
            use(path)
    with tempfile.TemporaryDirectory() as out:
        for target in ("other.safetensors", "other.gguf", "folder"):
            try:
                convert(path, Path(out) / target)
            except UserError:
                assert not (Path(out) / target).exists()


@fuzz
@given(
    version=st.sampled_from(sorted(RANKS)),
    kind=st.sampled_from(KINDS),
    cut=st.none() | st.floats(0, 1),
    changes=st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from(("begin", "end", "any")), st.integers(0, 255)), max_size=6
    ),
)
def test_damaged_bytes(folder: Path, version: str, kind: str, cut: float | None, changes: list[Any]) -> None:
    content = bytearray((folder / f"{version}{kind}").read_bytes())
    for where, region, value in changes:
        # Headers are at the beginning, the directory of a zip archive at the end.
        size = len(content) if region == "any" else min(6000, len(content))
        offset = int(where * (size - 1)) + (len(content) - size if region == "end" else 0)
        content[offset] = value
    damaged = folder / f"damaged{kind}"
    damaged.write_bytes(content if cut is None else content[: int(cut * len(content))])
    refused_or_used(damaged)


NAMES = [
    *sorted({name for version in RANKS for name in tiny(version)}),
    "blocks.7.att.r_k", "blocks.x.att.key.weight", "blocks..", "blocks.999999999.ln1.weight", "blocks.-1.att.w1", "",
    "blocks.0.att.time_state", "blocks.1.att.key.lora.0", "blocks.0.att.time_first", "blocks.1.att.time_mix_w1",
    "model.layers.0.attn.w_lora.lora.0.weight", "model.layers.0.attn.x_x", "model.layers.0.z", "model.layers.1.attn",
    "model.layers.0.attn.a_lora.lora.2.bias", "lm_head.weight", "../../etc/passwd",
]  # fmt: skip

shapes = st.lists(st.sampled_from((0, 1, 2, 3, 8, 16, 20, 32)), max_size=4)


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@fuzz
@given(
    base=st.sampled_from([None, *sorted(RANKS)]),
    odd=st.dictionaries(st.sampled_from(NAMES), st.tuples(st.sampled_from(("F16", "I64", "F8_E4M3", "BOOL")), shapes)),
    gone=st.sets(st.sampled_from(NAMES), max_size=3),
)
def test_sound_files_of_senseless_tensors(folder: Path, base: str | None, odd: dict[str, Any], gone: set[str]) -> None:
    content = {name: ("F16", list(tensor.shape)) for name, tensor in (tiny(base) if base else {}).items()} | odd
    header, end = {}, 0
    for name, (dtype, shape) in content.items():
        if name not in gone:
            size = {"F16": 2, "I64": 8, "F8_E4M3": 1, "BOOL": 1}[dtype] * torch.Size(shape).numel()
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
    path = folder / "senseless.safetensors"
    path.write_bytes(safetensors(header, bytes(end)))
    refused_or_used(path)


ENTRY = {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        (1 << 63).to_bytes(8, "little") + b"{}",
        (1 << 40).to_bytes(8, "little") + b"{}",
        safetensors(b"{"),
        safetensors(b"[" * 100_000),
        safetensors([]),
        safetensors({"a": 1}),
        safetensors({"a": ENTRY | {"shape": [1 << 62, 4]}}, bytes(8)),
        safetensors({"a": ENTRY | {"shape": [-4]}}, bytes(8)),
        safetensors({"a": ENTRY | {"data_offsets": [0, 1 << 50], "shape": [1 << 49]}}, bytes(8)),
        safetensors({"a": ENTRY | {"data_offsets": [8, 0]}}, bytes(8)),
        safetensors({"a": ENTRY | {"dtype": "F7"}}, bytes(8)),
        safetensors({"a": ENTRY, "b": ENTRY}, bytes(8)),
    ],
)
def test_safetensors_headers(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or no safetensors file"):
        read_weights(path)


def test_a_huge_tensor_without_elements_makes_no_huge_model(tmp_path: Path) -> None:
    header, end = {}, 0
    for name, tensor in tiny("x070").items():
        shape = [1 << 40, 0] if name.endswith("ffn.key.weight") else list(tensor.shape)
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(header, bytes(end)))
    with pytest.raises(UserError, match="names or shapes that no RWKV model has"):
        rookery.load(path, device="cpu")


STORAGE = object()


def archive(path: Path, value: object, compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip archive like those of `torch.save`, of any pickle; storage "0" has 64 bytes."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: object) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 16) if item is STORAGE else None

    stream = BytesIO()
    Pickler(stream, protocol=2).dump(value)
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("archive/data.pkl", stream.getvalue())
        out.writestr("archive/byteorder", sys.byteorder)
        out.writestr("archive/data/0", bytes(64))
        out.writestr("archive/version", "3\n")
    return path


class Rebuilt:
    """Pickled as a call of one of PyTorch's functions that make a tensor from its parts."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def strided(offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Rebuilt:
    rebuild = torch._utils._rebuild_tensor_v2
    return Rebuilt(rebuild, STORAGE, offset, size, stride, False, OrderedDict())


@pytest.mark.parametrize(
    "tensor",
    [
        strided(0, (1 << 30, 1 << 20), (0, 0)),
        strided(0, (1 << 40,), (1,)),
        strided(1 << 40, (4,), (1,)),
        strided(-4, (4,), (1,)),
        strided(0, (-1,), (1,)),
        strided(0, (1 << 62, 1 << 62), (0, 0)),
        Rebuilt(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (1 << 30, 1 << 20), (1, 1), False),
    ],
    ids=["repeats", "too-large", "beyond", "before", "negative", "overflow", "meta"],
)
def test_tensors_that_are_not_in_the_file(tensor: Rebuilt, tmp_path: Path) -> None:
    assert len(read_weights(archive(tmp_path / "sound.pth", {"emb.weight": strided(0, (4, 4), (4, 1))}))) == 1
    with pytest.raises(UserError, match=r"model\.pth is (damaged|not a flat dictionary of tensors)"):
        read_weights(archive(tmp_path / "model.pth", {"emb.weight": tensor}))


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    """Ten kilobytes could unpack to gigabytes."""
    bomb = archive(tmp_path / "model.pth", {"emb.weight": "0" * 10_000_000}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 20_000
    with pytest.raises(UserError, match=r"model\.pth is damaged or not a PyTorch file"):
        read_weights(bomb)


@pytest.mark.parametrize(
    "value", [[], {}, {1: strided(0, (4,), (1,))}, {"a": {"b": 1}}, "text", {"state_dict": [1]}, [1, 2, 3], None]
)
def test_what_is_no_dictionary_of_tensors(value: object, tmp_path: Path) -> None:
    path = archive(tmp_path / "model.pth", value)
    with pytest.raises(UserError, match=r"model\.pth"):
        describe(path)
    with pytest.raises(UserError, match=r"model\.pth"):
        convert(path, tmp_path / "other.safetensors")


class Run:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    archive(tmp_path / "model.pth", {"emb.weight": Run(tmp_path / "touched")})
    with pytest.raises(UserError, match="would run code when read; it is refused"):
        read_weights(tmp_path / "model.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"emb.weight": Run(tmp_path / "touched")}, protocol=2))
    with pytest.raises(UserError, match=r"old\.pth"):
        read_weights(tmp_path / "old.pth")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("name", "begin", "said"),
    [
        ("chat.jsonl", b'{"text": "hello"}\n', "is training data, no file of weights: choose a .pth or .safetensors"),
        ("model.gguf", b"GGUF\x03\0\0\0", "is a GGUF model, which is made for llama.cpp"),
        ("page.pth", b"<!DOCTYPE html>", "is damaged or not a PyTorch file; copy or download it again"),
        ("empty.pth", b"", "is damaged or not a PyTorch file"),
    ],
)
def test_a_file_of_another_kind_is_named_and_not_taken_for_code(
    name: str, begin: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(begin)
    with pytest.raises(UserError, match=re.escape(f"{name} {said}")):
        read_weights(tmp_path / name)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[" * 100_000,
        "[]",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": "../secret.safetensors"}}',
        '{"weight_map": {"a": "model.safetensors", "b": ["model.safetensors"]}}',
    ],
)
def test_an_index_of_parts(index: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    write_pth(tmp_path / "a.pth", {"a": torch.zeros(2)})
    for name in (tmp_path / "secret.safetensors", folder / "model.safetensors"):
        convert_one(name)
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(UserError, match=r"index\.json is damaged or no index of weights"):
        read_weights(folder)


def convert_one(path: Path) -> None:
    path.write_bytes(safetensors({"a": ENTRY}, bytes(8)))
