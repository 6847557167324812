"""Merging: the file computes what base and adapter compute side by side, and one tensor at a time is in memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rookery
from rookery.adapters import AdapterConfig, adapter_tensors, attach, initial_factors
from rookery.errors import UserError
from rookery.formats import Base, merge, read_weights, write_adapter, write_pth
from rookery.formats.probe import probe
from rookery.formats.source import Source
from rookery.models import Model
from rookery.quant import quantise

GOLDEN = Path(__file__).parent.parent / "golden"
TOKENS = torch.arange(30)[None]
VERSIONS = ("x052", "x060", "x070")
CONFIGS = {
    "lora": AdapterConfig("lora", r=8, alpha=16.0),
    "rslora": AdapterConfig("lora", r=8, alpha=16.0, rslora=True),
    "dora": AdapterConfig("dora", r=8, alpha=16.0),
    "pissa": AdapterConfig("pissa", r=8),
    "bone": AdapterConfig("miss", r=20),
    "bat": AdapterConfig("miss", r=8, miss_mode="bat"),
    "bat_rows": AdapterConfig("miss", r=8, miss_mode="bat_rows"),
    "with parts": AdapterConfig("lora", r=8, alpha=16.0, train_parts=("time", "ln", "emb", "head")),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def noise(like: Tensor) -> Tensor:
    """The same whenever the shape is the same."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(like.numel()))


@torch.no_grad()
def logits(model: Model) -> Tensor:
    return model.eval()(TOKENS)[0]


def base_file(folder: Path, version: str, dtype: torch.dtype, ending: str = ".pth") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"base{ending}"
    tensors = {name: t.to(dtype) for name, t in read_weights(GOLDEN / f"{version}_ckpt.safetensors").items()}
    if ending == ".pth":
        write_pth(file, tensors)
    else:
        save_file({name: t.contiguous() for name, t in tensors.items()}, file)
    return file


def train(model: Model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * noise(parameter))


def adapter_file(base: Path, config: AdapterConfig) -> Path:
    model = rookery.load(base, device="cpu", dtype=torch.float32)
    attach(model, config)
    train(model)
    file = base.with_name("adapter.safetensors")
    write_adapter(file, adapter_tensors(model), config, Base.of(read_weights(base), base))
    return file


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("version", VERSIONS)
def test_merged_computes_what_the_parts_compute(version: str, name: str, precision: str, tmp_path: Path) -> None:
    base = base_file(tmp_path, version, DTYPES[precision])
    adapter = adapter_file(base, CONFIGS[name])
    done = merge(base, adapter, tmp_path / "merged.pth")
    beside = rookery.load(base, device="cpu", dtype=torch.float32, adapter=adapter)
    merged = rookery.load(tmp_path / "merged.pth", device="cpu", dtype=torch.float32)
    difference = float((logits(merged) - logits(beside)).abs().max())
    assert difference <= (3e-4 if precision == "fp32" else 0.5)
    assert done.difference is not None
    assert done.difference <= (3e-4 if precision == "fp32" else 0.5)
    assert done.effect is not None
    assert done.effect > 0.5
    before, after = read_weights(base), read_weights(tmp_path / "merged.pth")
    assert list(after) == list(before)
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    if name != "with parts":
        kept = {n for n in before if torch.equal(before[n], after[n])}
        matrices = {"receptance", "key", "value", "gate", "output"}
        assert kept == {n for n in before if n.split(".")[-2] not in matrices}


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_either_format_from_either(ending: str, tmp_path: Path) -> None:
    other = ".safetensors" if ending == ".pth" else ".pth"
    base = base_file(tmp_path, "x070", torch.bfloat16, other)
    adapter = adapter_file(base, CONFIGS["lora"])
    wanted = merge(base, adapter, tmp_path / f"a{other}")
    merge(base, adapter, tmp_path / f"b{ending}")
    first, second = read_weights(wanted.path), read_weights(tmp_path / f"b{ending}")
    assert all(torch.equal(first[name], second[name]) for name in first)
    if ending == ".pth":  # any reader of .pth files takes it, mapped or not
        for mmap in (False, True):
            plain = torch.load(tmp_path / "b.pth", weights_only=True, mmap=mmap)
            assert all(torch.equal(plain[name], tensor) for name, tensor in first.items())


def test_old_files_merge_to_the_bytes_of_the_published_scripts(tmp_path: Path) -> None:
    """A slim bf16 file of RWKV-PEFT into a bf16 base: product, strength and sum each rounded, as merge_lora.py does."""
    base = base_file(tmp_path, "x060", torch.bfloat16)
    model = rookery.load(base, device="cpu", dtype=torch.float32)
    attach(model, CONFIGS["lora"])
    train(model)
    slim = {name: tensor.bfloat16() for name, tensor in adapter_tensors(model).items()}
    write_pth(tmp_path / "rwkv-0.pth", slim)
    merge(base, tmp_path / "rwkv-0.pth", tmp_path / "merged.pth", alpha=16)
    before, after = read_weights(base), read_weights(tmp_path / "merged.pth")
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A" in slim:
            weight = weight + slim[f"{module}.lora_B"] @ slim[f"{module}.lora_A"] * (16 / 8)
        assert torch.equal(after[name], weight), name


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["lora", "dora", "pissa"])
def test_a_quantised_training_merges_into_the_unrounded_weights(name: str, kind: str, tmp_path: Path) -> None:
    base = base_file(tmp_path, "x070", torch.float32)
    model = rookery.load(base, device="cpu", dtype=torch.float32)
    attach(model, CONFIGS[name])
    quantise(model, kind, low_rank=initial_factors(model))
    facts = Base.of(read_weights(base), base)
    write_adapter(tmp_path / "new.safetensors", adapter_tensors(model), CONFIGS[name], facts)
    merge(base, tmp_path / "new.safetensors", tmp_path / "merged.pth")
    before, after = read_weights(base), read_weights(tmp_path / "merged.pth")
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_state_is_copied_as_it_is(version: str, tmp_path: Path) -> None:
    base = base_file(tmp_path, version, torch.bfloat16)
    state = GOLDEN / f"{version}_time_state.safetensors"
    done = merge(base, state, tmp_path / "merged.pth")
    assert (done.kind, done.difference) == ("state", 0.0)
    after = read_weights(tmp_path / "merged.pth")
    wanted = read_weights(base) | read_weights(state)  # what merge_state.py does
    assert list(after) == list(wanted)
    assert all(torch.equal(after[name], t) and after[name].dtype == t.dtype for name, t in wanted.items())
    mounted = rookery.load(base, dtype=torch.float32, state=state)
    assert torch.equal(logits(rookery.load(tmp_path / "merged.pth", dtype=torch.float32)), logits(mounted))
    again = merge(tmp_path / "merged.pth", state, tmp_path / "again.pth")
    assert again.difference == 0.0


@pytest.mark.parametrize(
    "config",
    [AdapterConfig("miss", r=64, miss_mode="bat"), AdapterConfig("miss", r=256, targets=("ffn.value",))],
    ids=["head not divisible by r", "other matrices smaller than r"],
)
def test_matrices_without_an_adapter_need_not_fit_one(config: AdapterConfig, tmp_path: Path) -> None:
    base = base_file(tmp_path, "x070", torch.float32)
    done = merge(base, adapter_file(base, config), tmp_path / "merged.pth")
    assert done.effect is not None
    assert done.effect > 0.1


@pytest.mark.parametrize("version", [*VERSIONS, "optional"])
def test_the_probe_computes_what_the_model_computes(version: str, tmp_path: Path) -> None:
    if version == "optional":
        tensors = load_file(GOLDEN / "optional_headqk_tinyatt.safetensors")
        file = tmp_path / "model.pth"
        write_pth(file, {n.removeprefix("w."): t for n, t in tensors.items() if n.startswith("w.")})
    else:
        file = GOLDEN / f"{version}_ckpt.safetensors"
    model = rookery.load(file, device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.shape.vocab_size, (1, 48), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(probe(Source(file)), model(tokens)[0], rtol=0, atol=1e-5)


class TestRefusals:
    def left(self, folder: Path) -> set[str]:
        return {file.name for file in folder.iterdir()} - {"base.pth", "adapter.safetensors"}

    def test_another_base(self, tmp_path: Path) -> None:
        base = base_file(tmp_path, "x070", torch.float32)
        adapter = adapter_file(base, CONFIGS["lora"])
        with pytest.raises(UserError, match=r"belongs to base.pth \(x070 .* not to a model like x060"):
            merge(GOLDEN / "x060_ckpt.safetensors", adapter, tmp_path / "merged.pth")
        tensors = {name: t.clone() for name, t in read_weights(base).items()}
        tensors["blocks.0.ffn.key.weight"] += 0.1
        write_pth(base, tensors)
        with pytest.raises(UserError, match="has the same dimensions but other weights"):
            merge(base, adapter, tmp_path / "merged.pth")
        assert self.left(tmp_path) == set()
        merge(base, adapter, tmp_path / "merged.pth", any_base=True)

    def test_a_state_of_another_model(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="the model needs 3 of 2 x 64 x 64"):
            merge(GOLDEN / "x070_ckpt.safetensors", GOLDEN / "x060_time_state.safetensors", tmp_path / "merged.pth")

    def test_places(self, tmp_path: Path) -> None:
        base = base_file(tmp_path, "x070", torch.float32)
        adapter = adapter_file(base, CONFIGS["lora"])
        with pytest.raises(UserError, match="is the base itself"):
            merge(base, adapter, base)
        with pytest.raises(UserError, match=r"a merged model is a \.pth or \.safetensors"):
            merge(base, adapter, tmp_path / "merged.st")
        with pytest.raises(UserError, match="cannot write"):
            merge(base, adapter, tmp_path / "nowhere" / "merged.pth")

    def test_a_result_that_is_not_what_it_should_be(self, tmp_path: Path) -> None:
        base = base_file(tmp_path, "x070", torch.bfloat16)
        adapter_file(base, CONFIGS["lora"])
        tensors = load_file(tmp_path / "adapter.safetensors")
        tensors["blocks.1.att.key.lora_A"][0, 0] = float("nan")
        config = CONFIGS["lora"]
        write_adapter(tmp_path / "adapter.safetensors", tensors, config, Base.of(read_weights(base), base))
        with pytest.raises(UserError, match="is not what it should be: a logit differs by nan"):
            merge(base, tmp_path / "adapter.safetensors", tmp_path / "merged.pth")
        assert self.left(tmp_path) == set()
        done = merge(base, tmp_path / "adapter.safetensors", tmp_path / "merged.pth", check=False)
        assert done.difference is None

    def test_an_adapter_that_rounding_would_lose(self, tmp_path: Path) -> None:
        """Weights of 4096 cannot take up a change of one in bf16, although it decides the logits."""
        base = base_file(tmp_path, "x070", torch.bfloat16)
        tensors = {name: t.clone() for name, t in read_weights(base).items()}
        for name in tensors:
            if name.endswith("ffn.value.weight"):
                tensors[name] = torch.full_like(tensors[name], 4096.0)
        write_pth(base, tensors)
        adapter = adapter_file(base, replace(CONFIGS["lora"], targets=("ffn.value",)))
        with pytest.raises(UserError, match="is not what it should be"):
            merge(base, adapter, tmp_path / "merged.pth")
        assert self.left(tmp_path) == set()

    @pytest.mark.parametrize("kind", ["adapter", "state"])
    def test_the_file_that_is_merged_is_not_overwritten(self, kind: str, tmp_path: Path) -> None:
        base = base_file(tmp_path, "x070", torch.float32)
        if kind == "adapter":
            file = adapter_file(base, CONFIGS["lora"])
        else:
            file = tmp_path / "state.pth"
            write_pth(file, load_file(GOLDEN / "x070_time_state.safetensors"))
        before = file.read_bytes()
        with pytest.raises(UserError, match="is what is to be merged; name another file"):
            merge(base, file, file)
        assert file.read_bytes() == before

    def test_interrupted(self, tmp_path: Path) -> None:
        base = base_file(tmp_path, "x070", torch.float32)
        adapter = adapter_file(base, CONFIGS["lora"])
        (tmp_path / "merged.pth").write_bytes(b"old")

        def stop(done: int, total: int) -> None:
            if done > total // 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge(base, adapter, tmp_path / "merged.pth", progress=stop)
        assert self.left(tmp_path) == {"merged.pth"}
        assert (tmp_path / "merged.pth").read_bytes() == b"old"


MEASURE = """
import json, sys, threading, time
from rookery.bench.machine import anonymous_memory as anonymous
from rookery.formats import merge
base, adapter, out, small = sys.argv[1:]

def watch():
    while not done.is_set():
        peak.append(max(peak[-1], anonymous()))
        time.sleep(0.002)

merge(small, small + ".adapter.safetensors", out)  # what libraries and compiled loops take for themselves
before, done = anonymous(), threading.Event()
peak = [before]
thread = threading.Thread(target=watch)
thread.start()
merge(base, adapter, out)
done.set()
thread.join()
print(json.dumps({"peak": peak[-1] - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    """Not that of a model, let alone two: 12 layers would be 12 times as much."""
    from rookery.models import ModelShape, create

    shape = ModelShape("x070", 12, 512, 8192, 64, 512, 2048, dict.fromkeys("wavg", 32))
    model = create(shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    base = tmp_path / "base.pth"
    write_pth(base, {name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    config = AdapterConfig("lora", r=4, alpha=8.0)
    attach(model, config)
    train(model)
    adapter = tmp_path / "adapter.safetensors"
    write_adapter(adapter, adapter_tensors(model), config, Base.of(read_weights(base), base))
    del model
    small = base_file(tmp_path / "small", "x070", torch.bfloat16)
    adapter_file(small, config).rename(f"{small}.adapter.safetensors")
    # What is freed goes back at once: how much of it glibc otherwise keeps differs with the order of small allocations.
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (base, adapter, tmp_path / "merged.pth", small))],
        check=True, capture_output=True, text=True, env=os.environ | settings,
    )  # fmt: skip
    peak = json.loads(result.stdout)["peak"]
    whole = sum(math.prod(tensor.shape) * 4 for tensor in read_weights(base).values())
    largest = 8192 * 512 * 4
    assert whole > 10 * largest
    assert peak < 4 * largest, f"{peak / 1e6:.0f} MB for a model of {whole / 1e6:.0f} MB"
