"""What a step costs grows in proportion to its tokens, and an answer's memory not at all. Counted, never timed."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rookery.bench.live_bytes import LiveBytes
from rookery.data import make
from rookery.infer import CPU7Form, Form, PlainForm
from rookery.infer.forms import PREFILL
from rookery.infer.generation import read
from rookery.models import Model, ModelShape, Parts, State, create, initialise

RANKS = {"x070": {"w": 8, "a": 8, "v": 8, "g": 8}, "x060": {"mix": 8, "decay": 8}, "x052": {}}
VOCABULARY = 64

versions = pytest.mark.parametrize("version", list(RANKS))


def tiny(version: str, *, kernel: str = "auto", parts: Parts | None = None) -> Model:
    shape = ModelShape(version, 2, 32, VOCABULARY, 16, 32, 64, RANKS[version], parts or Parts())
    model = create(shape, kernel=kernel)
    initialise(model, 0)
    return model


class Elements(TorchDispatchMode):
    """Counts the elements that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += sum(x.numel() for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        return out


def step(model: Model, B: int, T: int) -> None:
    """Forward and backward."""
    tokens = torch.zeros(B, T, dtype=torch.int64)
    loss, _state = model.loss(tokens, tokens, chunk=64)
    loss.backward()
    model.zero_grad()


def work(model: Model, B: int, T: int) -> tuple[float, float]:
    """Operations of the matrix products of a step, and elements that all its operations read and write."""
    with FlopCounterMode(display=False) as products, Elements() as elements:
        step(model, B, T)
    return float(products.get_total_flops()), float(elements.total)


def memory(model: Model, B: int, T: int) -> float:
    """Bytes of the tensors that a step has at most, parameters aside."""
    with LiveBytes(model.parameters()) as live:
        step(model, B, T)
    return float(live.peak)


def bend(cost: Callable[[int], float], unit: int) -> float:
    """How much more the cost grows from twice to four times `unit` than it would in proportion to its growth from
    `unit` to twice: 0 if it is linear, 1 if it is quadratic."""
    one, two, four = cost(unit), cost(2 * unit), cost(4 * unit)
    assert four > two > one
    return (four - two) / (two - one) / 2 - 1


@versions
def test_work_is_linear_in_length_and_batch(version: str) -> None:
    """In fp64 every operation is PyTorch's, and can be counted."""
    model = tiny(version, kernel="chunked").double()
    for part in range(2):
        assert abs(bend(lambda T, part=part: work(model, 2, T)[part], 64)) < 0.02
        assert abs(bend(lambda B, part=part: work(model, B, 64)[part], 2)) < 0.02


@versions
@pytest.mark.parametrize("kernel", ["auto", "chunked"])
@pytest.mark.parametrize("grad_cp", [False, True])
def test_memory_is_linear_in_length_and_batch(version: str, kernel: str, grad_cp: bool) -> None:
    model = tiny(version, kernel=kernel).train()
    model.grad_cp = grad_cp
    step(model, 1, 64)
    assert abs(bend(lambda T: memory(model, 2, T), 128)) < 0.05
    assert abs(bend(lambda B: memory(model, B, 128), 2)) < 0.05


def test_attention_would_be_noticed() -> None:
    """x060 with its optional part that looks at all pairs of tokens."""
    model = tiny("x060", kernel="chunked", parts=Parts(tiny_att_dim=32, tiny_att_layer=1)).double()
    assert bend(lambda T: work(model, 1, T)[0], 128) > 0.1
    assert bend(lambda T: memory(model, 1, T), 256) > 0.1


def answer(form: Form, slots: State, count: int) -> None:
    with torch.inference_mode():
        for number in range(count):
            form.step(slots, [0, 1], [number % VOCABULARY] * 2)


def forms(version: str) -> list[Form]:
    plain: list[Form] = [PlainForm(tiny(version).eval())]
    return [*plain, CPU7Form(tiny(version).eval())] if version == "x070" else plain


@versions
def test_an_answer_of_any_length_takes_the_same_memory(version: str) -> None:
    for form in forms(version):
        slots = form.slots(2)

        def tensors(count: int, form: Form = form, slots: State = slots) -> int:
            with LiveBytes(slots.tensors) as live:
                answer(form, slots, count)
            return live.peak

        answer(form, slots, 4)
        assert tensors(128) == tensors(8) > 0, form.name


def test_nothing_is_kept_of_the_steps_of_a_packed_model() -> None:
    """Its arrays are NumPy's, which Python can count."""
    form = CPU7Form(tiny("x070").eval())
    slots = form.slots(2)

    def kept(count: int) -> int:
        tracemalloc.start()
        answer(form, slots, count)
        gc.collect()
        now, _most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return now

    kept(8)
    assert kept(600) < kept(200) + 100 * 400


@versions
def test_each_token_of_an_answer_costs_the_same(version: str) -> None:
    form = PlainForm(tiny(version, kernel="reference").eval().double())
    slots = form.slots(1)

    def cost(count: int) -> int:
        with torch.inference_mode(), Elements() as elements:
            for number in range(count):
                form.step(slots, [0], [number % VOCABULARY])
        return elements.total

    cost(1)
    assert cost(24) == 3 * cost(8)


@versions
def test_a_prompt_of_any_length_takes_the_memory_of_a_piece(version: str) -> None:
    model = tiny(version).eval()

    def peak(pieces: int) -> int:
        with LiveBytes(model.parameters()) as live:
            read(model, [[1] * (pieces * PREFILL)])
        return live.peak

    peak(1)
    ids = 8 * PREFILL
    assert peak(6) - peak(2) == pytest.approx(4 * ids, abs=ids)


def test_data_of_any_size_is_made_in_the_same_memory(tmp_path: Path) -> None:
    """But for the sizes of its documents."""
    line = json.dumps({"text": "The state of a recurrence does not grow. " * 100}) + "\n"

    def peak(megabytes: int) -> int:
        source = tmp_path / "data.jsonl"
        source.write_text(line * (megabytes * 1_000_000 // len(line)), encoding="utf-8")
        tracemalloc.start()
        make(source, output=tmp_path / "made", workers=1)
        _now, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)
    assert peak(60) - peak(20) < 1_000_000
