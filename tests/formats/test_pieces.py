"""A run directory whose newest weights lie in pieces, as several devices save them: read, loaded, converted, merged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rookery
from rookery.adapters import AdapterConfig, adapter_tensors, attach
from rookery.errors import UserError
from rookery.formats import Base, merge, read_weights, weight_file, write_adapter, write_pth
from rookery.formats.convert import convert
from rookery.formats.source import Source
from rookery.models import Model, ModelShape, create, initialise
from rookery.train.strategies.pieces import Piece, write_pieces

SHAPE = ModelShape("x070", 2, 64, 40, 32, 64, 256, dict.fromkeys("wavg", 32))


def tiny() -> Model:
    model = create(SHAPE, kernel="chunked")
    initialise(model, 1)
    return model


def in_pieces(run: Path, tensors: dict[str, Tensor], ranks: int = 3) -> Path:
    """As FSDP2 saves them: each rank a range of every tensor; the first only of one rank, as under ddp."""
    folder = run / "checkpoints" / "step-00000008"
    folder.mkdir(parents=True)
    for rank in range(ranks):
        pieces = []
        for number, (name, tensor) in enumerate(tensors.items()):
            flat = tensor.detach().reshape(-1)
            size = -(-len(flat) // ranks) if number else len(flat)
            pieces.append(Piece(name, tuple(tensor.shape), rank * size, flat[rank * size : (rank + 1) * size]))
        write_pieces(folder, "weights", pieces, rank, ranks)
    return folder


def test_they_are_read_like_one_file(tmp_path: Path) -> None:
    model = tiny()
    older = tmp_path / "rwkv-0.pth"
    write_pth(older, {"a": torch.ones(1)})
    assert weight_file(tmp_path) == older
    folder = in_pieces(tmp_path, model.state_dict())
    os.utime(older, (1, 1))
    found = read_weights(tmp_path)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert read_weights(folder / "weights-00002-of-00003.safetensors").keys() == found.keys()
    tokens = torch.arange(20).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(rookery.load(tmp_path)(tokens)[0], model.eval()(tokens)[0])
    write_pth(tmp_path / "rwkv-final.pth", {"a": torch.ones(1)})
    assert weight_file(tmp_path).name == "rwkv-final.pth"


def test_one_tensor_at_a_time_is_put_together(tmp_path: Path) -> None:
    model = tiny()
    in_pieces(tmp_path / "run", model.state_dict())
    source = Source(tmp_path / "run")
    assert source.model_shape() == SHAPE
    assert source.dtype() == torch.float32
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert torch.equal(source.tensor("head.weight"), model.head.weight)

    convert(tmp_path / "run", tmp_path / "model.safetensors")
    assert torch.equal(read_weights(tmp_path / "model.safetensors")["head.weight"], model.head.weight)

    attach(model, AdapterConfig("lora", r=4), seed=0)
    adapter = tmp_path / "adapter.safetensors"
    weights = {name: p.detach() + 0.01 for name, p in model.named_parameters() if "lora" in name}
    base = Base.of(read_weights(tmp_path / "run"), tmp_path / "run")
    write_adapter(adapter, adapter_tensors(model, weights=weights), AdapterConfig("lora", r=4), base)
    merge(tmp_path / "run", adapter, tmp_path / "merged.pth")
    merged = read_weights(tmp_path / "merged.pth")
    assert torch.equal(merged["emb.weight"], model.emb.weight)
    assert not torch.equal(merged["blocks.0.ffn.key.weight"], read_weights(tmp_path / "run")["blocks.0.ffn.key.weight"])


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    folder = in_pieces(tmp_path, tiny().state_dict())
    (folder / "weights-00001-of-00003.safetensors").unlink()
    for read in (read_weights, Source):
        with pytest.raises(UserError, match="only some of the pieces"):
            read(tmp_path)
