"""Adapters of RWKV-PEFT, RWKV Runner and Hugging Face peft, in and out."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rookery
from rookery.adapters import AdapterConfig, adapter_tensors, attach
from rookery.errors import UserError
from rookery.formats import AdapterFile, merge, read_adapter, read_weights, write_adapter, write_peft, write_pth
from rookery.formats.convert import convert
from rookery.models import Model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of transformers, which peft imports
    import peft

GOLDEN = Path(__file__).parent.parent / "golden"
BASE = GOLDEN / "x070_ckpt.safetensors"
TOKENS = torch.arange(20)[None]


def noise(like: Tensor) -> Tensor:
    """The same whenever the shape is the same."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(like.numel()))


@torch.no_grad()
def logits(model: Model) -> Tensor:
    return model.eval()(TOKENS)[0]


def trained(config: AdapterConfig, base: Path = BASE) -> tuple[Model, dict[str, Tensor]]:
    model = rookery.load(base, device="cpu", dtype=torch.float32)
    attach(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * noise(parameter))
    return model, {name: tensor.contiguous().clone() for name, tensor in adapter_tensors(model).items()}


def same_as(model: Model, adapter: AdapterFile, base: Path = BASE) -> None:
    loaded = rookery.load(base, device="cpu", dtype=torch.float32, adapter=adapter)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=2e-4)


LORA = AdapterConfig("lora", r=8, alpha=32.0)


class TestSlimFiles:
    def test_lora_of_rwkv_peft_and_its_alpha(self, tmp_path: Path) -> None:
        model, tensors = trained(replace(LORA, train_parts=("ln",)))
        write_pth(tmp_path / "rwkv-0.pth", tensors)
        with pytest.raises(UserError, match=r"rwkv-0.pth does not say its alpha.*--lora_alpha\); if it is a PiSSA"):
            rookery.load(BASE, adapter=tmp_path / "rwkv-0.pth")
        found = read_adapter(tmp_path / "rwkv-0.pth", alpha=32)
        assert (found.config.method, found.config.r, found.config.alpha) == ("lora", 8, 32.0)
        assert found.base is None
        same_as(model, found)

    def test_what_a_pissa_began_with_is_asked_for_only_where_it_is_not_known(self, tmp_path: Path) -> None:
        """A training that is resumed reads its own file, and the other may be gone."""
        config = AdapterConfig("pissa", r=4)
        model, tensors = trained(config)
        write_adapter(tmp_path / "own.safetensors", tensors, config, None)
        gone = tmp_path / "init_pissa.pth"
        same_as(model, read_adapter(tmp_path / "own.safetensors", pissa_init=gone))
        write_pth(tmp_path / "slim.pth", {name: t for name, t in tensors.items() if "init" not in name})
        with pytest.raises(UserError, match=r"init_pissa.pth does not exist"):
            read_adapter(tmp_path / "slim.pth", pissa_init=gone)

    @pytest.mark.parametrize("version", ["x052", "x060"])
    def test_lora_of_rwkv_runner(self, version: str, tmp_path: Path) -> None:
        """Its parts are of attention only, with time_ and .ln parameters but not ln_out."""
        base = GOLDEN / f"{version}_ckpt.safetensors"
        names = ("receptance", "key", "value", "gate")
        config = replace(LORA, targets=tuple(f"att.{n}" for n in names), train_parts=("time", "ln"))
        model, tensors = trained(config, base)
        for name in ("ln_out.weight", "ln_out.bias"):
            model.get_parameter(name).data = read_weights(base)[name].float()
            del tensors[name]
        write_pth(tmp_path / "rwkv-3.pth", tensors)
        found = read_adapter(tmp_path / "rwkv-3.pth", alpha=32)
        assert found.config.targets == ("att.gate", "att.key", "att.receptance", "att.value")
        same_as(model, found, base)

    @pytest.mark.parametrize("prefix", ["model.", ""])
    def test_pissa_and_what_it_began_with(self, prefix: str, tmp_path: Path) -> None:
        model, tensors = trained(AdapterConfig("pissa", r=8))
        slim = {name: tensor for name, tensor in tensors.items() if "init_" not in name}
        write_pth(tmp_path / "rwkv-0.pth", slim)
        initial = {f"{prefix}{name}": tensor for name, tensor in tensors.items() if "init_" in name}
        write_pth(tmp_path / "init.pth", initial)
        found = read_adapter(tmp_path / "rwkv-0.pth", pissa_init=tmp_path / "init.pth")
        assert (found.config.method, found.config.r) == ("pissa", 8)
        same_as(model, found)
        with pytest.raises(UserError, match="does not hold what a PiSSA began with"):
            read_adapter(tmp_path / "rwkv-0.pth", pissa_init=BASE)

    @pytest.mark.parametrize(
        ("part", "config"),
        [
            ("disha", AdapterConfig("miss", r=8)),
            ("bone", AdapterConfig("miss", r=8)),
            ("disha", AdapterConfig("miss", r=8, miss_mode="bat")),
            ("bone", AdapterConfig("miss", r=8, miss_mode="bat")),
        ],
    )
    def test_miss_under_its_older_names(self, part: str, config: AdapterConfig, tmp_path: Path) -> None:
        model, tensors = trained(config)
        write_pth(tmp_path / "rwkv-0.pth", {name.replace("disha", part): t for name, t in tensors.items()})
        found = read_adapter(tmp_path / "rwkv-0.pth")
        assert (found.config.method, found.config.r, found.config.miss_mode) == ("miss", 8, config.miss_mode)
        same_as(model, found)

    def test_of_web_rwkv(self, tmp_path: Path) -> None:
        model, tensors = trained(LORA)
        for name in tensors:
            model.get_parameter(name.replace(".lora", ".adapters.default.lora")).data = tensors[name].half().float()
        write_pth(tmp_path / "slim.pth", tensors)
        convert(tmp_path / "slim.pth", tmp_path / "slim.st")
        assert "blocks.0.att.key.lora.0" in load_file(tmp_path / "slim.st")
        same_as(model, read_adapter(tmp_path / "slim.st", alpha=32))

    def test_some_blocks_only(self, tmp_path: Path) -> None:
        config = replace(LORA, targets=("blocks.1.att.key", "blocks.2.ffn.value"))
        model, tensors = trained(config)
        write_pth(tmp_path / "slim.pth", tensors)
        found = read_adapter(tmp_path / "slim.pth", alpha=32)
        assert found.config.targets == config.targets
        same_as(model, found)

    def test_parts_that_do_not_go_together(self, tmp_path: Path) -> None:
        _model, tensors = trained(LORA)
        write_pth(tmp_path / "a.pth", tensors | {"blocks.0.att.key.disha": torch.zeros(8, 128)})
        with pytest.raises(UserError, match="do not go together: disha, lora_A, lora_B"):
            read_adapter(tmp_path / "a.pth", alpha=32)
        write_pth(tmp_path / "b.pth", tensors | {"blocks.0.att.key.lora_A": torch.zeros(4, 128)})
        with pytest.raises(UserError, match="do not go together"):
            read_adapter(tmp_path / "b.pth", alpha=32)

    def test_code_is_not_run(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple:
                return os.mkdir, (str(tmp_path / "trapped"),)

        torch.save({"blocks.0.att.key.lora_A": Trap()}, tmp_path / "trap.pth")
        with pytest.raises(UserError, match="would run code when read; it is refused"):
            read_adapter(tmp_path / "trap.pth", alpha=1)
        assert not (tmp_path / "trapped").exists()


TARGETS = ["att.receptance", "key", "value", "output"]


def lora(**more: Any) -> Any:
    return peft.LoraConfig(r=8, lora_alpha=24, target_modules=TARGETS, **more)


def miss(**more: Any) -> Any:
    return peft.MissConfig(r=8, target_modules=TARGETS, **more)


THEIRS = {
    "lora": lora,
    "rslora": partial(lora, use_rslora=True),
    "dora": partial(lora, use_dora=True),
    "pissa": partial(lora, init_lora_weights="pissa"),
    "miss": miss,
    "bat": partial(miss, init_weights="bat"),
    "mini": partial(miss, init_weights="mini", mini_r=16),
}


class Part(nn.Module):
    """What Hugging Face peft sees of a model: the matrices of the base in fp32, under their names."""

    def prepare_inputs_for_generation(self) -> None:
        """Peft asks a language model for this."""

    @classmethod
    def of(cls, base: Path) -> Part:
        model = cls()
        for name, tensor in load_file(base).items():
            *places, matrix, _weight = name.split(".")
            if matrix in ("receptance", "key", "value", "output"):
                place: nn.Module = model
                for part in places:
                    if not hasattr(place, part):
                        place.add_module(part, cls())
                    place = getattr(place, part)
                layer = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
                layer.weight.data = tensor.float()
                place.add_module(matrix, layer)
        return model


def merged_by_them(wrapped: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in wrapped.merge_and_unload().named_parameters()}


def written_by_them(kind: str, folder: Path) -> dict[str, Tensor]:
    """Write a trained adapter of theirs; the matrices that they merge it into."""
    wrapped = peft.get_peft_model(Part.of(BASE), THEIRS[kind]())
    if kind == "pissa":
        wrapped.peft_config["default"].init_lora_weights = True  # as they ask for, so that it loads as it is
        wrapped.save_pretrained(folder / "init")
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * noise(parameter))
    if kind == "pissa":
        wrapped.peft_config["default"].init_lora_weights = "pissa"
        wrapped.save_pretrained(folder / "as_lora", path_initial_model_for_weight_conversion=str(folder / "init"))
    wrapped.save_pretrained(folder)
    return merged_by_them(wrapped)


def merged_into(adapter: AdapterFile, names: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same matrices with the adapter as we merge it."""
    out = adapter.path.parent / "merged.safetensors"
    wide = adapter.path.parent / "wide.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(BASE).items()}, wide)
    merge(wide, adapter, out)
    tensors = load_file(out)
    return {name: tensors[name] for name in names}


@pytest.mark.filterwarnings("ignore")  # peft's own
class TestPeftFolders:
    @pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "miss", "bat", "mini"])
    def test_theirs_is_read(self, kind: str, tmp_path: Path) -> None:
        theirs = written_by_them(kind, tmp_path / "adapter")
        found = read_adapter(tmp_path / "adapter")
        for name, tensor in merged_into(found, theirs).items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)

    def test_a_pissa_of_theirs(self, tmp_path: Path) -> None:
        theirs = written_by_them("pissa", tmp_path / "adapter")
        with pytest.raises(UserError, match="is a PiSSA without what it began with"):
            read_adapter(tmp_path / "adapter")
        found = read_adapter(tmp_path / "adapter", pissa_init=tmp_path / "adapter" / "init")
        assert found.config.method == "pissa"
        for adapter in (found, read_adapter(tmp_path / "adapter" / "as_lora")):
            for name, tensor in merged_into(adapter, theirs).items():
                torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-5)

    @pytest.mark.parametrize(
        "config",
        [
            replace(LORA, rslora=True),
            replace(LORA, method="dora"),
            AdapterConfig("pissa", r=8),
            AdapterConfig("miss", r=8),
            AdapterConfig("miss", r=8, miss_mode="bat_rows"),
        ],
        ids=lambda config: f"{config.method}-{config.miss_mode}",
    )
    def test_ours_is_read_by_them(self, config: AdapterConfig, tmp_path: Path) -> None:
        _model, tensors = trained(config)
        ours = AdapterFile(tmp_path / "adapter", config, tensors)
        write_peft(tmp_path / "adapter", ours)
        theirs = merged_by_them(peft.PeftModel.from_pretrained(Part.of(BASE), tmp_path / "adapter"))
        for name, tensor in merged_into(ours, theirs).items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-5)

    def test_their_names(self, tmp_path: Path) -> None:
        """Names and shapes that peft 0.21.2 gives for the model class of RWKV-PEFT's current revision."""
        wanted = json.loads((GOLDEN / "peft_hf_adapter_keys.json").read_text(encoding="utf-8"))
        for kind, config in (("lora", AdapterConfig("lora", r=4, alpha=8.0)), ("miss", AdapterConfig("miss", r=8))):
            part = "lora_A" if kind == "lora" else "miss_block"
            tensors = {}
            for name, shape in wanted[kind]["keys"].items():
                own = name.removeprefix("base_model.model.").removesuffix(".weight").replace("miss_block", "disha")
                tensors[own] = torch.zeros(shape)
            write_peft(tmp_path / kind, AdapterFile(tmp_path, config, tensors))
            written = load_file(tmp_path / kind / "adapter_model.safetensors")
            assert {name: list(t.shape) for name, t in written.items()} == wanted[kind]["keys"], part
            settings = json.loads((tmp_path / kind / "adapter_config.json").read_text(encoding="utf-8"))
            for key, value in wanted[kind]["adapter_config"].items():
                assert key == "target_modules" or settings[key] == value
            assert read_adapter(tmp_path / kind).tensors.keys() == tensors.keys()

    def test_names_of_flash_linear_attention(self, tmp_path: Path) -> None:
        model, tensors = trained(LORA)
        write_peft(tmp_path / "adapter", AdapterFile(tmp_path, LORA, tensors))
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        renames = {"receptance": "r_proj", "att.key": "att.k_proj", "att.value": "att.v_proj", "output": "o_proj"}
        renames |= {".att.": ".attn.", "model.blocks.": "model.model.layers."}
        renamed = {}
        for name, tensor in load_file(file).items():
            for ours, theirs in renames.items():
                name = name.replace(ours, theirs)
            renamed[name] = tensor
        assert "base_model.model.model.layers.0.attn.k_proj.lora_A.weight" in renamed
        save_file(renamed, file)
        same_as(model, read_adapter(tmp_path / "adapter"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"peft_type": "OFT"}, "is an adapter of kind OFT"),
            ({"rank_pattern": {"att.key": 2}}, "has rank_pattern of its own"),
            ({"r": "x"}, "adapter_config.json cannot be read"),
            ({"lora_alpha": None}, "adapter_config.json cannot be read"),
        ],
    )
    def test_what_is_not_read_is_refused(self, change: dict, message: str, tmp_path: Path) -> None:
        _model, tensors = trained(LORA)
        write_peft(tmp_path, AdapterFile(tmp_path, LORA, tensors))
        settings = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | change), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_adapter(tmp_path)

    def test_what_peft_does_not_have_is_refused(self, tmp_path: Path) -> None:
        config = AdapterConfig("miss", r=8, miss_mode="bat")
        with pytest.raises(UserError, match="bat by columns"):
            write_peft(tmp_path / "a", AdapterFile(tmp_path / "x", config, trained(config)[1]))
        config = replace(LORA, train_parts=("ln",))
        with pytest.raises(UserError, match="also holds base parameters"):
            write_peft(tmp_path / "a", AdapterFile(tmp_path / "x", config, trained(config)[1]))
        assert not (tmp_path / "a").exists()

    def test_another_alpha_is_refused(self, tmp_path: Path) -> None:
        _model, tensors = trained(LORA)
        write_peft(tmp_path / "folder", AdapterFile(Path("own"), LORA, tensors))
        assert read_adapter(tmp_path / "folder", alpha=32.0).config.alpha == 32.0
        with pytest.raises(UserError, match=r"itself says that its alpha is 32.0"):
            read_adapter(tmp_path / "folder", alpha=64.0)

    def test_weights_are_missing(self, tmp_path: Path) -> None:
        _model, tensors = trained(LORA)
        write_peft(tmp_path, AdapterFile(tmp_path, LORA, tensors))
        (tmp_path / "adapter_model.safetensors").unlink()
        with pytest.raises(UserError, match=r"lacks adapter_model\.safetensors"):
            read_adapter(tmp_path)
