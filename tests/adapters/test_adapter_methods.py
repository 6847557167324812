"""Every method on every generation and precision: what it adds, what it leaves alone, and that it comes off again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapter_models import CONFIGS, VERSIONS, base_model, golden, logits, pretend_training, tokens, trained
from torch import Tensor

from rookery.adapters import (
    AdapterConfig,
    adapter_tensors,
    attach,
    attached,
    create,
    detach,
    enable,
    find_targets,
    initial_factors,
)
from rookery.errors import UserError
from rookery.models import Model
from rookery.ops.linear import Linear
from rookery.quant import quantise

versions = pytest.mark.parametrize("version", VERSIONS)
methods = pytest.mark.parametrize("method", CONFIGS)
kinds = pytest.mark.parametrize("kind", ["fp32", "bf16", "fp64", "int8", "nf4"])
DTYPES = {"bf16": torch.bfloat16, "fp64": torch.float64}


def on_base(version: str, config: AdapterConfig, kind: str) -> tuple[Model, Tensor]:
    """A model of that kind with a new adapter, and the logits of its base."""
    model = base_model(version, DTYPES.get(kind, torch.float32))
    before = logits(model)
    attach(model, config, seed=1)
    if kind in ("int8", "nf4"):
        quantise(model, kind, low_rank=initial_factors(model))
        enable(model, "default", False)
        before = logits(model)
        enable(model, "default", True)
    return model, before


@kinds
@methods
@versions
def test_a_new_adapter_is_nothing_and_a_disabled_one_too(version: str, method: str, kind: str) -> None:
    model, before = on_base(version, CONFIGS[method], kind)
    assert torch.equal(logits(model), before)
    if kind == "bf16":  # as a trainer that keeps fp32 masters rounds it
        assert torch.equal(logits(model.to(torch.bfloat16)), before)
    pretend_training(model)
    assert (logits(model) - before).abs().max() > 0.02
    enable(model, "default", False)
    assert torch.equal(logits(model), before)


@kinds
@methods
@versions
def test_gradients_reach_the_adapter_and_nothing_else(version: str, method: str, kind: str) -> None:
    model, _before = on_base(version, CONFIGS[method], kind)
    pretend_training(model)
    model.train()
    data = tokens(version)
    model.loss(data[:, :-1], data[:, 1:])[0].backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in model.named_parameters() if ".adapters." in name}
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["fp32", "fp64"])
@methods
@versions
def test_merged_is_unmerged(version: str, method: str, kind: str) -> None:
    model, _before = on_base(version, CONFIGS[method], kind)
    pretend_training(model)
    wanted = logits(model)
    merged = {f"{name}.weight": m.adapters["default"].merged(m.weight) for name, m in find_targets(model, None)}
    detach(model)
    assert not attached(model)
    for name, weight in merged.items():
        model.get_parameter(name).data = weight
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-12 if kind == "fp64" else 3e-4)


@methods
@versions
def test_tensors_out_and_in(version: str, method: str) -> None:
    config = replace(CONFIGS[method], train_parts=("time", "ln", "emb", "head"))
    model, tensors = trained(version, config)
    assert not any("adapters" in name for name in tensors)
    again = base_model(version)
    attach(again, config, tensors=tensors)
    assert torch.equal(logits(again), logits(model))


@versions
def test_several_adapters_add_up(version: str) -> None:
    """In each matrix what is added is the sum of what each alone adds."""
    model = base_model(version, torch.float64)
    for name, method in enumerate(["lora", "dora", "pissa", "padded", "bat", "bat_rows"]):
        attach(model, CONFIGS[method], str(name), seed=name)
        pretend_training(model, str(name))
    model.eval()
    linear = model.blocks[1].ffn.key
    assert isinstance(linear, Linear)
    x = torch.randn(5, linear.in_features, dtype=torch.float64)
    plain = linear.product(x)
    alone = []
    for one in attached(model):
        for name in attached(model):
            enable(model, name, name == one)
        alone.append(linear(x) - plain)
    for name in attached(model):
        enable(model, name)
    torch.testing.assert_close(linear(x) - plain, sum(alone), rtol=0, atol=1e-12)

    detach(model, "3")
    assert list(attached(model)) == ["0", "1", "2", "4", "5"]
    assert not any(".adapters.3." in name for name, _ in model.named_parameters())


def test_the_last_adapter_attached_is_the_one_that_trains() -> None:
    model = base_model("x070")
    attach(model, CONFIGS["lora"], "old")
    attach(model, CONFIGS["bone"], "new")
    training = {name.split(".adapters.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert training == {"new"}


@versions
def test_base_parameters_that_train_as_well(version: str) -> None:
    config = replace(CONFIGS["lora"], train_parts=("time", "ln"))
    model = base_model(version)
    before = logits(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    attach(model, config)
    whole = {name for name, p in model.named_parameters() if p.requires_grad and ".adapters." not in name}
    expected = {name for name in weights if ".ln" in name or name.startswith("ln_out")}
    if version == "x070":
        matrices = {"receptance", "key", "value", "output"}
        expected |= {n for n in weights if ".att." in n and n.split(".")[3] not in matrices} | {
            n for n in weights if n.endswith("ffn.x_k")
        }
    else:
        expected |= {name for name in weights if "time" in name}
    assert whole == expected

    pretend_training(model)
    after = logits(model)
    tensors = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
    assert whole <= tensors.keys()
    enable(model, "default", False)
    assert torch.equal(logits(model), before)
    assert adapter_tensors(model).keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapter_tensors(model).items())
    enable(model, "default", True)
    assert torch.equal(logits(model), after)
    with pytest.raises(UserError, match="belongs to an adapter of this model already"):
        attach(model, config, "second")
    detach(model)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (None, 18),
        (("key",), 6),
        (("att.key",), 3),
        (("att",), 12),
        (("ffn", "receptance"), 9),
        (("blocks.1.att.output", "blocks.2.ffn.value"), 2),
    ],
)
def test_targets(targets: tuple[str, ...] | None, found: int) -> None:
    model = base_model("x070")
    attach(model, replace(CONFIGS["lora"], targets=targets))
    assert sum(name.endswith(".lora_A") for name, _ in model.named_parameters()) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("att.gate",)}, "no matrix att.gate for an adapter; it has att.key, att.output, att.receptance"),
        ({"targets": ("head",)}, "head gets no adapter; it can train as a whole: add it to train_parts"),
        ({"train_parts": ("lns",)}, "train_parts: lns is not one of time, ln, emb, head"),
        ({"method": "bone"}, "method: bone is not one of lora, dora, pissa, miss"),
        ({"miss_mode": "mini"}, "miss_mode: mini is not one of bone, bat"),
        ({"r": 0}, "rank 0"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"method": "pissa", "r": 129}, "pissa of rank 129 is not possible for a matrix of 128 x 128"),
        ({"method": "miss", "r": 129}, "miss of rank 129 is not possible for a matrix with 128 inputs"),
        ({"method": "miss", "miss_mode": "bat", "r": 48}, "not divisible by lora_r 48"),
    ],
)
def test_what_is_impossible_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attach(base_model("x070"), replace(CONFIGS["lora"], **changes))


def test_tensors_that_do_not_fit_are_refused() -> None:
    model, tensors = trained("x070", CONFIGS["lora"])
    with pytest.raises(UserError, match=r"called default: the name is taken"):
        attach(model, CONFIGS["lora"])
    for change, message in (
        ({"blocks.0.att.key.lora_A": None}, r"lacks 1 tensors \(blocks.0.att.key.lora_A\)"),
        ({"blocks.7.att.key.lora_A": torch.zeros(8, 128)}, r"no place for \(blocks.7.att.key.lora_A\)"),
        ({"blocks.0.att.key.lora_A": torch.zeros(8, 64)}, r"has shape \(8, 64\), the model needs \(8, 128\)"),
    ):
        broken = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        with pytest.raises(UserError, match=message):
            attach(base_model("x070"), CONFIGS["lora"], tensors=broken)


def test_dropout_is_for_training_and_for_lora_and_dora() -> None:
    for method in ("lora", "dora"):
        model, before = on_base("x070", replace(CONFIGS[method], dropout=0.5), "fp64")
        pretend_training(model)
        still = logits(model)
        assert torch.equal(logits(model), still)
        model.train()
        with torch.no_grad():
            noisy = torch.stack([model(tokens("x070"))[0] for _ in range(2)])
        assert not torch.equal(noisy[0], noisy[1])
        assert before.shape == noisy[0].shape


def test_the_strength_of_lora() -> None:
    assert CONFIGS["lora"].scale == 2.0
    assert CONFIGS["rslora"].scale == 16 / 8**0.5


def test_a_seed_gives_the_same_adapter() -> None:
    def first(seed: int, method: str) -> Tensor:
        model = base_model("x070")
        attach(model, CONFIGS[method], seed=seed)
        return adapter_tensors(model)["blocks.2.ffn.value.lora_A"]

    for method in ("lora", "pissa"):
        assert torch.equal(first(1, method), first(1, method))
        assert not torch.equal(first(1, method), first(2, method))
    bound = 512**-0.5
    A = first(1, "lora")
    assert 0.95 * bound < A.abs().max() <= bound


def test_pissa_begins_with_the_dominant_part_of_each_matrix() -> None:
    case = golden("peft_pissa")
    method = create(AdapterConfig("pissa", r=8), 96, 64).to_empty(device="cpu")
    method.initialise(case["W"], torch.Generator().manual_seed(0))
    found = method.get_parameter("lora_B") @ method.get_parameter("lora_A")
    wanted = case["init_lora_B"] @ case["init_lora_A"]
    assert (found - wanted).norm() / wanted.norm() < 1e-5
    U, S, V = torch.linalg.svd(case["W"].double())
    exact = (U[:, :8] * S[:8]) @ V[:8]
    assert (found.double() - exact).norm() / exact.norm() < 1e-5
    for factor in (method.get_parameter("lora_B"), method.get_parameter("lora_A").T):
        torch.testing.assert_close(factor.norm(dim=0), case["singular_values"].sqrt(), rtol=1e-4, atol=0)


def test_a_loop_of_decoding_keeps_what_dora_computed_until_something_changes() -> None:
    model, _before = on_base("x070", CONFIGS["dora"], "fp32")
    pretend_training(model)
    first = logits(model)
    assert torch.equal(logits(model), first)
    pretend_training(model)
    again, _before = on_base("x070", CONFIGS["dora"], "fp32")
    pretend_training(again)
    pretend_training(again)
    assert torch.equal(logits(model), logits(again))
    assert not torch.equal(logits(model), first)


def test_precision_of_what_an_adapter_began_with_is_kept() -> None:
    for method, part in (("pissa", "init_lora_A"), ("dora", "base_norm")):
        model = base_model("x070")
        attach(model, CONFIGS[method])
        before = model.get_buffer(f"blocks.0.att.key.adapters.default.{part}").clone()
        model.to(torch.bfloat16)
        assert model.get_parameter("blocks.0.att.key.adapters.default.lora_A").dtype == torch.bfloat16
        assert torch.equal(model.get_buffer(f"blocks.0.att.key.adapters.default.{part}"), before)


def test_dora_lets_rows_of_zeros_be() -> None:
    linear = Linear(16, 8)
    linear.weight.data = torch.randn(8, 16).index_fill(0, torch.tensor([3]), 0.0)
    linear.adapters["a"] = method = create(AdapterConfig("dora", r=4), 16, 8).to_empty(device="cpu")
    method.initialise(linear.weight.data, torch.Generator().manual_seed(0))
    method.bind(linear.weight.data)
    x = torch.randn(5, 16)
    assert torch.equal(linear(x), linear.product(x))
    assert torch.equal(method.merged(linear.weight.data), linear.weight.data)


class TestPublishedTrainers:
    """Outputs and merged weights of RWKV-PEFT, RWKV Runner and Hugging Face peft."""

    @staticmethod
    def layer(weight: Tensor, config: AdapterConfig, tensors: dict[str, Tensor]) -> Linear:
        linear = Linear(weight.shape[1], weight.shape[0])
        linear.weight.data = weight
        method = create(config, linear.in_features, linear.out_features)
        assert method.shapes() == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        method.assign(tensors)
        method.bind(weight)
        linear.adapters["a"] = method
        return linear.eval()

    def test_lora(self) -> None:
        case = golden("peft_lora")
        for matrix, dtype in (
            (matrix, dtype) for matrix in ("att.receptance", "ffn.value") for dtype in ("fp32", "bf16")
        ):
            name = f"blocks.0.{matrix}"
            cast = torch.float32 if dtype == "fp32" else torch.bfloat16
            tensors = {part: case[f"adapter.{name}.{part}"].to(cast) for part in ("lora_A", "lora_B")}
            config = AdapterConfig("lora", r=8, alpha=24.0)
            linear = self.layer(case[f"base.{name}.weight"].to(cast), config, tensors)
            merged = linear.adapters["a"].merged(linear.weight)
            assert torch.equal(merged, case[f"merged_{dtype}.{name}.weight"])
            if matrix == "att.receptance" and dtype == "fp32":
                torch.testing.assert_close(linear(case["x"]), case["y_adapter_forward"], rtol=0, atol=2e-5)

    def test_pissa(self) -> None:
        case = golden("peft_pissa")
        tensors = {part: case[part] for part in ("lora_A", "lora_B", "init_lora_A", "init_lora_B")}
        linear = self.layer(case["W"], AdapterConfig("pissa", r=8), tensors)
        torch.testing.assert_close(linear(case["x"]), case["y_adapter_forward"], rtol=0, atol=2e-5)
        rounded = self.layer(
            case["W"].bfloat16(), AdapterConfig("pissa", r=8), {name: t.bfloat16() for name, t in tensors.items()}
        )
        merged = rounded.adapters["a"].merged(rounded.weight)
        assert torch.equal(merged, case["merged_from_bf16_inputs"])
        # The reference rounds the residual of an fp32 base to bf16; ours stays fp32.
        exact = linear.adapters["a"].merged(linear.weight)
        assert exact.dtype == torch.float32
        torch.testing.assert_close(exact, case["merged_from_fp32_inputs"].float(), rtol=2**-7, atol=1e-4)

    @pytest.mark.parametrize(
        ("name", "part", "config"),
        [
            ("bone", "disha", AdapterConfig("miss", r=16)),
            ("bone_r_not_dividing", "disha", AdapterConfig("miss", r=20)),
            ("bat", "disha", AdapterConfig("miss", r=16, miss_mode="bat")),
            ("hf_miss", "miss_block", AdapterConfig("miss", r=16)),
            ("hf_miss_bat", "miss_block", AdapterConfig("miss", r=16, miss_mode="bat_rows")),
        ],
    )
    def test_miss(self, name: str, part: str, config: AdapterConfig) -> None:
        case = golden("peft_miss")
        linear = self.layer(case["W"], config, {"disha": case[f"{name}.{part}"]})
        torch.testing.assert_close(linear(case["x"]), case[f"{name}.y"], rtol=0, atol=2e-5)
        merged = linear.adapters["a"].merged(linear.weight)
        assert torch.equal(merged, case[f"{name}.merged"])
