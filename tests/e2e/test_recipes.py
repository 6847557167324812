"""Every recipe runs: those of pretraining shrunk, with small values over them; those of fine-tuning as they are, on the
model of the demo, which they teach something that it cannot do."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from rookery.formats import read_weights, write_pth
from rookery.models import ModelShape, create, initialise

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
FINE_TUNING = [path for path in RECIPES if "out/demo" in path.read_text(encoding="utf-8")]
PRETRAINING = [path for path in RECIPES if path not in FINE_TUNING]
VOCAB_SIZE = 65536


@pytest.fixture(scope="module")
def workplace(rookery, tmp_path_factory) -> Path:
    """A folder with a data set and a base model."""
    folder = tmp_path_factory.mktemp("recipes")
    lines = [json.dumps({"text": f"User: {i}+1=?\n\nAssistant: {i + 1}"}) for i in range(60)]
    (folder / "my.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert rookery("data", "make", "my.jsonl", 1, 16, "-o", "data/my", cwd=folder).returncode == 0
    model = create(ModelShape("x070", 1, 32, VOCAB_SIZE, 32, 32, 128, dict.fromkeys("wavg", 32)))
    initialise(model, 0)
    write_pth(folder / "base.pth", {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()})
    return folder


@pytest.mark.parametrize("recipe", PRETRAINING, ids=lambda path: path.stem)
def test_pretraining(recipe: Path, rookery, workplace: Path) -> None:
    begins_from_a_model = "load_model" in recipe.read_text(encoding="utf-8")
    shape = ["--load_model", "base.pth"] if begins_from_a_model else ["--n_layer", 1, "--n_embd", 32, "--head_size", 32]
    out = workplace / recipe.stem
    small = ["--data_file", "data/my", "--ctx_len", 16, "--micro_bsz", 2, "--my_exit_tokens", 96, "--proj_dir", out]
    done = rookery("train", recipe, *shape, *small, cwd=workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    begun = read_weights(workplace / "base.pth" if begins_from_a_model else out / "rwkv-init.pth")
    trained = read_weights(out / "rwkv-final.pth")
    assert trained.keys() == begun.keys()
    assert any(not torch.equal(trained[name], begun[name]) for name in begun)


def tutorial(language: str) -> dict[str, list[str]]:
    """Heading -> commands of docs/*/fine-tuning.md, by the order of the headings."""
    text = (ROOT / "docs" / language / "fine-tuning.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    return {
        section.split("\n", 1)[0]: "".join(
            re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        ).splitlines()
        for section in sections
    }


TUTORIAL = tutorial("en")
METHODS = {title: commands for title, commands in TUTORIAL.items() if any(" train " in line for line in commands)}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder with the recipes, and the model of `rookery demo` in out/demo (rounded to bf16)."""
    folder = tmp_path_factory.mktemp("tuning")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copytree(ROOT / "tests" / "golden" / "demo", folder / "out" / "demo")
    return folder


def test_the_tutorial_has_every_recipe_in_both_languages() -> None:
    named = {word for commands in METHODS.values() for line in commands for word in line.split() if ".toml" in word}
    assert named == {f"recipes/{path.name}" for path in FINE_TUNING}
    assert [*tutorial("zh").values()] == [*TUTORIAL.values()]


def exact(file: Path) -> float:
    """Share of right answers in a file of `rookery eval -o`."""
    return json.loads(file.read_text(encoding="utf-8"))["answers"]["exact"]


@pytest.fixture(scope="module")
def before(rookery, clone: Path) -> float:
    """Right answers of the model as it is, by the first commands of the tutorial."""
    demo, *commands = next(iter(TUTORIAL.values()))
    assert demo == "rookery demo"
    for line in commands:
        done = rookery(*shlex.split(line)[1:], cwd=clone)
        assert done.returncode == 0, done.stdout + done.stderr
    return exact(clone / "out" / "before.json")


@pytest.mark.parametrize("title", METHODS)
def test_the_tutorial_teaches_by(title: str, rookery, clone: Path, before: float) -> None:
    for line in METHODS[title]:
        done = rookery(*shlex.split(line)[1:], cwd=clone)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert before < 0.05
    out = clone / re.search(r"out/\w+", METHODS[title][1])[0]
    assert exact(out / "eval.json") > 0.35
    if len(METHODS[title]) > 2:
        # The base is bf16, and so is what is merged into it.
        assert exact(out / "merged.json") == pytest.approx(exact(out / "eval.json"), abs=0.06)
