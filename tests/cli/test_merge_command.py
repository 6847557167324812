"""`rookery merge`, and what `rookery inspect` says of adapters, as a person uses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rookery
from rookery.adapters import AdapterConfig, adapter_tensors, attach
from rookery.cli import run
from rookery.formats import AdapterFile, Base, read_weights, write_adapter, write_peft, write_pth

GOLDEN = Path(__file__).parent.parent / "golden"
BASE = GOLDEN / "x070_ckpt.safetensors"
CONFIG = AdapterConfig("lora", r=4, alpha=32.0, targets=("att.key", "ffn.value"))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = rookery.load(BASE, device="cpu", dtype=torch.float32)
    attach(model, CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    file = tmp_path / "adapter.safetensors"
    write_adapter(file, adapter_tensors(model), CONFIG, Base.of(read_weights(BASE), BASE))
    return file


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip()


def facts_of(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_merge_says_what_it_did_and_checked(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged.pth"
    assert run(["merge", str(BASE), str(adapter), "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"{out}: {BASE} with the adapter, 1.6 MB" in shown
    assert "Checked: it changes logits by up to" in shown
    assert read_weights(out).keys() == read_weights(BASE).keys()

    assert run(["merge", str(BASE), str(adapter), "-o", str(out)]) == 2
    assert "exists; --force replaces it" in told(capsys)
    assert run(["--lang", "zh", "merge", str(BASE), str(adapter), "-o", str(out), "--force"]) == 0
    assert "已核对" in capsys.readouterr().out


def test_a_disk_that_is_full(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told by the name that was given, and nothing is left."""
    resource = pytest.importorskip("resource", reason="Windows limits no sizes")
    before, limits = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        for out in (tmp_path / "merged.pth", tmp_path / "merged.safetensors"):
            assert run(["merge", str(BASE), str(adapter), "-o", str(out)]) == 2
            assert told(capsys).endswith(f"cannot write {out}: File too large")
        assert run(["convert", str(BASE), "-o", str(tmp_path / "hf"), "--tokenizer", "none"]) == 2
        assert told(capsys).endswith(f"cannot write {tmp_path / 'hf' / 'model.safetensors'}: File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before


def test_merge_a_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged.safetensors"
    assert run(["merge", str(BASE), str(GOLDEN / "x070_time_state.safetensors"), "-o", str(out)]) == 0
    assert "with the tuned state" in capsys.readouterr().out
    assert facts_of(out, capsys)["state"] == {"layers": 3, "shape": [2, 64, 64]}


def test_an_old_file_needs_its_alpha(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slim = tmp_path / "rwkv-0.pth"
    write_pth(slim, read_weights(adapter))
    words = ["merge", str(BASE), str(slim), "-o", str(tmp_path / "merged.pth")]
    assert run(words) == 2
    assert "does not say its alpha" in told(capsys)
    assert run([*words, "--alpha", "32"]) == 0
    assert run(["merge", str(BASE), str(adapter), "-o", str(tmp_path / "own.pth")]) == 0
    old, own = read_weights(tmp_path / "merged.pth"), read_weights(tmp_path / "own.pth")
    assert all(torch.equal(old[name], own[name]) for name in own)
    capsys.readouterr()
    assert run(["merge", str(BASE), str(adapter), "-o", str(tmp_path / "other.pth"), "--alpha", "16"]) == 2
    assert "itself says that its alpha is 32.0; leave yours out" in told(capsys)


@pytest.mark.parametrize("content", [b"", b"no adapter\n", b"PK\x03\x04 cut short", bytes(range(256)) * 8])
@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".st"])
def test_damaged_files(content: bytes, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / f"broken{ending}"
    broken.write_bytes(content)
    out = tmp_path / "merged.pth"
    for base, part in ((BASE, broken), (broken, GOLDEN / "x070_time_state.safetensors")):
        assert run(["merge", str(base), str(part), "-o", str(out)]) == 2
        shown = told(capsys)
        assert str(broken) in shown
        assert "Traceback" not in shown
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.pth", "ADAPTER"], "nowhere.pth does not exist"),
        (["BASE", "nowhere.pth"], "nowhere.pth does not exist"),
        (["x060_ckpt.safetensors", "ADAPTER"], "not to a model like x060_ckpt.safetensors"),
        (["BASE", "x070_ckpt.safetensors"], "holds no adapter"),
        (["BASE", "ADAPTER", "--pissa-init", "nowhere.pth"], "nowhere.pth does not exist"),
    ],
)
def test_a_mistake_is_told_in_one_message(
    words: list[str], message: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"BASE": str(BASE), "ADAPTER": str(adapter)}
    places |= {name: str(GOLDEN / name) for name in ("x060_ckpt.safetensors", "x070_ckpt.safetensors")}
    assert run(["merge", *[places.get(word, word) for word in words], "-o", str(tmp_path / "out.pth")]) == 2
    shown = told(capsys)
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out.pth").exists()


def test_inspect_an_adapter(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of(adapter, capsys)
    assert facts["kind"] == "adapter"
    for key, value in {"method": "lora", "r": 4, "alpha": 32.0, "modules": ["att.key", "ffn.value"]}.items():
        assert facts["adapter"][key] == value
    assert facts["adapter"]["tool"] == f"rookery {rookery.__version__}"
    assert facts["base"]["file"] == BASE.name
    assert (facts["base"]["version"], facts["base"]["n_layer"]) == ("x070", 3)
    assert run(["inspect", str(adapter)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "x070_ckpt.safetensors" in shown
    assert "alpha 32" in shown

    write_peft(tmp_path / "peft", AdapterFile(adapter, CONFIG, read_weights(adapter)))
    facts = facts_of(tmp_path / "peft", capsys)
    assert (facts["kind"], facts["adapter"]["peft_type"], facts["adapter"]["lora_alpha"]) == ("adapter", "LORA", 32.0)


def test_inspect_the_run_of_a_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = f'[model]\nload_model = {json.dumps(str(BASE))}\n\n[adapter]\npeft = "state"\n'
    (tmp_path / "config.toml").write_text(recipe, encoding="utf-8")
    write_pth(tmp_path / "rwkv-final.pth", read_weights(GOLDEN / "x070_time_state.safetensors"))
    facts = facts_of(tmp_path / "rwkv-final.pth", capsys)
    assert (facts["kind"], facts["base"]) == ("state", {"file": str(BASE)})
    assert run(["inspect", str(tmp_path)]) == 0
    assert BASE.name in capsys.readouterr().out


def test_inspect_the_run_of_an_adapter(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    adapter.rename(run_dir / "adapter-0.safetensors")
    facts = facts_of(run_dir, capsys)
    assert facts["weights"] == ["adapter-0.safetensors"]
    assert facts["model"]["adapter"]["method"] == "lora"


def test_inspect_names_the_optional_parts_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    tensors = load_file(GOLDEN / "optional_headqk_tinyatt.safetensors")
    write_pth(tmp_path / "m.pth", {n.removeprefix("w."): t for n, t in tensors.items() if n.startswith("w.")})
    parts = facts_of(tmp_path / "m.pth", capsys)["parts"]
    assert parts["head_qk"] > 0
    assert parts["tiny_att_dim"] > 0
    assert facts_of(BASE, capsys)["parts"] == {}
