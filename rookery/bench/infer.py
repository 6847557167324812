"""Inference: reading a prompt, and decoding one sequence and many, in each format of the weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rookery.bench import plain7
from rookery.bench.setting import Setting, random_model
from rookery.bench.timing import CLOCKS, Times, alternate, faster, rounded
from rookery.bench.work import FORMULAS, LOW_RANK, multiplications, peak
from rookery.formats import write_pth
from rookery.formats.convert import convert
from rookery.infer import DTYPES, form_of
from rookery.infer.forms import PREFILL, bytes_of
from rookery.models import RWKV7, Model, State
from rookery.tokenizer import World

BATCHES = (1, 4, 16)
"""Sequences that are decoded together."""

ANSWER = 16
"""Tokens of a measured answer."""


def usual_formats(setting: Setting) -> list[str]:
    """What is measured when nothing is said: every format that the fastest form of such a model has."""
    if setting.device == "cuda":
        return ["bf16"]
    return ["fp32", "bf16", "int8"]


class Runner(Protocol):
    """Something that answers one prompt. `read` begins anew; both give the logits (V) for the next token."""

    def read(self, tokens: list[int]) -> Tensor: ...
    def step(self, token: int) -> Tensor: ...


def measure(
    setting: Setting, formats: Sequence[str], against: Sequence[str] = (), given_peak: float = 0.0
) -> dict[str, Any]:
    """Reading `ctx_len` tokens, and decoding, of a random model.

    Args:
        setting: sizes; precision is not used.
        formats: of our weights, names of `rookery.infer.DTYPES`.
        against: peers that can run here. Each of ours is compared with each of them, whatever its format.
        given_peak: FLOP a second of the device in every format; 0 measures it.
    """
    prompt = torch.randint(1, setting.vocab_size, (setting.ctx_len,), generator=torch.Generator().manual_seed(1))
    tokens = prompt.tolist()
    with torch.inference_mode():
        runners: dict[str, Runner] = {name: Ours(setting, DTYPES[name]) for name in formats}
        for name in against:
            runners |= PEERS[name](setting)
        errors = _errors(setting, runners, tokens)
        prompts = {name: partial(runner.read, tokens) for name, runner in runners.items()}
        reading = alternate(prompts, setting.rounds, setting.device)
        answers = {name: partial(_answer, runner, tokens) for name, runner in runners.items()}
        decoding = alternate(answers, setting.rounds, setting.device)
        several = {name: _several(setting, runner) for name, runner in runners.items() if isinstance(runner, Ours)}
    results: dict[str, dict[str, Any]] = {
        name: {
            "error of the logits": errors.get(name),
            "prompt": _speed(reading[name], len(tokens), setting.device),
            "decode": _speed(decoding[name], ANSWER, setting.device),
        }
        for name in runners
    }
    model = random_model(setting.shape)
    body = 2 * (multiplications(model) - model.head.weight.numel())
    for name in formats:
        top = peak(setting.device, torch.bfloat16 if name == "int8" else DTYPES[name], given_peak)
        size = weight_bytes(model, name) / 1e9
        read, said = results[name]["prompt"], results[name]["decode"]
        read["mfu"] = {clock: rounded(body * rate / top[clock]) for clock, rate in read["tokens a second"].items()}
        said["GB of weights a second"] = {c: rounded(size * rate) for c, rate in said["tokens a second"].items()}
        said["tokens a second, several sequences"] = several[name]
    return {
        "setting": setting.report(),
        "clocks": CLOCKS,
        "formulas": FORMULAS | {"prompt": "the head meets the last token only, and is not counted"},
        "llama.cpp": _llama_build() if "llama" in against else None,
        "bytes of a sequence's state": bytes_of(State.zeros(setting.shape, 1, "cpu", torch.float32)),
        "results": results,
        "rookery is faster by": {
            ours: {
                peer: {
                    "prompt": faster(reading[peer], reading[ours], setting.device),
                    "decode": faster(decoding[peer], decoding[ours], setting.device),
                }
                for peer in runners
                if peer not in formats
            }
            for ours in formats
        },
    }


def _errors(setting: Setting, runners: dict[str, Runner], tokens: list[int]) -> dict[str, float]:
    """|got - exact| / |exact| of the logits after the prompt; exact is plain PyTorch in fp64, of x070."""
    if setting.version != "x070":
        return {}
    exact = Plain(setting, torch.float64).read(tokens).cpu()
    got = {name: runner.read(tokens).double().cpu() for name, runner in runners.items()}
    return {name: float(f"{float((logits - exact).norm() / exact.norm()):.1e}") for name, logits in got.items()}


def _speed(times: Times, count: int, device: str) -> dict[str, Any]:
    return {"tokens a second": times.rate(count, device), "seconds": times.report(device)}


def _answer(runner: Runner, tokens: list[int]) -> None:
    for token in tokens[:ANSWER]:
        runner.step(token)


def _several(setting: Setting, runner: Ours) -> dict[str, dict[str, float]]:
    """Tokens a second of all sequences together, by their number and clock."""
    times = alternate({str(count): partial(runner.batch, count) for count in BATCHES}, setting.rounds, setting.device)
    return {count: spent.rate(int(count), setting.device) for count, spent in times.items()}


def weight_bytes(model: Model, name: str) -> int:
    """Bytes of the matrices that a token is multiplied with; low-rank ones stay bf16 in int8."""
    low = sum(p.numel() for key, p in model.named_parameters() if LOW_RANK.fullmatch(key))
    large = multiplications(model) - low
    if DTYPES[name] == torch.int8:
        return large + 2 * low
    return (large + low) * DTYPES[name].itemsize


class Ours:
    """The fastest form of our model."""

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        model = random_model(setting.shape).to(setting.device)
        if dtype != torch.int8:
            model = model.to(dtype)
        self.form = form_of(model, dtype if dtype == torch.int8 else None)
        self.slots = self.form.slots(max(BATCHES))

    def read(self, tokens: list[int]) -> Tensor:
        for part in self.slots.tensors:
            part[:, 0] = 0
        for begin in range(0, len(tokens), PREFILL):
            hidden = self.form.read(self.slots, 0, tokens[begin : begin + PREFILL])
        return self.form.head(hidden[-1:])[0]

    def step(self, token: int) -> Tensor:
        return self.form.step(self.slots, [0], [token])[0]

    def batch(self, count: int) -> None:
        self.form.step(self.slots, range(count), range(1, count + 1))


class Plain:
    """Plain PyTorch operations."""

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        model = random_model(setting.shape)
        assert isinstance(model, RWKV7)
        self.model = model.to(setting.device, dtype)
        self.state = self._start()

    def _start(self) -> State:
        weight = self.model.emb.weight
        return State.zeros(self.model.shape, 1, weight.device, weight.dtype)

    def read(self, tokens: list[int]) -> Tensor:
        self.state = self._start()
        return self._advance(tokens)

    def step(self, token: int) -> Tensor:
        return self._advance([token])

    def _advance(self, tokens: list[int]) -> Tensor:
        rows = torch.tensor([tokens], device=self.model.emb.weight.device)
        x, self.state = plain7.hidden(self.model, rows, self.state)
        return F.linear(x[0, -1], self.model.head.weight)


class Package:
    """The `rwkv` package."""

    def __init__(self, setting: Setting, strategy: str) -> None:
        # It reads these when it is imported.
        is_newest = "1" if setting.version == "x070" else "0"
        os.environ |= {"RWKV_V7_ON": is_newest, "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
        # It prints what it does.
        with redirect_stdout(StringIO()), tempfile.TemporaryDirectory() as folder:
            from rwkv.model import RWKV

            write_pth(Path(folder) / "model.pth", random_model(setting.shape).state_dict())
            self.model = RWKV(model=str(Path(folder) / "model"), strategy=f"{setting.device} {strategy}")
        self.state: Any = None

    def read(self, tokens: list[int]) -> Tensor:
        logits, self.state = self.model.forward(tokens, None)
        return logits

    def step(self, token: int) -> Tensor:
        logits, self.state = self.model.forward([token], self.state)
        return logits


class Llama:
    """llama.cpp, through its Python package."""

    def __init__(self, setting: Setting, precision: str) -> None:
        from llama_cpp import Llama as Model

        vocabulary = World.compact(set()) if setting.vocab_size < World().vocab_size else World()
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "model.pth", Path(folder) / "model.gguf"
            write_pth(source, random_model(setting.shape).state_dict())
            convert(source, target, precision=precision, tokenizer=lambda size: vocabulary)
            self.model = Model(
                str(target), n_ctx=max(4096, 2 * setting.ctx_len), n_batch=PREFILL, n_ubatch=PREFILL, verbose=False,
                n_threads=setting.threads, n_threads_batch=setting.threads, use_mmap=False,
            )  # fmt: skip
        self.vocab_size = setting.vocab_size

    def read(self, tokens: list[int]) -> Tensor:
        self.model.reset()
        return self._advance(tokens)

    def step(self, token: int) -> Tensor:
        return self._advance([token])

    def _advance(self, tokens: list[int]) -> Tensor:
        if self.model.n_tokens + len(tokens) > self.model.n_ctx():
            self.model.reset()  # its count of tokens has an end, though the state has none
        self.model.eval(tokens)
        logits = np.ctypeslib.as_array(self.model._ctx.get_logits(), shape=(self.vocab_size,))
        return torch.from_numpy(logits.copy())


def _packages(setting: Setting) -> dict[str, Runner]:
    names = ("fp32", "bf16") if setting.device == "cpu" else ("fp16",)
    return {f"rwkv {name}": Package(setting, name) for name in names}


def _plain(setting: Setting) -> dict[str, Runner]:
    names = ("fp32", "bf16") if setting.device == "cpu" else ("bf16",)
    return {f"torch {name}": Plain(setting, DTYPES[name]) for name in names}


def _llama_build() -> str:
    """What its library was compiled for: wheels leave out most of what a processor has."""
    import llama_cpp

    return str(llama_cpp.llama_print_system_info().decode())


def _llamas(setting: Setting) -> dict[str, Runner]:
    return {f"llama {name}": Llama(setting, name) for name in ("fp32", "bf16", "q8_0")}


PEERS: dict[str, Callable[[Setting], dict[str, Runner]]] = {"rwkv": _packages, "torch": _plain, "llama": _llamas}
