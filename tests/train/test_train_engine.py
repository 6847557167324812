"""Loop and engine: the reference's training trace, accumulation, precisions, divergence, exact state."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_pieces import random_tokens, tiny_model

from rookery.models import ModelShape, create
from rookery.train.divergence import first_bad_tensor
from rookery.train.loop import Batch, fit
from rookery.train.optim import apply_rates, build_optimizer, parameter_groups
from rookery.train.run import language_loss
from rookery.train.schedule import Schedule
from rookery.train.strategies import SingleDevice

GOLDEN = Path(__file__).parents[1] / "golden"
CONSTANT = Schedule(1e-3, 1e-3, 0, 32, 3200, 100, 1, weight_decay=0.1)


def engine_of(model, dtype=torch.float32, *, eps=1e-18, grad_clip=1.0):
    groups = parameter_groups(model.named_parameters(), model.version, weight_decay=True)
    return SingleDevice(
        model, partial(build_optimizer, groups=groups, betas=(0.9, 0.99), eps=eps), dtype=dtype, grad_clip=grad_clip
    )


def batch_of(tokens: torch.Tensor, masked: int = 0) -> Batch:
    targets = tokens[:, 1:].clone()
    targets.view(-1)[:masked] = -100
    return Batch(tokens[:, :-1], targets, int((targets != -100).sum()), 0)


def train(engine, batches, steps, *, schedule=CONSTANT, accumulate=1, loss_function=language_loss):
    seen = []
    fit(engine, loss_function, iter(batches), schedule, steps, accumulate=accumulate, after_step=[seen.append])
    return seen


# The gradient of step 6 amplifies rounding a thousandfold: the reference's own fp32 run is 7e-5 off there.
@pytest.mark.parametrize(
    ("dtype", "tolerance", "norm_tolerance"), [(torch.float64, 1e-8, 1e-6), (torch.float32, 1e-5, 2e-3)]
)
@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
def test_training_equals_the_reference_trace(version, dtype, tolerance, norm_tolerance):
    golden = json.loads((GOLDEN / f"{version}_train_trace.json").read_text(encoding="utf-8"))
    hyper = golden["hyper"]
    weights = load_file(GOLDEN / f"{version}_ckpt.safetensors")
    model = create(ModelShape.of_checkpoint({k: v.shape for k, v in weights.items()}, "golden"))
    model.load_state_dict(weights)
    engine = engine_of(model.to(dtype), dtype, eps=hyper["adam_eps"], grad_clip=golden["clip"])
    schedule = Schedule(
        lr_init=hyper["lr_init"],
        lr_final=hyper["lr_final"],
        warmup_steps=hyper["warmup_steps"],
        tokens_per_step=hyper["T"] * hyper["B"],
        exit_tokens=golden["my_exit_tokens"],
        epoch_steps=40320,
        epoch_count=1,
        weight_decay=hyper["weight_decay"],
    )
    seen = train(
        engine, [batch_of(torch.tensor(rows)) for rows in golden["data"]], range(hyper["steps"]), schedule=schedule
    )
    for step, row in zip(seen, golden["rows"], strict=True):
        assert step.loss.item() == pytest.approx(row["loss"], rel=tolerance)
        assert step.rates.lr == pytest.approx(row["lr"], rel=1e-12)
        assert step.grad_norm.item() == pytest.approx(row["grad_norm_before_clip"], rel=norm_tolerance)
    for name, p in model.named_parameters():
        assert p.norm().item() == pytest.approx(golden["final_param_l2_norms"][name], rel=tolerance), name


@pytest.mark.parametrize("masked", [0, 20])
def test_two_forward_passes_train_as_one_of_twice_the_size(masked):
    tokens = random_tokens(4)
    whole, halves = tiny_model(torch.float64), tiny_model(torch.float64)
    (one,) = train(engine_of(whole, torch.float64), [batch_of(tokens, masked)], [0])
    (two,) = train(
        engine_of(halves, torch.float64), [batch_of(tokens[:2], masked), batch_of(tokens[2:])], [0], accumulate=2
    )
    assert two.number == 1
    torch.testing.assert_close(two.loss, one.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(two.grad_norm, one.grad_norm, rtol=1e-10, atol=0)
    for p, q in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-12)


def test_a_batch_without_trained_targets_changes_nothing_but_decay():
    model = tiny_model()
    before = model.blocks[0].att.k_k.detach().clone()
    tokens = random_tokens(2)
    (step,) = train(engine_of(model), [batch_of(tokens, masked=tokens[:, 1:].numel())], [0])
    assert step.loss.item() == 0
    torch.testing.assert_close(model.blocks[0].att.k_k, before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_like_fp32(dtype):
    tokens = random_tokens(4)
    plain, model = tiny_model(), tiny_model()
    expected = train(engine_of(plain), [batch_of(tokens)] * 30, range(30))
    engine = engine_of(model, dtype)
    seen = train(engine, [batch_of(tokens)] * 30, range(30))
    assert not engine.diverged()
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {w.dtype for w in engine.weights(master=True).values()} == {torch.float32}
    assert expected[-1].loss < expected[0].loss - 0.2
    for step, reference in zip(seen, expected, strict=True):
        assert step.loss.item() == pytest.approx(reference.loss.item(), abs=0.03)


def test_fp16_overflow_halves_the_scale_and_leaves_the_step_out():
    model = tiny_model()
    engine = engine_of(model, torch.float16)
    scale = engine.state_dict()["loss_scale"]["scale"]
    before = {name: w.clone() for name, w in engine.weights(master=True).items()}

    def steep(model, batch):
        for part in language_loss(model, batch):
            yield part._replace(loss=part.loss * 1e5)

    (step,) = train(engine, [batch_of(random_tokens(2))], [0], loss_function=steep)
    assert not step.grad_norm.isfinite()
    assert engine.state_dict()["loss_scale"]["scale"] == scale / 2
    assert not engine.diverged()
    for name, weight in engine.weights(master=True).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)


def test_nothing_is_updated_from_the_first_bad_step_on():
    model = tiny_model()
    engine = engine_of(model)
    good = batch_of(random_tokens(2))
    train(engine, [good] * 2, range(2))
    before = [p.detach().clone() for p in model.parameters()]
    calls = iter(range(3))

    def bad_once(model, batch):
        for part in language_loss(model, batch):
            yield part._replace(loss=part.loss * (float("inf") if next(calls) == 0 else 1.0))

    train(engine, [good] * 3, range(2, 5), loss_function=bad_once)
    assert engine.diverged()
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_and_loaded_engine_continues_bit_for_bit(dtype, tmp_path):
    batches = [batch_of(random_tokens(2, seed)) for seed in range(8)]
    whole = train(engine_of(tiny_model(), dtype), batches, range(8))
    first = engine_of(tiny_model(), dtype)
    train(first, batches[:4], range(4))
    first.save(tmp_path)
    other = tiny_model()
    for p in other.parameters():
        p.data.zero_()
    second = engine_of(other, dtype)
    second.load(tmp_path)
    second.load_state_dict(first.state_dict())
    rest = train(second, batches[4:], range(4, 8))
    assert [s.loss.item() for s in rest] == [s.loss.item() for s in whole[4:]]
    assert [s.grad_norm.item() for s in rest] == [s.grad_norm.item() for s in whole[4:]]


def test_gradient_checkpointing_changes_nothing():
    plain, saving = tiny_model(), tiny_model()
    saving.grad_cp = True
    batches = [batch_of(random_tokens(2, seed)) for seed in range(3)]
    expected = train(engine_of(plain), batches, range(3))
    seen = train(engine_of(saving), batches, range(3))
    assert [s.loss.item() for s in seen] == pytest.approx([s.loss.item() for s in expected], rel=1e-6)


def test_a_gradient_that_goes_bad_is_named():
    model = tiny_model()

    def infinite_slope(model, batch):
        for part in language_loss(model, batch):
            yield part._replace(loss=part.loss + (model.blocks[1].att.w0 * 0).sum().sqrt())

    name = first_bad_tensor(model, infinite_slope, [batch_of(random_tokens(2))])
    assert name == "gradient of blocks.1.att.w0"


def test_clipping_equals_pytorchs():
    """With a large epsilon AdamW feels the size of the gradient, which it forgets otherwise."""
    plain, ours = tiny_model(torch.float64), tiny_model(torch.float64)
    batch = batch_of(random_tokens(2))
    train(engine_of(ours, torch.float64, eps=1.0, grad_clip=0.1), [batch], [0])
    next(language_loss(plain, batch)).loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    groups = parameter_groups(plain.named_parameters(), "x070", weight_decay=True)
    optimizer = build_optimizer(dict(plain.named_parameters()), groups, betas=(0.9, 0.99), eps=1.0)
    apply_rates(optimizer, CONSTANT.at(0))
    optimizer.step()
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11)
