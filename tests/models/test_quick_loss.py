"""The program that computes loss and gradients of a small model: it gives what the modules give."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from rookery.adapters import AdapterConfig, attach
from rookery.models import RWKV7, ModelShape, create, initialise
from rookery.models.rwkv7 import WIRED

UNEVEN = ModelShape("x070", 3, 48, 37, 16, 48, 100, {"w": 8, "a": 12, "v": 5, "g": 20})
"""Nothing is a multiple of a vector but the width."""

ONE_LAYER = ModelShape("x070", 1, 64, 300, 64, 64, 256, {"w": 32, "a": 32, "v": 32, "g": 32})
WIDE = ModelShape("x070", 2, 448, 64, 64, 448, 1792, {"w": 32, "a": 32, "v": 32, "g": 64})
"""Matrices of more columns than are read where they are, and sums of more than one block."""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def model_of(shape: ModelShape, **options: object) -> RWKV7:
    """None of its parameters is zero."""
    model = create(shape, **options)  # type: ignore[arg-type]
    initialise(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.5 / p.shape[-1] ** 0.5 if p.dim() == 2 else 0.1)
    assert isinstance(model, RWKV7)
    return model.train()


def text_of(shape: ModelShape, rows: int, length: int, masked: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(shape.vocab_size, (rows, length + 1), generator=generator)
    hidden = torch.rand(rows, length, generator=generator) < masked
    return tokens[:, :-1], tokens[:, 1:].masked_fill(hidden, -100)


def quick(model: RWKV7, tokens: Tensor, targets: Tensor, **options: object) -> Tensor:
    loss = model.quick_loss(tokens, targets, trained=int((targets != -100).sum()), **options)  # type: ignore[arg-type]
    assert loss is not None, "the program did not serve"
    return loss


def taken(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients, which are cleared."""
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def errors(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> dict[str, float]:
    """Of each gradient the norm of the difference, over that of the gradient."""
    assert {name for name, x in got.items() if x is None} == {name for name, x in want.items() if x is None}
    return {
        name: float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-12))
        for (name, x), y in zip(got.items(), want.values(), strict=True)
        if x is not None and y is not None
    }


def exact(model: RWKV7, tokens: Tensor, targets: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor | None]:
    """Gradients of the modules in fp64."""
    other = create(model.shape, kernel="chunked").double()
    other.load_state_dict(model.state_dict())
    loss, _state = other.loss(tokens, targets, lengths=lengths)
    loss.backward()
    return taken(other) | {"loss": loss.detach()}


@pytest.mark.parametrize(
    ("shape", "rows", "length"),
    [(UNEVEN, 3, 37), (ONE_LAYER, 2, 128), (WIDE, 2, 300)],
    ids=["uneven", "one layer", "wide"],
)
def test_loss_and_gradients_are_those_of_the_modules(shape: ModelShape, rows: int, length: int) -> None:
    model = model_of(shape)
    tokens, targets = text_of(shape, rows, length)
    want = exact(model, tokens, targets)
    modules, _state = model.loss(tokens, targets)
    modules.backward()
    of_modules = errors(taken(model) | {"loss": modules.detach()}, want)
    loss = quick(model, tokens, targets)
    loss.backward()
    of_program = errors(taken(model) | {"loss": loss.detach()}, want)
    for name, error in of_program.items():
        # Both are rounded otherwise at every step, which some gradients feel more than others.
        assert error < max(3 * of_modules[name], 3e-6), name
    assert sum(of_program.values()) < 2 * sum(of_modules.values())


def test_packed_sequences_are_read_as_if_alone() -> None:
    model = model_of(UNEVEN)
    lengths = [5, 1, 17, 30, 3, 2, 12, 16]
    tokens, targets = text_of(UNEVEN, 2, sum(lengths) // 2)
    targets[0, :5] = -100  # nothing of the first is trained
    packed = quick(model, tokens, targets, lengths=torch.tensor(lengths))
    packed.backward()
    got = taken(model) | {"loss": packed.detach()}
    want = exact(model, tokens, targets, torch.tensor(lengths))
    assert max(errors(got, want).values()) < 2e-5

    trained = int((targets != -100).sum())
    total = torch.zeros(())
    for x, y in zip(tokens.flatten().split(lengths), targets.flatten().split(lengths), strict=True):
        of_row = quick(model, x[None], y[None])
        (of_row * (int((y != -100).sum()) / trained)).backward()
        total += of_row.detach() * (int((y != -100).sum()) / trained)
    assert max(errors(taken(model) | {"loss": total}, got).values()) < 2e-6


def test_threads_change_nothing_but_the_order_of_sums() -> None:
    model = model_of(UNEVEN)
    tokens, targets = text_of(UNEVEN, 5, 20)
    found = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        loss = quick(model, tokens, targets)
        loss.backward()
        found.append(taken(model) | {"loss": loss.detach()})
    for got in found[1:]:
        assert max(errors(got, found[0]).values()) < 2e-6
        assert torch.equal(got["loss"], found[0]["loss"])  # type: ignore[arg-type]
    assert all(x is None or torch.equal(x, y) for x, y in zip(found[1].values(), found[3].values(), strict=True))


def test_without_gradients_the_loss_is_the_same() -> None:
    model = model_of(UNEVEN)
    tokens, targets = text_of(UNEVEN, 3, 20)
    with torch.no_grad():
        alone = quick(model, tokens, targets)
    loss = quick(model, tokens, targets)
    assert torch.equal(alone, loss)
    assert (loss.requires_grad, alone.requires_grad) == (True, False)


def test_gradients_add_up_and_new_weights_are_read() -> None:
    model = model_of(UNEVEN)
    tokens, targets = text_of(UNEVEN, 3, 20)
    quick(model, tokens, targets).backward()
    once = taken(model)
    for factor in (1.0, 2.0):
        (factor * quick(model, tokens, targets)).backward()
    assert max(errors(taken(model), {n: None if x is None else 3 * x for n, x in once.items()}).values()) < 1e-6
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    loss = quick(model, tokens, targets)
    torch.testing.assert_close(loss.double(), exact(model, tokens, targets)["loss"], rtol=1e-6, atol=0)


def test_a_batch_without_trained_targets_has_no_loss() -> None:
    model = model_of(UNEVEN)
    tokens, _targets = text_of(UNEVEN, 2, 9)
    loss = quick(model, tokens, torch.full_like(tokens, -100))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(x is None or not x.any() for x in taken(model).values())


def test_numbers_that_are_none_are_not_hidden() -> None:
    model = model_of(UNEVEN)
    tokens, targets = text_of(UNEVEN, 2, 9)
    with torch.no_grad():
        model.blocks[1].ffn.key.weight[3, 3] = float("nan")
    loss = quick(model, tokens, targets)
    loss.backward()
    assert loss.isnan()
    assert model.emb.weight.grad is not None
    assert model.emb.weight.grad.isnan().any()


def test_its_memory_goes_with_the_model_and_is_that_of_the_longest_text() -> None:
    model = model_of(UNEVEN)

    def kept(model: RWKV7 = model) -> int:
        return sum(x.nbytes for x in WIRED[model].program.memory.values())

    quick(model, *text_of(UNEVEN, 2, 64))
    most = kept()
    for length in (5, 64, 33):
        quick(model, *text_of(UNEVEN, 2, length))
    assert kept() == most
    wired = weakref.ref(WIRED[model])
    del model, kept
    gc.collect()
    assert wired() is None


def freeze(model: RWKV7) -> None:
    model.head.weight.requires_grad_(False)


def watch(model: RWKV7) -> None:
    model.blocks[1].ffn.register_forward_hook(lambda *_args: None)


def tune(model: RWKV7) -> None:
    model.blocks[0].att.time_state = nn.Parameter(torch.zeros(3, 16, 16))


def adapt(model: RWKV7) -> None:
    attach(model, AdapterConfig("lora", 4))


def checkpoint(model: RWKV7) -> None:
    model.grad_cp = True


def exchange(model: RWKV7) -> None:
    class Other(type(model.blocks[0].ffn)):  # type: ignore[misc]
        pass

    model.blocks[1].ffn = Other(model.shape, 1)


@pytest.mark.parametrize("change", [freeze, watch, tune, adapt, checkpoint, exchange, lambda model: model.bfloat16()])
def test_it_leaves_to_the_modules_what_it_does_not_know(change: Callable[[RWKV7], object]) -> None:
    model = model_of(UNEVEN)
    tokens, targets = text_of(UNEVEN, 2, 9)
    quick(model, tokens, targets)
    change(model)
    assert model.quick_loss(tokens, targets, trained=18) is None


def test_options_and_wrong_tokens_are_left_to_the_modules() -> None:
    tokens, targets = text_of(UNEVEN, 2, 9)
    for options in ({"kernel": "chunked"}, {"dropout": 0.1}):
        assert model_of(UNEVEN, **options).quick_loss(tokens, targets, trained=18) is None
    model = model_of(UNEVEN)
    for lengths in ([5, 5], [0, 18], [20]):
        assert model.quick_loss(tokens, targets, lengths=torch.tensor(lengths), trained=18) is None
    assert model.quick_loss(tokens, targets[:, :5], trained=10) is None
    assert model.quick_loss(tokens, targets) is None
    for x, y in itertools.product((tokens, tokens + 37), (targets, targets + 37)):
        served = x is tokens and y is targets
        assert (model.quick_loss(x, y, trained=18) is not None) == served
