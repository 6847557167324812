"""The Triton back-end of wkv6 and wkv5.

The tests of its kernels run on a GPU where there is one. `test_under_the_interpreter` runs them in a process of its own
under Triton's interpreter, which needs none; `test_compiles_for_a_gpu` hands them to the real compiler.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreted import DEVICE, INTERPRETED, Banded, compile_for_h200, kernels, relative_error, run_interpreted
from torch import Tensor

from rookery.ops import wkv6, wkv6_triton
from rookery.ops.backend import Call

triton = pytest.importorskip("triton", reason="Triton exists for Linux on x86-64 only")

NAMES = ("y", "final", "dr", "dw", "dk", "dv", "du", "dstate")

cuts = pytest.mark.parametrize("segments", [1, 2], ids=["whole", "cut"])
decays = pytest.mark.parametrize("per_token", [True, False], ids=["wkv6", "wkv5"])


class Case:
    """Random inputs and random gradients of both outputs."""

    def __init__(
        self, T: int, N: int, *, B: int = 1, H: int = 2, dtype: torch.dtype = torch.float32, per_token: bool = True,
        w: float | None = None,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(T * N)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        tokens, square = (B, T, H, N), (B, H, N, N)
        decay = 3 * random(*(tokens if per_token else (1, 1, H, N))) - 1
        decay = decay if w is None else torch.full_like(decay, w)
        inputs = (random(*tokens), decay, random(*tokens), random(*tokens), random(H, N))
        self.inputs = [x.to(dtype).to(DEVICE) for x in inputs]
        self.state = random(*square).to(DEVICE)
        self.dy, self.dfinal = random(*tokens).to(dtype).to(DEVICE), random(*square).to(DEVICE)

    def reference(self) -> list[Tensor]:
        """Outputs and gradients in fp64."""
        leaves = [x.double().requires_grad_() for x in (*self.inputs, self.state)]
        outputs = wkv6(*leaves, backend="reference")
        return [*outputs, *torch.autograd.grad(outputs, leaves, (self.dy.double(), self.dfinal.double()))]

    def triton(self, segments: int | None) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (*self.inputs, self.state)]
        outputs = wkv6_triton.wkv6_triton(*leaves, segments=segments)
        return [*outputs, *torch.autograd.grad(outputs, leaves, (self.dy, self.dfinal))]

    def errors(self, segments: int | None) -> dict[str, float]:
        """Relative error of each output and gradient."""
        pairs = zip(NAMES, self.triton(segments), self.reference(), strict=True)
        return {name: relative_error(got, want) for name, got, want in pairs}


@kernels
@cuts
@decays
@pytest.mark.parametrize(("T", "N"), [(1, 16), (17, 32), (50, 16)])
def test_fp32_outputs_and_gradients(T: int, N: int, per_token: bool, segments: int) -> None:
    errors = Case(T, N, B=2, H=1 if T == 50 else 2, per_token=per_token).errors(segments)
    assert max(errors.values()) < 3e-6, errors


@kernels
@cuts
@pytest.mark.parametrize("w", [2.0, 4.0, -10.0], ids=["strong", "nearly all", "none"])
def test_fp32_extreme_decays(w: float, segments: int) -> None:
    errors = Case(40, 16, H=1, w=w).errors(segments)
    assert max(errors.values()) < 3e-6, errors


@kernels
@decays
def test_vanished_decays(per_token: bool) -> None:
    """Where exp(-exp(w)) is 0 its gradient is 0 too, even where exp(w) overflows; what other tokens get stays exact."""
    case = Case(40, 16, per_token=per_token)
    case.inputs[1][..., ::2] = 1000.0
    errors = case.errors(1)
    assert max(errors.values()) < 3e-6, errors
    dw = case.triton(1)[3]
    assert not dw[..., ::2].any()
    assert dw[..., 1::2].any()


@kernels
@cuts
@decays
def test_bf16_outputs_and_gradients(per_token: bool, segments: int) -> None:
    errors = Case(40, 64, H=1, dtype=torch.bfloat16, per_token=per_token).errors(segments)
    assert max(errors.values()) < 7e-3, errors


@kernels
def test_bf16_head_size_128() -> None:
    errors = Case(20, 128, H=1, dtype=torch.bfloat16).errors(1)
    assert max(errors.values()) < 7e-3, errors


@kernels
def test_fp16_outputs_and_gradients() -> None:
    errors = Case(40, 32, dtype=torch.float16).errors(2)
    assert max(errors.values()) < 2e-3, errors


@kernels
def test_two_halves_equal_the_whole() -> None:
    case = Case(41, 32)
    r, w, k, v, u = case.inputs
    y, final = wkv6_triton.wkv6_triton(r, w, k, v, u, case.state)
    y1, middle = wkv6_triton.wkv6_triton(*(x[:, :19] for x in (r, w, k, v)), u, case.state)
    y2, last = wkv6_triton.wkv6_triton(*(x[:, 19:] for x in (r, w, k, v)), u, middle)
    torch.testing.assert_close(torch.cat([y1, y2], dim=1), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, final, rtol=1e-5, atol=1e-5)


@kernels
def test_gradient_of_the_final_state_alone_and_no_initial_state() -> None:
    case = Case(20, 32)
    leaves = [x.requires_grad_() for x in case.inputs]
    _, final = wkv6_triton.wkv6_triton(*leaves, None)
    dr, dw, dk, dv, du = torch.autograd.grad(final, leaves, case.dfinal)
    assert not dr.any()  # neither the receptance nor the bonus reaches the state
    assert not du.any()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    _, final = wkv6(*exact, None, backend="reference")
    for x, want in zip((dw, dk, dv), torch.autograd.grad(final, exact[1:4], case.dfinal.double()), strict=True):
        assert relative_error(x, want) < 3e-6


@kernels
@cuts
@decays
def test_reads_and_writes_stay_inside(per_token: bool, segments: int) -> None:
    case = Case(37, 32, per_token=per_token)
    bands = Banded()
    leaves = [bands.leaf(x) for x in (*case.inputs, case.state)]
    with bands, torch.autograd.set_multithreading_enabled(False):
        outputs = wkv6_triton.wkv6_triton(*leaves, segments=segments)
        gradients = torch.autograd.grad(outputs, leaves, (case.dy, case.dfinal))
    assert bands.intact() >= 9
    for name, got, want in zip(NAMES, (*outputs, *gradients), case.reference(), strict=True):
        assert relative_error(got, want) < 3e-6, name


@kernels
def test_inputs_need_not_be_contiguous_and_the_segments_are_chosen() -> None:
    case = Case(140, 16, H=1)
    assert wkv6_triton.segments_for(case.inputs[0]) == 2
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.inputs[:4]]
    y, final = wkv6_triton.wkv6_triton(*views, case.inputs[4], case.state)
    want_y, want_final = wkv6(*case.inputs, case.state, backend="reference")
    torch.testing.assert_close(y, want_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final, want_final, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels run anywhere")
def test_says_why_it_cannot_serve() -> None:
    call = Call(device="cpu", dtype=torch.float32, head_size=64)
    assert wkv6_triton.refuses(call) == "runs on a GPU, not on cpu"
    for facts, reason in (({"dtype": torch.float64}, "float64"), ({"head_size": 48}, "head size 48")):
        assert reason in (wkv6_triton.refuses(Call(**{**vars(call), "device": "cuda", **facts})) or "")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs them")
def test_under_the_interpreter() -> None:
    """The kernels' tests above, without a GPU."""
    run_interpreted(__file__)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("dtype", "N", "per_token"), [(torch.bfloat16, 64, True), (torch.bfloat16, 64, False), (torch.float32, 128, True)]
)
def test_compiles_for_a_gpu(
    dtype: torch.dtype, N: int, per_token: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel goes through Triton's compiler and NVIDIA's assembler for an H200, and fits in shared memory."""
    from rookery.ops import wkv6_triton_kernels as module

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bf16 = ["r", "k", "v", "y", "dy", "dr", "dk", "dv", "u", "values", "keys", "states"]
    types = dict.fromkeys(bf16 if dtype == torch.bfloat16 else (), "*bf16")
    types |= dict.fromkeys(("T", "H", "NC", "NS"), "i32")
    common = wkv6_triton.constants(dtype, N) | {"PER_TOKEN": per_token, "ROWS": wkv6_triton.scan_rows(N)}
    options, of_scan = wkv6_triton.options(dtype, N), wkv6_triton.scan_options(N)
    for kernel, own, launched in (
        (module.gather, {"REVERSE": False}, options),
        (module.gather, {"REVERSE": True}, options),
        (module.scan, {"REVERSE": True}, of_scan),
        (module.forward, {"KEEP": False}, options),
        (module.forward, {"KEEP": True}, options),
        (module.backward, {}, options),
    ):
        compiled = compile_for_h200(kernel, common | own, types, options=launched)
        assert compiled.shared <= wkv6_triton.SHARED_MEMORY, kernel.fn.__name__
