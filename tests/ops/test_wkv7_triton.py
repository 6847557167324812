"""The Triton back-end of wkv7.

The tests of its kernels run on a GPU where there is one. Elsewhere `test_under_the_interpreter` runs them in a process
of its own under Triton's interpreter, and `test_compiles_for_a_gpu` hands the kernels to the real compiler.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreted import DEVICE, INTERPRETED, Banded, compile_for_h200, kernels, relative_error, run_interpreted
from torch import Tensor

from rookery.ops import wkv7, wkv7_triton
from rookery.ops.backend import Call
from rookery.ops.packed import Packing
from rookery.ops.wkv7_triton import Schedule

triton = pytest.importorskip("triton", reason="Triton exists for Linux on x86-64 only")

NAMES = ("y", "final", "dr", "dw", "dk", "dv", "da", "db", "dstate")

schedules = pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "parallel"])


class Case:
    """Random inputs with the statistics of a model, and random gradients of both outputs."""

    def __init__(
        self, T: int, N: int, *, B: int = 1, H: int = 2, dtype: torch.dtype = torch.float32, w: float | None = None,
        same_key: bool = False,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(T * N)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        tokens, square = (B, T, H, N), (B, H, N, N)
        key = torch.nn.functional.normalize(random(*((B, 1, H, N) if same_key else tokens)), dim=-1).expand(tokens)
        iclr = torch.ones(tokens) if same_key else torch.sigmoid(random(*tokens))
        decay = 2 * random(*tokens) if w is None else torch.full(tokens, w)
        inputs = (random(*tokens), decay, random(*tokens) / 2, random(*tokens), -key, key * iclr)
        self.inputs = [x.to(dtype).to(DEVICE) for x in inputs]
        self.state = random(*square).to(DEVICE)
        self.dy, self.dfinal = random(*tokens).to(dtype).to(DEVICE), random(*square).to(DEVICE)

    def reference(self) -> list[Tensor]:
        """Outputs and gradients in fp64."""
        leaves = [x.double().requires_grad_() for x in (*self.inputs, self.state)]
        outputs = wkv7(*leaves, backend="reference")
        return [*outputs, *torch.autograd.grad(outputs, leaves, (self.dy.double(), self.dfinal.double()))]

    def triton(self, schedule: Schedule | None) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (*self.inputs, self.state)]
        outputs = wkv7_triton.wkv7_triton(*leaves, schedule=schedule)
        return [*outputs, *torch.autograd.grad(outputs, leaves, (self.dy, self.dfinal))]

    def errors(self, schedule: Schedule | None) -> dict[str, float]:
        """Relative error of each output and gradient."""
        pairs = zip(NAMES, self.triton(schedule), self.reference(), strict=True)
        return {name: relative_error(got, want) for name, got, want in pairs}


@kernels
@schedules
@pytest.mark.parametrize(("T", "N"), [(1, 32), (15, 32), (17, 16), (50, 32), (40, 64)])
def test_fp32_outputs_and_gradients(T: int, N: int, sequential: bool) -> None:
    errors = Case(T, N, B=2).errors(Schedule(16, sequential))
    assert max(errors.values()) < 2e-6, errors


@kernels
@schedules
def test_packed_sequences(sequential: bool) -> None:
    """Each is read from its own state, whether its border lies in a chunk or between two."""
    lengths = torch.tensor([1, 15, 33, 16, 2])
    packing = Packing.of(lengths, torch.device(DEVICE))
    case = Case(67, 32)
    state = torch.randn(5, 2, 32, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    leaves = [x.clone().requires_grad_() for x in (*case.inputs, state)]
    outputs = wkv7_triton.wkv7_triton(*leaves, packing=packing, schedule=Schedule(16, sequential))
    gradients = torch.autograd.grad(outputs, leaves, (case.dy, 2 * state))
    exact = [x.double().requires_grad_() for x in (*case.inputs, state)]
    want = wkv7(*exact, backend="reference", packing=packing)
    want_gradients = torch.autograd.grad(want, exact, (case.dy.double(), 2 * state.double()))
    for name, got, right in zip(NAMES, (*outputs, *gradients), (*want, *want_gradients), strict=True):
        assert relative_error(got, right) < 2e-6, name
    y, final = wkv7_triton.wkv7_triton(*case.inputs, None, packing)  # from zeros, without gradients
    want_y, want_final = wkv7(*case.inputs, backend="reference", packing=packing)
    torch.testing.assert_close(y, want_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final, want_final, rtol=1e-5, atol=1e-5)


@kernels
@schedules
@pytest.mark.parametrize("w", [10.0, -10.0], ids=["clamp", "slow"])
def test_fp32_extreme_decays(w: float, sequential: bool) -> None:
    errors = Case(50, 32, w=w).errors(Schedule(16, sequential))
    assert max(errors.values()) < 2e-6, errors


@kernels
@schedules
@pytest.mark.parametrize(("chunk", "w"), [(32, None), (32, 10.0), (32, -10.0), (64, 10.0)])
def test_bf16_outputs_and_gradients(chunk: int, w: float | None, sequential: bool) -> None:
    """The decay's gradient, where all decays are at the clamp, shows sums that do not cancel as they should."""
    errors = Case(80, 64, dtype=torch.bfloat16, w=w).errors(Schedule(chunk, sequential))
    assert max(errors[name] for name in NAMES if name not in ("da", "db")) < 5e-3, errors
    assert max(errors["da"], errors["db"]) < 7e-3, errors


@kernels
@schedules
def test_bf16_head_size_128(sequential: bool) -> None:
    errors = Case(20, 128, H=1, dtype=torch.bfloat16).errors(Schedule(16, sequential))
    assert max(errors.values()) < 7e-3, errors


@kernels
@schedules
@pytest.mark.parametrize("w", [None, 10.0], ids=["mixed", "clamp"])
def test_fp16_outputs_and_gradients(w: float | None, sequential: bool) -> None:
    errors = Case(50, 32, dtype=torch.float16, w=w).errors(Schedule(16, sequential))
    assert max(errors.values()) < 2e-3, errors


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_that_repeats(dtype: torch.dtype) -> None:
    """Without decay, and every token removing all that its key holds, powers of the chunk's matrix reach 10^8."""
    errors = Case(64, 32, dtype=dtype, w=-10.0, same_key=True).errors(Schedule(32, False))
    assert max(errors.values()) < (2e-6 if dtype == torch.float32 else 3e-2), errors


@kernels
@schedules
def test_two_halves_equal_the_whole(sequential: bool) -> None:
    case, schedule = Case(41, 32), Schedule(16, sequential)
    y, final = wkv7_triton.wkv7_triton(*case.inputs, case.state, schedule=schedule)
    y1, middle = wkv7_triton.wkv7_triton(*(x[:, :19] for x in case.inputs), case.state, schedule=schedule)
    y2, last = wkv7_triton.wkv7_triton(*(x[:, 19:] for x in case.inputs), middle, schedule=schedule)
    torch.testing.assert_close(torch.cat([y1, y2], dim=1), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, final, rtol=1e-5, atol=1e-5)


@kernels
def test_gradient_of_the_final_state_alone_and_no_initial_state() -> None:
    case = Case(20, 32)
    leaves = [x.requires_grad_() for x in case.inputs]
    _, final = wkv7_triton.wkv7_triton(*leaves, None)
    dr, *got = torch.autograd.grad(final, leaves, case.dfinal)
    assert not dr.any()  # the receptance does not reach the state
    exact = [x.detach().double().requires_grad_() for x in leaves]
    _, final = wkv7(*exact, None, backend="reference")
    for x, want in zip(got, torch.autograd.grad(final, exact[1:], case.dfinal.double()), strict=True):
        assert relative_error(x, want) < 2e-6


@kernels
@schedules
def test_reads_and_writes_stay_inside(sequential: bool) -> None:
    case = Case(21, 32)
    bands = Banded()
    leaves = [bands.leaf(x) for x in (*case.inputs, case.state)]
    with bands, torch.autograd.set_multithreading_enabled(False):
        outputs = wkv7_triton.wkv7_triton(*leaves, schedule=Schedule(16, sequential))
        gradients = torch.autograd.grad(outputs, leaves, (case.dy, case.dfinal))
    assert bands.intact() >= 12
    for name, got, want in zip(NAMES, (*outputs, *gradients), case.reference(), strict=True):
        assert relative_error(got, want) < 2e-6, name


@kernels
def test_inputs_need_not_be_contiguous_and_the_schedule_is_chosen() -> None:
    case = Case(40, 32, B=2)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.inputs]
    y, final = wkv7_triton.wkv7_triton(*views, case.state)
    want_y, want_final = wkv7(*case.inputs, case.state, backend="reference")
    torch.testing.assert_close(y, want_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final, want_final, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels run anywhere")
def test_says_why_it_cannot_serve() -> None:
    call = Call(device="cpu", dtype=torch.float32, head_size=64)
    assert wkv7_triton.refuses(call) == "runs on a GPU, not on cpu"
    for facts, reason in (
        ({"dtype": torch.float64}, "float64"),
        ({"head_size": 48}, "head size 48"),
        ({"head_size": 128}, "only in bfloat16"),
    ):
        assert reason in (wkv7_triton.refuses(Call(**{**vars(call), "device": "cuda", **facts})) or "")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs them")
def test_under_the_interpreter() -> None:
    """The kernels' tests above, without a GPU."""
    run_interpreted(__file__)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiles_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel goes through Triton's compiler and NVIDIA's assembler for an H200, and fits in shared memory."""
    from rookery.ops import wkv7_triton_kernels as module

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtype, N = torch.bfloat16, 64
    bf16 = "r w k v a b y dy dr dw dk dv da db states inverses maps before dstates"
    types = dict.fromkeys(bf16.split(), "*bf16") | dict.fromkeys(("T", "H", "NT"), "i32")
    types |= {"bounds": "*i64", "firsts": "*i64", "owners": "*i32"}
    common = wkv7_triton.constants(dtype, N) | {
        "PACKED": False,
        "C": 32,
        "KEEP": True,
        "ROWS": wkv7_triton.scan_rows(N),
    }
    options, of_scan = wkv7_triton.options(dtype, N), wkv7_triton.scan_options(N)
    for kernel, own, launched in (
        (module.prepare_forward, {}, options),
        (module.prepare_backward, {}, options),
        (module.scan, {"REVERSE": True}, of_scan),
        (module.forward, {"SEQUENTIAL": True}, options),
        (module.forward, {"SEQUENTIAL": False}, options),
        (module.backward, {"SEQUENTIAL": True}, options),
        (module.backward, {"SEQUENTIAL": False}, options),
        # Places are looked up in the same way by all of them.
        (module.prepare_forward, {"PACKED": True}, options),
        (module.forward, {"SEQUENTIAL": True, "PACKED": True}, options),
        # Triton takes arguments that are 1 as constants.
        (module.forward, {"SEQUENTIAL": True, "T": 1, "NT": 1, "H": 1}, options),
    ):
        compiled = compile_for_h200(kernel, common | own, types, options=launched)
        assert compiled.shared <= wkv7_triton.SHARED_MEMORY[N], kernel.fn.__name__
        assert compiled.spilled < 1024, (kernel.fn.__name__, own)
