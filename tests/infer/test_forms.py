"""Packed forms against the model's own module, and against themselves: alone, beside others, in pieces, on threads."""

import copy
import signal
import subprocess
import sys

import pytest
import torch

from rookery.adapters import AdapterConfig, attach
from rookery.errors import UserError
from rookery.formats import write_pth
from rookery.infer import (
    CPU7Form,
    Engine,
    PackedForm,
    PlainForm,
    Request,
    Sampling,
    form_of,
    generate,
    open_form,
)
from rookery.models import ModelShape, create, initialise
from rookery.tokenizer import Character, save_beside

TOKENS = [5, 100, 3000, 7, 65535, 0, 42, 17, 9, 1, 1, 2]


@pytest.fixture(scope="module", params=[32, 64])
def larger(request):
    """Three layers, with heads of one and of several vectors; ranks that are no multiples of a vector; every parameter
    random; a tuned state."""
    size = request.param
    ranks = {"w": 8, "a": 24, "v": 16, "g": 40}
    model = create(ModelShape("x070", 3, 2 * size, 1003, size, 2 * size, 176, ranks))
    initialise(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
        for block in model.blocks:
            shape = (model.shape.n_head, size, size)
            block.att.time_state = torch.nn.Parameter(torch.randn(shape, generator=generator))
    return model.eval()


def walk(form, tokens, cuts=(), slot=0, count=1) -> tuple[torch.Tensor, object]:
    """Logits after every token: those up to the last cut in pieces, the others one by one; and the states."""
    slots = form.slots(count)
    slots.wkv[:, slot : slot + 1] = form.initial().wkv
    rows, begin = [], 0
    with torch.inference_mode():
        for end in cuts:
            rows.append(form.head(form.read(slots, slot, [t % 1003 for t in tokens[begin:end]])))
            begin = end
        for token in tokens[begin:]:
            rows.append(form.step(slots, [slot], [token % 1003]))
    return torch.cat(rows), slots


@pytest.mark.parametrize("cuts", [(), (12,), (1, 5, 6)])
def test_packed_fp32_equals_the_module(larger, cuts) -> None:
    plain, theirs = walk(PlainForm(larger), TOKENS, (12,))
    packed, ours = walk(CPU7Form(larger), TOKENS, cuts, slot=2, count=3)
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=5e-5)
    for name in ("att_shift", "wkv", "ffn_shift"):
        torch.testing.assert_close(getattr(ours, name)[:, 2], getattr(theirs, name)[:, 0], rtol=1e-4, atol=5e-5)
        assert not getattr(ours, name)[:, :2].any(), "the other slots are as they were"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.int8, 0.06)])
@pytest.mark.parametrize("cuts", [(), (12,)])
def test_smaller_weights_come_close(larger, dtype, tolerance, cuts) -> None:
    plain, _slots = walk(PlainForm(larger), TOKENS, (12,))
    packed, _slots = walk(CPU7Form(larger, dtype), TOKENS, cuts)
    error = (packed - plain).norm() / plain.norm()
    assert 1e-4 < error < tolerance


def test_bf16_weights_are_decoded_exactly(larger) -> None:
    """Only the weights are bf16: a model whose weights are bf16 numbers gives what it gives in fp32."""
    rounded = copy.deepcopy(larger).bfloat16()
    packed, _slots = walk(CPU7Form(rounded), TOKENS)
    plain, _slots = walk(PlainForm(copy.deepcopy(rounded).float()), TOKENS, (12,))
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_sequence_gets_the_same_bits_alone_beside_others_in_pieces_and_on_threads(larger, dtype) -> None:
    form = CPU7Form(larger, dtype, threads=1)
    alone, _slots = walk(form, TOKENS, (5,))
    pieces, _slots = walk(form, TOKENS, (1, 2, 5))
    assert torch.equal(alone, pieces)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for threads, count in ((1, 2), (2, 4), (3, 7)):
            form.threads = threads
            slots = form.slots(count)
            with torch.inference_mode():
                for slot in range(count):
                    slots.wkv[:, slot] = form.initial().wkv[:, 0]
                    form.read(slots, slot, [t % 1003 for t in TOKENS[:5]] if slot == 1 else [slot])
                for i, token in enumerate(TOKENS[5:]):
                    tokens = [token % 1003 if slot == 1 else (token + slot) % 1003 for slot in range(count)]
                    order = [*range(1, count), 0]
                    logits = form.step(slots, order, [tokens[slot] for slot in order])
                    assert torch.equal(logits[0], alone[5 + i]), (threads, count)
    finally:
        torch.set_num_threads(before)


INTERRUPTED = """
import random, signal, sys, torch
from rookery.infer import CPU7Form
from rookery.models import ModelShape, create, initialise

torch.set_num_threads(3)
model = create(ModelShape("x070", 1, 32, 64, 32, 32, 128, dict.fromkeys("wavg", 16)))
initialise(model, 1)
form = CPU7Form(model)
slots = form.slots(1)

def interrupt(*_signal):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
random.seed(0)
with torch.inference_mode():
    form.step(slots, [0], [1])
    for _n in range(400):
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 2e-3))
            while True:
                form.step(slots, [0], [1])
        except KeyboardInterrupt:
            pass
    assert form.step(slots, [0], [1]).isfinite().all()
print("goes on")
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no such timer")
def test_a_step_that_is_interrupted_hangs_nothing() -> None:
    """Wherever Ctrl-C finds the thread that asked, the others do not wait for it, and the next step is computed."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "goes on\n"), done.stderr


def adapter_beside_packed(model, packed_form, method: str) -> None:
    """Packing merges an adapter as the module applies it."""
    model = copy.deepcopy(model)
    base, _slots = walk(packed_form(model), TOKENS)
    attach(model, AdapterConfig(method, r=8, alpha=16))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    plain, _slots = walk(PlainForm(model.eval()), TOKENS, (12,))
    packed, _slots = walk(packed_form(model), TOKENS)
    torch.testing.assert_close(packed, plain, rtol=1e-3, atol=1e-3)
    assert (packed - base).abs().max() > 0.1


@pytest.mark.parametrize("method", ["lora", "dora", "miss"])
def test_an_adapter_is_packed_with_the_model(larger, method) -> None:
    adapter_beside_packed(larger, CPU7Form, method)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_the_engine_answers_the_same_alone_and_beside_others(model, world, dtype) -> None:
    """Exactly, at temperature 0 and for drawn tokens, whatever happens beside it."""
    form = form_of(model, dtype)
    assert isinstance(form, CPU7Form)
    texts = ["Hi", "User: 三加四=?\n\nAssistant:", "a", "zz top " * 80, "Hello world", "b", "c", "d"]
    prompts = [world.encode(text) for text in texts]
    samplings = [
        Sampling(temperature=0, alpha_presence=0, alpha_frequency=0, max_tokens=20),
        Sampling(temperature=1.5, top_p=0.95, seed=3, max_tokens=20),
    ]
    engine = Engine(model, world, form=form, slots=5)
    handles = []
    for sampling in samplings:
        for prompt in prompts:
            handles.append((prompt, sampling, engine.submit(Request(prompt, sampling))))
            engine.turn()
    while engine.turn():
        pass
    for prompt, sampling, handle in handles:
        alone = generate(form, world, prompt, sampling)
        "".join(alone)
        assert [token.id for token in handle.result().tokens] == alone.sequence.tokens


@pytest.fixture(scope="module", params=["x052", "x060"])
def older(request):
    """Two layers of an older generation, every parameter random; a tuned state."""
    ranks = {} if request.param == "x052" else {"mix": 8, "decay": 8}
    model = create(ModelShape(request.param, 2, 64, 1003, 32, 64, 112, ranks))
    initialise(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
        for block in model.blocks:
            block.att.time_state = torch.nn.Parameter(torch.randn(2, 32, 32, generator=generator))
    return model.eval()


LONGER = TOKENS * 4
"""More rows than the loops for a few take."""


@pytest.mark.parametrize("cuts", [(), (48,), (3, 40)])
def test_older_generations_are_packed(older, cuts) -> None:
    plain, theirs = walk(PlainForm(older), LONGER, (48,))
    form = form_of(older)
    assert (type(form), form.name, form.model) == (PackedForm, "packed float32", older)
    packed, ours = walk(form, LONGER, cuts, slot=2, count=3)
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-4)
    for name in ("att_shift", "wkv", "ffn_shift"):
        torch.testing.assert_close(getattr(ours, name)[:, 2], getattr(theirs, name)[:, 0], rtol=1e-4, atol=1e-4)
        assert not getattr(ours, name)[:, :2].any(), "the other slots are as they were"


def test_older_generations_with_smaller_weights(older) -> None:
    plain, _slots = walk(PlainForm(older), LONGER, (48,))
    rounded = copy.deepcopy(older).bfloat16()
    exact, _slots = walk(PlainForm(copy.deepcopy(rounded).float()), LONGER, (48,))
    one_by_one, _slots = walk(form_of(rounded), LONGER)
    torch.testing.assert_close(one_by_one, exact, rtol=1e-4, atol=1e-4)
    for dtype, tolerance in ((torch.bfloat16, 0.03), (torch.int8, 0.06)):
        for cuts in ((), (48,)):
            packed, _slots = walk(form_of(rounded, dtype), LONGER, cuts)
            assert 1e-4 < (packed - plain).norm() / plain.norm() < tolerance


def test_an_adapter_is_packed_with_an_older_model(older) -> None:
    adapter_beside_packed(older, PackedForm, "lora")


@pytest.mark.parametrize("name", ["blocks.0.ffn.key.weight", "blocks.1.att.key.weight", "head.weight"])
def test_a_weight_that_is_no_number_is_not_hidden(name) -> None:
    """Packed forms have NaN where the module has it; a product with such a weight is not taken for zero."""
    for version, ranks in (("x060", {"mix": 8, "decay": 8}), ("x070", dict.fromkeys("wavg", 16))):
        model = create(ModelShape(version, 2, 32, 64, 32, 32, 128, ranks))
        initialise(model, 1)
        with torch.no_grad():
            model.get_parameter(name)[3, 4] = float("nan")
        for cuts in ((), (12,)):
            packed, _slots = walk(form_of(model.eval()), [t % 64 for t in TOKENS], cuts)
            plain, _slots = walk(PlainForm(model), [t % 64 for t in TOKENS], (12,))
            assert plain.isnan().any()
            assert torch.equal(packed.isnan(), plain.isnan())


def test_what_cannot_be_packed_runs_plainly() -> None:
    model = create(ModelShape("x060", 1, 24, 50, 8, 24, 64, {"mix": 8, "decay": 8}))
    initialise(model, 1)
    assert type(form_of(model)) is PlainForm
    with pytest.raises(UserError, match="int8 is not possible here: widths are no multiples of 16"):
        form_of(model, torch.int8)
    with pytest.raises(ValueError, match="only x070"):
        CPU7Form(model)
    with pytest.raises(ValueError, match="multiples of 16"):
        PackedForm(model)


@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
def test_bf16_files_stay_bf16_and_int8_is_had(version, tmp_path) -> None:
    ranks = {"x052": {}, "x060": {"mix": 8, "decay": 8}, "x070": dict.fromkeys("wavg", 16)}[version]
    vocabulary = Character(list("abc"))
    model = create(ModelShape(version, 1, 32, 3, 32, 32, 128, ranks))
    initialise(model, 1)
    save_beside(vocabulary, tmp_path / "vocab")
    write_pth(tmp_path / "model.pth", {name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    kind = "cpu7" if version == "x070" else "packed"
    for dtype, name in (("auto", "bfloat16"), ("bf16", "bfloat16"), ("int8", "int8"), ("fp32", "float32")):
        form, _vocabulary = open_form(tmp_path / "model.pth", device="cpu", dtype=dtype)
        assert form.name == f"{kind} {name}"
