"""Adapter files: what ours says of itself, on which base it may be put, and that damage is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import rookery
from rookery.adapters import AdapterConfig, adapter_tensors, attach, attached
from rookery.errors import UserError
from rookery.formats import Base, read_adapter, read_weights, write_adapter, write_pth
from rookery.formats.adapter import fingerprint
from rookery.models import Model

GOLDEN = Path(__file__).parent.parent / "golden"
CONFIGS = {
    "lora": AdapterConfig("lora", r=4, alpha=24.0, dropout=0.1, targets=("key", "att.value")),
    "rslora": AdapterConfig("lora", r=4, alpha=24.0, rslora=True, train_parts=("time", "ln", "emb", "head")),
    "dora": AdapterConfig("dora", r=4, alpha=8.0, train_parts=("ln",)),
    "pissa": AdapterConfig("pissa", r=4, svd_niter=2),
    "bone": AdapterConfig("miss", r=20),
    "bat": AdapterConfig("miss", r=16, miss_mode="bat"),
}


def checkpoint(version: str) -> Path:
    return GOLDEN / f"{version}_ckpt.safetensors"


def noise(like: Tensor) -> Tensor:
    """The same whenever the shape is the same."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(like.numel()))


@torch.no_grad()
def logits(model: Model) -> Tensor:
    return model(torch.arange(20)[None])[0]


def trained(version: str, config: AdapterConfig) -> Model:
    model = rookery.load(checkpoint(version), device="cpu", dtype=torch.float32)
    attach(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * noise(parameter))
    return model


def write(path: Path, version: str = "x070", config: AdapterConfig = CONFIGS["lora"]) -> Model:
    model = trained(version, config)
    base = checkpoint(version)
    write_adapter(path, adapter_tensors(model), config, Base.of(read_weights(base), base))
    return model


@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_is_all_that_is_needed(name: str, version: str, tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    model = write(file, version, CONFIGS[name])
    found = read_adapter(file)
    assert found.config == CONFIGS[name]
    assert found.tool == f"rookery {rookery.__version__}"
    assert found.base is not None
    assert (found.base.file, found.base.version) == (f"{version}_ckpt.safetensors", version)
    again = rookery.load(checkpoint(version), device="cpu", dtype=torch.float32, adapter=file)
    assert torch.equal(logits(again), logits(model))


def test_names_are_those_of_rwkv_peft(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", config=replace(CONFIGS["pissa"], train_parts=("ln",)))
    names = load_file(tmp_path / "a.safetensors").keys()
    for name in ("att.key.lora_A", "ffn.value.lora_B", "att.output.init_lora_A", "ln1.weight", "att.ln_x.bias"):
        assert f"blocks.0.{name}" in names
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["rookery"])
    assert said["format"] == 1
    assert said["base"]["fingerprint"] == fingerprint(read_weights(checkpoint("x070")))


def test_several_adapters_at_once(tmp_path: Path) -> None:
    for name in ("lora", "bone"):
        write(tmp_path / f"{name}.safetensors", config=CONFIGS[name])
    model = rookery.load(
        checkpoint("x070"), dtype=torch.float32, adapter=[tmp_path / "lora.safetensors", tmp_path / "bone.safetensors"]
    )
    assert list(attached(model)) == ["default", "2"]


def test_in_another_precision(tmp_path: Path) -> None:
    for name in ("dora", "pissa"):
        model = write(tmp_path / "a.safetensors", config=CONFIGS[name])
        rounded = rookery.load(checkpoint("x070"), dtype=torch.bfloat16, adapter=tmp_path / "a.safetensors")
        assert (logits(rounded).float() - logits(model)).abs().mean() < 0.05


class TestBase:
    def test_the_same_model_in_another_file_and_precision_is_the_same(self, tmp_path: Path) -> None:
        tensors = {name: t.float() for name, t in read_weights(checkpoint("x070")).items()}
        write_pth(tmp_path / "wide.pth", tensors)
        rounded = {name: t.bfloat16() for name, t in tensors.items()}
        write_pth(tmp_path / "rounded.pth", rounded)
        squeezed = {name: t.squeeze() if t.shape[:2] == (1, 1) else t for name, t in rounded.items()}
        write_pth(tmp_path / "squeezed.pth", squeezed)
        prints = {fingerprint(read_weights(tmp_path / f"{name}.pth")) for name in ("wide", "rounded", "squeezed")}
        assert prints == {fingerprint(read_weights(checkpoint("x070")))}

    def test_what_may_change_and_what_may_not(self) -> None:
        tensors = read_weights(checkpoint("x070"))
        own = fingerprint(tensors)
        assert fingerprint(tensors | {"blocks.0.att.time_state": torch.ones(2, 64, 64)}) == own
        assert fingerprint({name: t for name, t in tensors.items() if name != "blocks.0.att.v1"}) == own
        moved = {name: torch.zeros_like(t) for name, t in tensors.items() if name.endswith("ffn.key.weight")}
        assert fingerprint(tensors | moved) != own
        assert fingerprint(tensors | {"ln_out.bias": tensors["ln_out.bias"] + 0.1}) != own
        assert fingerprint({f"{name}x": t for name, t in tensors.items()}) != own

    def test_another_model_is_refused_with_both_named(self, tmp_path: Path) -> None:
        write(tmp_path / "a.safetensors")
        with pytest.raises(UserError) as refusal:
            rookery.load(checkpoint("x060"), adapter=tmp_path / "a.safetensors", any_base=True)
        told = str(refusal.value)
        assert "a.safetensors belongs to x070_ckpt.safetensors (x070 L3 D128" in told
        assert "x060_ckpt.safetensors (x060 L2 D128" in told

    def test_other_weights_are_refused_unless_meant(self, tmp_path: Path) -> None:
        write(tmp_path / "a.safetensors")
        tensors = {name: t.clone() for name, t in read_weights(checkpoint("x070")).items()}
        tensors["blocks.1.att.key.weight"] *= 2
        write_pth(tmp_path / "tuned.pth", tensors)
        with pytest.raises(UserError, match=r"was trained on x070_ckpt.safetensors .* tuned.pth has .* other weights"):
            rookery.load(tmp_path / "tuned.pth", adapter=tmp_path / "a.safetensors")
        rookery.load(tmp_path / "tuned.pth", adapter=tmp_path / "a.safetensors", any_base=True)


class TestDamage:
    def refused(self, path: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            rookery.load(checkpoint("x070"), adapter=path)

    def test_cut_short_or_garbled(self, tmp_path: Path) -> None:
        file = tmp_path / "a.safetensors"
        write(file)
        content = file.read_bytes()
        for broken in (b"", content[:100], content[:-10], b"\xff" * 8 + content[8:], content[:8] + b"{" * 3000):
            file.write_bytes(broken)
            self.refused(file, "is damaged or no safetensors file")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": 2}, "is an adapter of format 2; this Rookery reads 1"),
            ({"adapter": {"method": "lora", "r": "many"}}, "cannot be read"),
            ({"adapter": {"method": "sorcery"}}, "cannot be read"),
            ({"adapter": {"method": "lora", "r": -4}}, "rank -4"),
            ({"adapter": {"method": "lora", "r": 10**9, "alpha": 1.0}}, "does not fit the model"),
            ({"adapter": []}, "cannot be read"),
            ({"adapter": {"method": "pissa", "r": 4}}, "lacks 36 tensors"),
            ({"base": {"file": "x"}}, "cannot be read"),
        ],
    )
    def test_mislabelled(self, change: dict, message: str, tmp_path: Path) -> None:
        file = tmp_path / "a.safetensors"
        write(file, config=replace(CONFIGS["lora"], targets=None))
        with safe_open(file, framework="pt") as content:
            said = json.loads(content.metadata()["rookery"])
        save_file(load_file(file), file, {"rookery": json.dumps(said | change)})
        self.refused(file, message)

    def test_no_json(self, tmp_path: Path) -> None:
        save_file({"blocks.0.att.key.lora_A": torch.zeros(2, 2)}, tmp_path / "a.safetensors", {"rookery": "{"})
        self.refused(tmp_path / "a.safetensors", "cannot be read")

    def test_nothing_of_the_kind(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "nowhere.safetensors", "does not exist")
        self.refused(tmp_path, "holds no adapter: neither")
        write_pth(tmp_path / "x.pth", {"a.weight": torch.zeros(2)})
        self.refused(tmp_path / "x.pth", "holds no adapter; its first tensor is a.weight")

    def test_tensors_of_another_place(self, tmp_path: Path) -> None:
        file = tmp_path / "a.safetensors"
        write(file)
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata()
        tensors = load_file(file)
        save_file(tensors | {"blocks.9.att.key.lora_A": torch.zeros(4, 128)}, file, metadata)
        self.refused(file, "no place for")
        save_file(tensors | {"blocks.0.att.key.lora_A": torch.zeros(4, 12)}, file, metadata)
        self.refused(file, r"has shape \(4, 12\), the model needs \(4, 128\)")


def run_directory(folder: Path, base: str, peft: str) -> Path:
    folder.mkdir()
    recipe = f'[model]\nload_model = {json.dumps(base)}\n\n[adapter]\npeft = "{peft}"\n'
    (folder / "config.toml").write_text(recipe, encoding="utf-8")
    return folder


class TestRunDirectories:
    def test_of_an_adapter(self, tmp_path: Path) -> None:
        run = run_directory(tmp_path / "run", str(checkpoint("x070")), "pissa")
        models = {}
        for name in ("init", "0", "1"):
            models[name] = write(run / f"adapter-{name}.safetensors", config=CONFIGS["pissa"])
        assert torch.equal(logits(rookery.load(run, dtype=torch.float32)), logits(models["1"]))
        models["final"] = write(run / "adapter-final.safetensors", config=CONFIGS["pissa"])
        write(run / "adapter-2.safetensors", config=CONFIGS["pissa"])
        assert torch.equal(logits(rookery.load(run, dtype=torch.float32)), logits(models["final"]))
        both = rookery.load(checkpoint("x070"), dtype=torch.float32, adapter=run)
        assert torch.equal(logits(both), logits(models["final"]))

    def test_of_an_adapter_that_was_interrupted(self, tmp_path: Path) -> None:
        """Its checkpoint holds what trains; the factors that a PiSSA began with are in adapter-init."""
        run = run_directory(tmp_path / "run", str(checkpoint("x070")), "pissa")
        config = replace(CONFIGS["pissa"], train_parts=("ln",))
        model = write(run / "adapter-init.safetensors", config=config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * noise(parameter))
        folder = run / "checkpoints" / "step-00000007"
        folder.mkdir(parents=True)
        masters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        assert "blocks.0.att.key.adapters.default.lora_A" in masters
        save_file(masters, folder / "weights.safetensors")
        assert torch.equal(logits(rookery.load(run, dtype=torch.float32)), logits(model))

    def test_of_a_state(self, tmp_path: Path) -> None:
        run = run_directory(tmp_path / "run", str(checkpoint("x070")), "state")
        state = GOLDEN / "x070_time_state.safetensors"
        write_pth(run / "rwkv-final.pth", read_weights(state))
        wanted = rookery.load(checkpoint("x070"), dtype=torch.float32, state=state)
        assert torch.equal(logits(rookery.load(run, dtype=torch.float32)), logits(wanted))

    def test_whose_base_is_gone(self, tmp_path: Path) -> None:
        run = run_directory(tmp_path / "run", "gone.pth", "lora")
        write(run / "adapter-final.safetensors")
        with pytest.raises(UserError, match=r"only what was trained on gone.pth, which is no longer there"):
            rookery.load(run)
        (run / "gone.pth").write_bytes(b"")  # found beside, and damaged
        with pytest.raises(UserError, match=r"run.gone.pth is damaged"):
            rookery.load(run)
