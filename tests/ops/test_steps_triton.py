"""The Triton back-ends of the steps between the matrix products: `token_shift`, `relu_square`, `gates7`, `mix7`, and
the rows of `head_loss`.

The tests of their kernels run on a GPU where there is one, elsewhere in a process of their own under Triton's
interpreter; `test_compiles_for_a_gpu` hands them to the real compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from interpreted import DEVICE, INTERPRETED, Banded, compile_for_h200, kernels, relative_error, run_interpreted
from torch import Tensor

from rookery.models import ModelShape, create
from rookery.ops import head_loss, head_loss_triton, mix7, mix7_triton, pointwise_triton
from rookery.ops.backend import Call
from rookery.ops.head_loss import head_loss_plain, rows_plain
from rookery.ops.mix7 import mix7_plain
from rookery.ops.packed import Packing
from rookery.ops.pointwise import gates7_plain, relu_square_plain, token_shift_plain

triton = pytest.importorskip("triton", reason="Triton exists for Linux on x86-64 only")

dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)], ids=["fp32", "bf16"]
)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size)))


def compare(
    function: Callable, plain: Callable, inputs: Sequence[Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    """Outputs and gradients of `function` are those of `plain` in fp64, which reads the same numbers."""
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    got, want = ([y, *_] if isinstance(y, Tensor) else list(y) for y, *_ in ((function(*leaves),), (plain(*exact),)))
    weights = [normal(*y.shape, seed=7).to(y) for y in want]
    total = sum((y.double() * x).sum() for y, x in zip(got, weights, strict=True))
    got_grads = torch.autograd.grad(total, leaves)
    want_grads = torch.autograd.grad(sum((y * x).sum() for y, x in zip(want, weights, strict=True)), exact)
    for i, (g, w) in enumerate(zip([*got, *got_grads], [*want, *want_grads], strict=True)):
        assert g.shape == w.shape
        assert g.isfinite().all()
        assert relative_error(g.double(), w) < tolerance, i


@kernels
@dtypes
@pytest.mark.parametrize(("B", "T", "C", "mixes"), [(2, 1, 8, 1), (3, 17, 144, 6), (1, 50, 24, 2)])
def test_token_shift(B: int, T: int, C: int, mixes: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs = [normal(B, T, C), normal(B, C), *(normal(1, 1, C, seed=i).sigmoid() for i in range(mixes))]
    compare(
        lambda x, before, *mixes: pointwise_triton.token_shift(x, before, mixes, None),
        lambda x, before, *mixes: token_shift_plain(x, before, mixes, None),
        inputs, dtype, tolerance,
    )  # fmt: skip


@kernels
def test_token_shift_of_packed_sequences() -> None:
    """Nothing crosses a border, forward or backward; borders lie within tiles and between them."""
    packing = Packing.of(torch.tensor([1, 15, 1, 20, 3]), torch.device(DEVICE))
    inputs = [normal(1, 40, 136), normal(5, 136), normal(136), normal(136, seed=1)]
    compare(
        lambda x, before, *mixes: pointwise_triton.token_shift(x, before, mixes, packing),
        lambda x, before, *mixes: token_shift_plain(x, before, mixes, packing),
        inputs, torch.float32, 2e-6,
    )  # fmt: skip


@kernels
@dtypes
@pytest.mark.parametrize("size", [(1,), (3, 5, 7), (3, 1500)])
def test_relu_square(size: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    compare(pointwise_triton.relu_square, relu_square_plain, [normal(*size).abs_() - 0.1], dtype, tolerance)


@kernels
@dtypes
@pytest.mark.parametrize("values", [True, False], ids=["values", "first layer"])
def test_gates7(values: bool, dtype: torch.dtype, tolerance: float) -> None:
    sequences = [3 * normal(2, 21, 136, seed=i) for i in range(5)]
    biases = [normal(1, 1, 136, seed=i) for i in range(3)]

    def first_layer(run: Callable) -> Callable:
        return lambda w, a, w0, a0: run(w, a, a, None, None, w0, a0, a0)[:2]

    if values:
        compare(pointwise_triton.gates7, gates7_plain, [*sequences, *biases], dtype, tolerance)
    else:
        inputs = [*sequences[:2], *biases[:2]]
        compare(first_layer(pointwise_triton.gates7), first_layer(gates7_plain), inputs, dtype, tolerance)


def mix7_inputs(B: int, T: int, H: int, N: int) -> list[Tensor]:
    C = H * N
    sequences = [normal(B, T, C, seed=i) for i in range(4)] + [torch.sigmoid(normal(B, T, C)), normal(B, T, C, seed=5)]
    vectors = [normal(1, 1, C), 1 + 0.1 * normal(1, 1, C, seed=1), normal(H, N), normal(C), normal(C, seed=1)]
    return [*sequences, *vectors]


@kernels
@dtypes
@pytest.mark.parametrize(("B", "T", "H", "N"), [(1, 1, 1, 16), (2, 40, 3, 32), (1, 33, 2, 64)])
def test_mix7(B: int, T: int, H: int, N: int, dtype: torch.dtype, tolerance: float) -> None:
    """Around the recurrence by token, which runs everywhere."""
    options = {"eps": 64e-5, "kernel": "reference", "packing": None}
    state = normal(B, H, N, N).to(DEVICE)

    def with_state(run: Callable, state: Tensor) -> Callable:
        return lambda *inputs: run(*inputs, state, **options)

    # In bf16, what goes into the recurrence is rounded, as it is in the plain one.
    compare(
        with_state(mix7_triton.mix7_triton, state), with_state(mix7_plain, state.double()),
        mix7_inputs(B, T, H, N), dtype, 4 * tolerance,
    )  # fmt: skip


def losses_and_gradients(
    logits: Tensor, targets: Tensor, dtype: torch.dtype, gradient: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Of the kernel, and of the plain rows in fp64 on the same numbers."""
    logits = logits.to(DEVICE, dtype)
    exact = rows_plain(logits.double(), targets.to(DEVICE), 1e-4, gradient)
    return list(head_loss_triton.rows(logits, targets.to(DEVICE), 1e-4, gradient)), list(exact)


@kernels
@dtypes
@pytest.mark.parametrize("V", [5, 300, head_loss_triton.BLOCK, 5000])
def test_rows_of_the_head_loss(V: int, dtype: torch.dtype, tolerance: float) -> None:
    logits = 9 * normal(4, V)
    logits[0, V // 2] = logits[0, 1] = 60  # of equal ones the first is the largest
    logits[1, 3] = logits[1, (3 + head_loss_triton.BLOCK) % V] = 60
    targets = torch.tensor([0, V - 1, V // 2, 1])
    (loss, grads), (want, want_grads) = losses_and_gradients(logits, targets, dtype)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    assert relative_error(grads.double(), want_grads) < tolerance
    if dtype == torch.float32:  # in bf16, which is rounded, the term on the largest one is lost
        assert (grads - want_grads).abs().max() < 1e-4 * 60 / 10
    (loss, same), (want, _) = losses_and_gradients(logits, targets, dtype, gradient=False)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(same.cpu(), logits.to(dtype))


@kernels
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_show_in_the_loss(bad: float) -> None:
    logits = normal(2, 10)
    logits[1, 3] = bad
    (loss, _), _ = losses_and_gradients(logits, torch.tensor([1, 2]), torch.float32)
    assert not loss.isfinite()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_head_loss_on_the_gpu() -> None:
    inputs = [normal(2, 50, 64), normal(1000, 64) / 8]
    targets = torch.randint(1000, (2, 50), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets[0, 3:9] = -100
    run, plain = (
        partial(head_loss, targets=targets, kernel="triton", chunk=30),
        partial(head_loss_plain, targets=targets),
    )
    compare(run, plain, inputs, torch.bfloat16, 1e-2)


@kernels
def test_reads_and_writes_stay_inside() -> None:
    bands = Banded()
    packing = Packing.of(torch.tensor([7, 14]), torch.device(DEVICE))
    shift = [normal(1, 21, 40), normal(2, 40), normal(40), normal(40, seed=1)]
    gates = [normal(1, 21, 40, seed=i) for i in range(5)] + [normal(40, seed=i) for i in range(3)]
    mix = mix7_inputs(1, 21, 2, 16)
    leaves = [[bands.leaf(x.to(DEVICE)) for x in inputs] for inputs in (shift, [normal(13, 7)], gates, mix)]

    def run(token_shift: Callable, relu_square: Callable, gates7: Callable, mix7: Callable, inputs: list) -> list:
        x, before, *mixes = inputs[0]
        recurrence = {"state": None, "eps": 64e-5, "kernel": "reference", "packing": None}
        return [
            *token_shift(x, before, mixes, packing), relu_square(*inputs[1]), *gates7(*inputs[2]),
            mix7(*inputs[3], **recurrence)[0],
        ]  # fmt: skip

    with bands, torch.autograd.set_multithreading_enabled(False):
        of_triton = pointwise_triton.token_shift, pointwise_triton.relu_square, pointwise_triton.gates7
        got = run(*of_triton, mix7_triton.mix7_triton, leaves)
        flat = [x for inputs in leaves for x in inputs]
        grads = torch.autograd.grad([y.square().sum() for y in got], flat)
    assert bands.intact() > 30
    exact = [[x.detach().double().requires_grad_() for x in inputs] for inputs in leaves]
    want = run(token_shift_plain, relu_square_plain, gates7_plain, mix7_plain, exact)
    want_grads = torch.autograd.grad([y.square().sum() for y in want], [x for inputs in exact for x in inputs])
    for i, (g, w) in enumerate(zip([*got, *grads], [*want, *want_grads], strict=True)):
        assert relative_error(g.double(), w) < 5e-6, i


@kernels
@pytest.mark.parametrize("lengths", [None, [13, 3, 20]], ids=["rows", "packed"])
def test_a_whole_model(lengths: list[int] | None) -> None:
    """Loss, state and every gradient with Triton wherever it serves are those of plain PyTorch in fp64."""
    shape = ModelShape("x070", 2, 64, 50, 32, 64, 256, {"w": 8, "a": 8, "v": 8, "g": 8})
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, (2, 18), generator=generator)
    weights = {name: torch.randn(p.shape, generator=generator) / 8 for name, p in create(shape).named_parameters()}
    found = []
    for kernel, dtype in (("triton", torch.float32), ("chunked", torch.float64)):
        model = create(shape, kernel=kernel)
        model.load_state_dict(weights)
        model = model.to(DEVICE, dtype)
        packed = None if lengths is None else torch.tensor(lengths)
        loss, state = model.loss(tokens.to(DEVICE), tokens.roll(-1, 1).to(DEVICE), lengths=packed, trained=36)
        names, parameters = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss + state.wkv.square().mean().to(loss), parameters, allow_unused=True)
        found.append({"loss": loss, "state": state.wkv} | dict(zip(names, grads, strict=True)))
    got, want = found
    for name, value in want.items():
        if value is None:
            assert got[name] is None or not got[name].any(), name
        else:
            assert relative_error(got[name].double(), value.double()) < 2e-5, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@dtypes
def test_mix7_around_the_recurrence_of_the_gpu(dtype: torch.dtype, tolerance: float) -> None:
    run, plain = partial(mix7, state=None, kernel="triton"), partial(mix7_plain, state=None, kernel="reference")
    compare(run, plain, mix7_inputs(2, 70, 2, 64), dtype, 4 * tolerance)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels run anywhere")
def test_say_why_they_cannot_serve() -> None:
    assert pointwise_triton.refuses(Call("cpu", torch.bfloat16)) == "runs on a GPU, not on cpu"
    mixed = frozenset({torch.bfloat16, torch.float32})
    for facts, reason in (
        ({"dtype": torch.float64}, "float64"),
        ({"dtypes": mixed}, "bfloat16 and torch.float32, not of one type"),
        ({"autocast": True}, "autocast"),
    ):
        call = Call(**{"device": "cuda", "dtype": torch.bfloat16, **facts})
        assert reason in (pointwise_triton.refuses(call) or "")
    assert "head size 48" in (mix7_triton.refuses(Call("cuda", torch.bfloat16, head_size=48)) or "")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs them")
def test_under_the_interpreter() -> None:
    """The kernels' tests above, without a GPU."""
    run_interpreted(__file__)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("which", ["pointwise", "mix7", "head_loss"])
def test_compiles_for_a_gpu(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel goes through Triton's compiler and NVIDIA's assembler for an H200, and spills no register."""
    from rookery.ops import head_loss_triton_kernels, mix7_triton_kernels, pointwise_triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fp32 = {"dmixes": "*fp32", "sums": "*fp32", "begins": "*i32", "eps": "fp32"}
    types = fp32 | dict.fromkeys(("total", "T", "C", "TILES", "H", "tokens"), "i32")
    options: dict[str, int] = {}
    if which == "pointwise":
        module = pointwise_triton_kernels
        sizes = {"ROWS": pointwise_triton.ROWS, "COLUMNS": pointwise_triton.COLUMNS, "SIZE": pointwise_triton.SIZE}
        fixed = sizes | {"M": 6, "PACKED": True, "VALUES": True}
        names = ("token_shift", "token_shift_back", "relu_square", "relu_square_back", "gates7", "gates7_back")
    elif which == "head_loss":
        module = head_loss_triton_kernels
        fixed, names = {"GRADIENT": True, "BLOCK": head_loss_triton.BLOCK}, ("rows",)
        types |= {"targets": "*i64", "losses": "*fp32", "V": "i32", "l2wrap": "fp32"}
        options["num_warps"] = head_loss_triton.WARPS
    else:
        module = mix7_triton_kernels
        fixed = {"N": 64, "ROWS": mix7_triton.rows(64)}
        names = ("before", "before_back", "after", "after_back")
    for name in names:
        compiled = compile_for_h200(getattr(module, name), fixed, types, otherwise="*bf16", options=options)
        assert compiled.spilled == 0, (name, compiled)
