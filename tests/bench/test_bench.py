"""rookery bench: what it counts is right, peers compute the same, and its records say everything."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rookery.bench import data, infer, op, plain7, train
from rookery.bench.machine import record
from rookery.bench.peers import choose
from rookery.bench.setting import Setting, random_model
from rookery.bench.timing import Times, alternate, faster
from rookery.bench.work import multiplications, peak
from rookery.cli import run
from rookery.errors import UserError
from rookery.models import State

SMALL = {"n_layer": 2, "n_embd": 64, "head_size": 32, "vocab_size": 96, "ctx_len": 40, "micro_bsz": 2, "rounds": 1}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def small(**changes: object) -> Setting:
    return Setting.of("cpu", 1, **SMALL | changes)


@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
def test_matrix_products_are_counted_as_they_are_done(version: str) -> None:
    """In fp64, where the recurrence is a compiled loop and everything else PyTorch's own products."""
    setting = small(version=version)
    model = random_model(setting.shape, kernel="native").double()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 40, dtype=torch.int64))
    assert counter.get_total_flops() == 2 * 80 * multiplications(model)


def test_the_plain_model_is_the_same_model() -> None:
    setting = small()
    model = random_model(setting.shape).double()
    tokens = torch.randint(96, (2, 41), generator=torch.Generator().manual_seed(0))
    state = State.zeros(model.shape, 2, "cpu", torch.float64)
    got, middle = plain7.hidden(model, tokens[:, :30], state)
    want, _middle = model.hidden(tokens[:, :30], state)
    torch.testing.assert_close(got, want)
    got, after = plain7.hidden(model, tokens[:, 30:31], middle)  # one token is read in another form
    want, wanted_after = model.hidden(tokens[:, :31])
    torch.testing.assert_close(got[:, 0], want[:, 30])
    torch.testing.assert_close(after.wkv, wanted_after.wkv)

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return [torch.zeros((), dtype=torch.float64) if gradient is None else gradient for gradient in found]

    targets = tokens[:, 1:].masked_fill(tokens[:, 1:] % 3 == 0, -100)
    ours, _state = model.loss(tokens[:, :-1], targets)
    plain = plain7.loss(model, tokens[:, :-1], targets)
    for got, want in zip([plain, *gradients(plain)], [ours, *gradients(ours)], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_beside_plain_pytorch(precision: str) -> None:
    found = train.measure(small(precision=precision), ["torch"], given_peak=1e9, trained=0.5)
    ours, theirs = found["results"]["rookery"], found["results"]["torch"]
    assert ours["first loss"] == pytest.approx(theirs["first loss"], rel=1e-4 if precision == "fp32" else 1e-2)
    for row in (ours, theirs):
        for clock in ("wall", "cpu"):
            speed, seconds = row["tokens a second"][clock], row["seconds a step"][clock]
            assert speed == pytest.approx(80 / seconds["median"], rel=1e-3)
            assert row["mfu"][clock] == pytest.approx(found["training FLOP a token"] * speed / 1e9, rel=1e-3)
            assert seconds["least"] <= seconds["median"] <= seconds["most"]
    assert sum(ours["split"].values()) == pytest.approx(1, abs=0.01)
    assert min(ours["split"].values()) > 0
    products = found["matrix products alone"]
    for clock, times in found["times its products"].items():
        assert times == pytest.approx(ours["seconds a step"][clock]["median"] / products[clock]["median"], rel=1e-3)
        assert times > 1
    parameters = sum(p.numel() for p in random_model(small().shape).parameters())
    weights = {"fp32": 4, "bf16": 6}[precision]  # and two moments of 4 bytes
    assert (weights + 8) * parameters < ours["peak bytes"] < (weights + 12) * parameters + 80 * 96 * 64 * 2 * 8
    assert set(found["rookery is faster by"]["torch"]) == {"wall", "cpu"}


def test_recomputing_takes_less_memory() -> None:
    plain, recomputed = (
        train.measure(small(ctx_len=160, grad_cp=grad_cp), given_peak=1e9)["results"]["rookery"]["peak bytes"]
        for grad_cp in (False, True)
    )
    assert recomputed < 0.8 * plain


def test_each_operation_and_its_errors() -> None:
    found = op.measure(small(), list(op.CASES), ["torch"])["results"]
    steps = {"mix7": ["native"], "token_shift": ["native"], "gates7": ["native"], "relu_square": ["native"]}
    assert list(found) == ["wkv7", "wkv6", "wkv5", "head", "linear", "mix7", "token_shift", "gates7", "relu_square"]
    for name, rows in found.items():
        labels = [label for label, row in rows.items() if "errors" in row]
        if name in steps:
            assert labels == [*steps[name], "plain"]
        else:
            assert labels == (["native", "chunked", "reference"] if name.startswith("wkv") else ["rookery", "torch"])
        for label in labels:
            assert max(rows[label]["errors"].values()) < 3e-6
            assert rows[label]["forward"]["cpu"]["median"] > 0
            assert rows[label]["forward and backward"]["wall"]["median"] > 0
    assert set(found["wkv7"]["native"]["errors"]) == {"y", "dr", "dw", "dk", "dv", "da", "db", "dstate"}
    assert set(found["token_shift"]["native"]["errors"]) >= {"y", "y5", "dx", "dbefore", "dx_g"}
    only = op.measure(small(kernel="chunked"), ["wkv6"])["results"]["wkv6"]
    assert [label for label, row in only.items() if "errors" in row] == ["chunked"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, in the package
def test_inference_beside_the_rwkv_package_and_plain_pytorch() -> None:
    pytest.importorskip("rwkv")
    setting = small(head_size=64)
    found = infer.measure(setting, infer.usual_formats(setting), ["rwkv", "torch"], given_peak=1e9)
    limits = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.1, "rwkv fp32": 1e-5, "rwkv bf16": 0.05, "torch fp32": 1e-5}
    limits |= {"torch bf16": 0.05}
    assert found["results"].keys() == limits.keys()
    for name, row in found["results"].items():
        assert row["error of the logits"] < limits[name], name
        assert min(row["prompt"]["tokens a second"].values()) > 0
        assert min(row["decode"]["tokens a second"].values()) > 0
    assert set(found["rookery is faster by"]["int8"]) == {"rwkv fp32", "rwkv bf16", "torch fp32", "torch bf16"}
    assert found["bytes of a sequence's state"] == 4 * 2 * (2 * 64 + 64 * 64)
    model = random_model(setting.shape)
    assert infer.weight_bytes(model, "fp32") == 4 * multiplications(model)
    assert multiplications(model) < infer.weight_bytes(model, "int8") < 1.5 * multiplications(model)


def test_inference_beside_llama_cpp() -> None:
    pytest.importorskip("llama_cpp")
    setting = small(head_size=64, n_embd=64, vocab_size=300)
    results = infer.measure(setting, ["fp32"], ["llama"], given_peak=1e9)["results"]
    assert list(results) == ["fp32", "llama fp32", "llama bf16", "llama q8_0"]
    limits = {"fp32": 1e-5, "llama fp32": 1e-5, "llama bf16": 0.05, "llama q8_0": 0.1}
    assert all(results[name]["error of the logits"] < limit for name, limit in limits.items())


def test_data_beside_other_tokenizers() -> None:
    found = data.measure(1, 64, 1, ["rwkv", "pyrwkv"])
    assert found["corpus"]["megabytes"] == pytest.approx(1, rel=0.05)
    names = {"tokenise", "make", "tokenise: rwkv", "tokenise: pyrwkv", "make: rwkv", "read samples"}
    assert found["results"].keys() == names
    for name, ratio in found["rookery is faster by"].items():
        ours, theirs = (found["results"][key]["MB a second"]["cpu"] for key in (name.partition(":")[0], name))
        assert ratio["cpu"] == pytest.approx(ours / theirs, rel=1e-2)


def test_turns_and_medians() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = alternate(runs, 3)
    changes = [order[i] for i in range(len(order)) if not i or order[i] != order[i - 1]]
    assert "".join(changes) == "ababab"  # once to warm up; then ab, ba, ab, of which neighbours are one here
    assert len(times["a"].wall) == len(times["a"].cpu) == 3
    slow, fast = Times([4.0, 2.0, 9.0], [6.0, 6.0, 6.0]), Times([1.0, 2.0, 3.0], [1.0, 1.5, 2.0])
    assert faster(slow, fast, "cpu") == {"wall": 2.0, "cpu": 4.0}
    assert faster(slow, fast, "cuda") == {"wall": 2.0}
    assert slow.rate(8, "cpu") == {"wall": 2.0, "cpu": 1.333}
    assert slow.report("cpu")["wall"] == {"median": 4.0, "least": 2.0, "most": 9.0}


def test_the_peak_may_be_given() -> None:
    assert peak("cpu", torch.float32, 5e12) == {"wall": 5e12, "cpu": 5e12}


def test_peers_that_cannot_run_here_say_why() -> None:
    able, refused = choose(["torch", "torch", "rwkv", "fla"], "train", "cpu")
    assert able == ["torch"]
    assert [sentence.partition(":")[0] for sentence in refused] == ["rwkv", "fla"]
    assert "rookery bench train" in refused[0]
    assert choose(["torch"], "train", "cpu", "x060")[0] == []
    assert choose(["torch"], "op", "cpu", "x060")[0] == ["torch"]
    assert choose(["rwkv", "torch"], "infer", "cpu", "x060")[0] == ["rwkv"]
    with pytest.raises(UserError, match="nemo is none of torch, fla, rwkv, llama, pyrwkv"):
        choose(["nemo"], "train", "cpu")


def test_a_record_says_what_it_was_measured_on() -> None:
    found = record("op", {"results": {}})
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cores"] >= 1
    assert found["rookery"]["commit"] is None or re.fullmatch(r"[0-9a-f]{12}\+?", found["rookery"]["commit"])


def test_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "new" / "train.json"
    sizes = "--n_layer 1 --n-embd 32 --head_size 32 --vocab-size 64 --ctx_len 16 --micro_bsz 1 --rounds 1"
    more = "--against torch,rwkv --peak 0.1 --threads 1"
    words = ["bench", "train", *sizes.split(), *more.split(), "-o", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "rookery", "--lang", "en", *words],
        capture_output=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "rwkv: it does not do what rookery bench train measures\n"
    assert re.search(r"^rookery .* MiB +4\.\d+$", done.stdout, re.MULTILINE)
    assert re.search(r"^torch ", done.stdout, re.MULTILINE)
    assert "Time of a step: matrix products" in done.stdout
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["benchmark"] == "train"
    assert found["command"].startswith("rookery --lang en bench train --n_layer 1")
    assert found["left out"] == [done.stderr.strip()]
    assert found["peak FLOP a second"]["wall"] == 1e11
    assert "in x out" in found["formulas"]["training FLOP a token"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["op", "wkv7", "--kernel", "magic"], "magic"),
        (["op", "wkv8"], "wkv8 is none of wkv7, wkv6"),
        (["train", "--version", "x071"], "x071 is none of x052"),
        (["train", "--precision", "fp8"], "fp8 is none of"),
        (["train", "--n_embd", "100"], "100 is not a multiple of head_size 64"),
        (["train", "--against", "nemo"], "nemo is none of torch"),
        (["infer", "--dtype", "int3"], "int3 is none of"),
        (["infer", "--dtype", "int8", "--n_embd", "24", "--head_size", "8"], "int8 is not possible here"),
        (["train", "--device", "tpu"], "tpu is none of auto"),
        (["data", "--megabytes", "0"], "--megabytes"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "train", "--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err
