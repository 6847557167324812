"""Every recipe runs, shrunk: the same file with small values over it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rookery.formats import read_weights, write_pth
from rookery.models import ModelShape, create, initialise

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
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


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe: Path, rookery, workplace: Path) -> None:
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
