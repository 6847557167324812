"""Outputs and gradients of our adapters against those of Hugging Face peft on the same weights."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rookery.adapters import AdapterConfig, create
from rookery.ops.linear import Linear

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of transformers, which peft imports
    import peft

pytestmark = pytest.mark.filterwarnings("ignore")

IN, OUT = 48, 32


def random(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def theirs(weight: Tensor, config: Any) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A model of one matrix with their adapter, its parameters under our names, and moved from their first values."""
    model = nn.Sequential()
    model.add_module("key", nn.Linear(IN, OUT, bias=False, dtype=torch.float64))
    model.key.weight.data = weight.clone()
    wrapped = peft.get_peft_model(model, config).double()
    ours = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_magnitude_vector": "lora_magnitude_vector",
            "miss_block": "disha"}  # fmt: skip
    found = {
        ours[next(part for part in ours if part in name)]: parameter
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    for parameter in found.values():
        parameter.data += 0.1 * random(*parameter.shape)
    return wrapped, found


def lora(**more: Any) -> Any:
    return peft.LoraConfig(r=8, lora_alpha=24, target_modules=["key"], **more)


def miss(**more: Any) -> Any:
    return peft.MissConfig(target_modules=["key"], **more)


CASES = {
    "lora": (lora(), AdapterConfig("lora", r=8, alpha=24.0)),
    "rslora": (lora(use_rslora=True), AdapterConfig("lora", r=8, alpha=24.0, rslora=True)),
    "dora": (lora(use_dora=True), AdapterConfig("dora", r=8, alpha=24.0)),
    "bone": (miss(r=8), AdapterConfig("miss", r=8)),
    "padded": (miss(r=10), AdapterConfig("miss", r=10)),
    "bat_rows": (miss(r=8, init_weights="bat"), AdapterConfig("miss", r=8, miss_mode="bat_rows")),
}


@pytest.mark.parametrize("name", CASES)
def test_same_output_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    their_config, our_config = CASES[name]
    weight, x, weighting = random(OUT, IN), random(2, 7, IN), random(2, 7, OUT)
    wrapped, parameters = theirs(weight, their_config)

    ours = Linear(IN, OUT)
    ours.weight = nn.Parameter(weight.clone(), requires_grad=False)
    method = create(our_config, IN, OUT)
    method.assign({part: parameter.detach().clone() for part, parameter in parameters.items()})
    method.bind(weight)
    ours.adapters["a"] = method

    inputs = [x.clone().requires_grad_() for _side in range(2)]
    outputs = [wrapped(inputs[0]), ours(inputs[1])]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-11)
    for output in outputs:
        (output * weighting).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=0, atol=1e-11)
    for part, parameter in parameters.items():
        torch.testing.assert_close(method.get_parameter(part).grad, parameter.grad, rtol=0, atol=1e-10)

    with torch.no_grad():
        merged = wrapped.merge_and_unload().key.weight
    torch.testing.assert_close(method.merged(weight), merged, rtol=0, atol=1e-11)


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_concerns_the_same_terms(use_dora: bool) -> None:
    """With the same elements dropped; both draw them in the same way."""
    weight, x = random(OUT, IN), random(2, 7, IN)
    wrapped, parameters = theirs(weight, lora(use_dora=use_dora, lora_dropout=0.5))
    ours = Linear(IN, OUT)
    ours.weight = nn.Parameter(weight.clone(), requires_grad=False)
    method = create(AdapterConfig("dora" if use_dora else "lora", r=8, alpha=24.0, dropout=0.5), IN, OUT)
    method.assign({part: parameter.detach().clone() for part, parameter in parameters.items()})
    method.bind(weight)
    ours.adapters["a"] = method
    outputs = []
    for module in (wrapped.train(), ours.train()):
        torch.manual_seed(5)
        outputs.append(module(x))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-11)
