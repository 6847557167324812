"""A quantised layer computes with the weight that it says it holds, forward and backward, and holds it in few bytes."""

from __future__ import annotations

import copy
import importlib.util
import io
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rookery.adapters import AdapterConfig, attach, initial_factors
from rookery.errors import UserError
from rookery.models import Model, ModelShape, create, initialise
from rookery.ops.linear import Linear
from rookery.quant import KINDS, Kind, QuantLinear, linear, quantise
from rookery.quant.codes import NF4, dequantise, dequantise_bitsandbytes, dequantise_plain, quantise_weight

SIZES = [(96, 64), (40, 100), (7, 33), (5, 1), (130, 192)]
"""(out, in), most of them no multiples of a block."""


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def dense_layer(out_features: int, in_features: int) -> Linear:
    layer = Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=0.05, generator=torch.Generator().manual_seed(1))
    return layer


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of the tests are dequantised in several pieces, as large ones are."""
    monkeypatch.setattr(linear, "AT_ONCE", 1000)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_output_and_gradient_are_those_of_the_dense_weight(
    kind: Kind, size: tuple[int, int], dtype: torch.dtype, small_pieces: None
) -> None:
    layer = QuantLinear.of(dense_layer(*size), kind).to(dtype)
    x = normal(2, 17, size[1]).to(dtype).requires_grad_()
    weight = layer.dense()
    assert weight.dtype == dtype
    y = layer(x)
    y.backward(normal(*y.shape, seed=2).to(dtype))

    exact = x.detach().double().requires_grad_()
    want = exact @ weight.double().T
    want.backward(normal(*y.shape, seed=2).to(dtype).double())
    tolerance = 4 * torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert error(y, want) < tolerance
    assert x.grad is not None
    assert error(x.grad, exact.grad) < tolerance


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.0065), ("nf4", 0.1)])
def test_error_on_normal_weights(kind: Kind, bound: float) -> None:
    layer = dense_layer(256, 512)
    assert error(QuantLinear.of(layer, kind).dense(), layer.weight) < bound


def test_nf4_takes_the_nearest_code_point() -> None:
    weight = normal(3, 128)
    codes, scales = quantise_weight(weight, "nf4")
    blocks = weight.view(3, 2, 64)
    distance = (blocks[..., None] / blocks.abs().amax(-1)[..., None, None] - torch.tensor(NF4)).abs()
    nearest = torch.tensor(NF4)[distance.argmin(-1)] * blocks.abs().amax(-1, keepdim=True)
    assert torch.equal(dequantise(codes, scales, "nf4", 128, torch.float32), nearest.flatten(1))


def test_int8_is_within_half_a_step() -> None:
    weight = normal(5, 100)
    codes, scales = quantise_weight(weight, "int8")
    off = dequantise(codes, scales, "int8", 100, torch.float32) - weight
    steps = scales.repeat_interleave(64, dim=1)[:, :100]
    assert (off.abs() <= 0.5001 * steps).all()
    assert torch.allclose(scales[:, 0], weight[:, :64].abs().amax(1) / 127)


@pytest.mark.parametrize("kind", KINDS)
def test_quantising_again_changes_nothing(kind: Kind) -> None:
    codes, scales = quantise_weight(normal(50, 100), kind)
    weight = dequantise(codes, scales, kind, 100, torch.float32)
    codes_again, scales_again = quantise_weight(weight, kind)
    assert torch.equal(codes, codes_again)
    assert torch.allclose(scales, scales_again, rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: Kind) -> None:
    layer = dense_layer(4, 128)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.weight[2, :64] = 0
    dense = QuantLinear.of(layer, kind).dense()
    assert torch.equal(dense == 0, (layer.weight == 0) | (dense == 0))
    assert (dense[1] == 0).all()
    assert (dense[2, :64] == 0).all()


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.5), ("nf4", 4.5)])
def test_bytes(kind: Kind, bits: float) -> None:
    layer = QuantLinear.of(dense_layer(192, 256), kind)
    assert list(layer.parameters()) == []
    assert sum(b.numel() * b.element_size() for b in layer.buffers()) == 192 * 256 * bits / 8
    odd = QuantLinear.of(dense_layer(10, 65), kind)
    assert odd.scales.shape == (10, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_large_is_kept_for_the_backward_pass(kind: Kind) -> None:
    layer = QuantLinear.of(dense_layer(64, 64), kind)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(normal(8, 64).requires_grad_()).sum().backward()
    assert sum(t.numel() for t in kept) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low_rank", [False, True])
def test_survives_dtypes_copies_and_files(kind: Kind, low_rank: bool, tmp_path: Path) -> None:
    factors = (0.1 * normal(4, 100), 0.1 * normal(40, 4)) if low_rank else None
    layer = QuantLinear.of(dense_layer(40, 100), kind, factors)
    exact = layer.dense()
    moved = copy.deepcopy(layer).to(torch.bfloat16).to(torch.float16).to("cpu").float()
    assert error(moved.dense(), exact) < (5e-3 if low_rank else 0) + 1e-12
    assert torch.equal(moved.scales, layer.scales)
    assert torch.equal(copy.deepcopy(layer).dense(), exact)

    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    loaded = QuantLinear(100, 40, kind, rank=4 if low_rank else 0)
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(loaded.dense(), exact)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(loaded.dense(), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_beside_the_codes_are_exact(kind: Kind) -> None:
    """Large singular values outside the codes leave a residual with a smaller error, as PiSSA intends."""
    layer = dense_layer(128, 128)
    with torch.no_grad():
        layer.weight += 0.5 * normal(128, 2, seed=3) @ normal(2, 128, seed=4)
    U, S, V = torch.linalg.svd(layer.weight.detach())
    B0, A0 = U[:, :2] * S[:2].sqrt(), S[:2].sqrt()[:, None] * V[:2]
    with_factors, without = QuantLinear.of(layer, kind, (A0, B0)), QuantLinear.of(layer, kind)
    assert error(with_factors.dense(), layer.weight) < 0.3 * error(without.dense(), layer.weight)
    residual = Linear(128, 128)
    residual.weight.data = layer.weight.detach() - B0 @ A0
    assert torch.allclose(with_factors.dense(), QuantLinear.of(residual, kind).dense() + B0 @ A0, atol=1e-6)
    x = normal(5, 128).requires_grad_()
    y = with_factors(x)
    assert error(y, x @ with_factors.dense().T) < 1e-6
    y.sum().backward()
    assert x.grad is not None
    assert error(x.grad, with_factors.dense().sum(0).expand(5, 128)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_native_and_plain_forms_have_the_same_bits(kind: Kind, size: tuple[int, int]) -> None:
    codes, scales = quantise_weight(normal(*size), kind)
    plain = dequantise_plain(codes, scales, kind, size[1])
    assert torch.equal(dequantise(codes, scales, kind, size[1], torch.float32), plain)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(dequantise(codes, scales, kind, size[1], torch.float32), plain)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", SIZES)
def test_bitsandbytes_reads_our_layout(size: tuple[int, int]) -> None:
    import bitsandbytes.functional as bnb

    for kind in KINDS:
        codes, scales = quantise_weight(normal(*size), kind)
        plain = dequantise_plain(codes, scales, kind, size[1])
        assert torch.equal(dequantise_bitsandbytes(codes, scales, kind, size[1], torch.float32), plain)
    if size[1] % 64 == 0:
        packed, state = bnb.quantize_4bit(normal(*size), blocksize=64, quant_type="nf4")
        codes, scales = quantise_weight(normal(*size), "nf4")
        assert torch.equal(packed.view(codes.shape), codes)
        assert torch.equal(state.absmax.view(scales.shape), scales)


def small_model(version: str) -> Model:
    ranks = {"x070": {"w": 32, "a": 32, "v": 32, "g": 32}, "x060": {"mix": 32, "decay": 64}, "x052": {}}[version]
    shape = ModelShape(version, 2, 64, 40, 32, 64, 96, ranks)
    model = create(shape)
    initialise(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * normal(*p.shape))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
def test_a_quantised_model_computes_with_its_dense_weights(version: str, kind: Kind) -> None:
    model = small_model(version)
    dense = copy.deepcopy(model)
    gone = quantise(model, kind)
    expected = {"x052": 5 + 3, "x060": 5 + 3, "x070": 4 + 2}[version] * 2
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(gone) == len(layers) == expected
    assert {f"{name}.weight" for name in layers} == set(gone)
    assert dense.state_dict().keys() - model.state_dict().keys() == set(gone)
    for name, layer in layers.items():
        dense.get_submodule(name).weight.data = layer.dense()
    tokens = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(0))
    states = [nn.Parameter(normal(2, 32, 32, seed=layer) * 0.1) for layer in range(2)]
    grads = []
    for m in (dense, model):
        for block, state in zip(m.blocks, states, strict=True):
            block.att.time_state = state
        loss, _ = m.loss(tokens, tokens)
        grads.append([loss.detach(), *torch.autograd.grad(loss, states)])
    for got, want in zip(grads[1], grads[0], strict=True):
        assert error(got, want) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_quantising_a_mapped_checkpoint(kind: Kind, tmp_path: Path) -> None:
    """The checkpoint's tensors are quantised without the model's own ever being set, and the same each time."""
    model = small_model("x070").to(torch.bfloat16)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    weights = torch.load(tmp_path / "model.pth", mmap=True, weights_only=True)
    fresh = create(model.shape)
    gone = quantise(fresh, kind, weights=weights)
    quantise(model, kind)
    assert set(gone) <= weights.keys()
    for name, buffer in model.state_dict().items():
        if name.endswith((".codes", ".scales")):
            assert torch.equal(buffer, fresh.state_dict()[name])


def test_what_cannot_be_quantised_is_named() -> None:
    model = small_model("x070")
    weights = dict(model.state_dict())
    del weights["blocks.1.ffn.key.weight"]
    with pytest.raises(UserError, match=r"has no blocks\.1\.ffn\.key\.weight"):
        quantise(copy.deepcopy(model), "nf4", weights=weights)
    weights["blocks.1.ffn.key.weight"] = torch.zeros(3, 64)
    with pytest.raises(UserError, match=r"\(3, 64\).*\(96, 64\)"):
        quantise(copy.deepcopy(model), "nf4", weights=weights)
    with torch.no_grad():
        model.blocks[1].att.value.weight[3, 3] = math.nan
    with pytest.raises(UserError, match=r"blocks\.1\.att\.value\.weight.*NaN"):
        quantise(model, "int8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_adapters_of_a_layer_stay_with_it(method: str, kind: Kind) -> None:
    model = small_model("x070")
    attach(model, AdapterConfig(method, r=4))
    dense = copy.deepcopy(model)
    quantise(model, kind, low_rank=initial_factors(model))
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            assert (layer.low_rank_A is not None) == (method == "pissa")
            dense.get_submodule(name).weight.data = layer.dense()
    tokens = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(0))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in dense.named_parameters() if p.requires_grad}
    for m in (dense, model):
        with torch.no_grad():
            for name in trained:
                m.get_parameter(name).add_(0.02 * normal(*m.get_parameter(name).shape))
        m.loss(tokens, tokens)[0].backward()
    for name in trained:
        assert error(model.get_parameter(name).grad, dense.get_parameter(name).grad) < 1e-4
