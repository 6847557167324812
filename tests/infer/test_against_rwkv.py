"""Greedy answers of 200 tokens equal those of the `rwkv` package on the same checkpoint, with and without penalties."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import rookery
from rookery.formats import write_pth
from rookery.infer import PlainForm, Sampling, form_of, generate
from rookery.models import ModelShape, create, initialise

PROGRAM = """
import json, sys
from rwkv.model import RWKV
from rwkv.utils import PIPELINE, PIPELINE_ARGS
pipeline = PIPELINE(RWKV(model=sys.argv[1], strategy="cpu fp32"), "rwkv_vocab_v20230424")
draw, chosen = pipeline.sample_logits, []
def sample_logits(*args, **options):
    chosen.append(draw(*args, **options))
    return chosen[-1]
pipeline.sample_logits = sample_logits
answers = []
for alpha in (0.0, 0.2):
    chosen.clear()
    settings = PIPELINE_ARGS(temperature=0, alpha_presence=alpha, alpha_frequency=alpha)
    text = pipeline.generate(sys.argv[2], 200, settings)
    answers.append([list(chosen), text])
print(json.dumps(answers))
"""

SHAPES = {
    "x052": ({}, 224),
    "x060": ({"mix": 32, "decay": 64}, 224),
    "x070": ({"w": 32, "a": 32, "v": 32, "g": 32}, 256),
}

PROMPT = "User: 从前有一座山，山里有什么？ Tell me 3 things.\n\nAssistant:"


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request, tmp_path_factory):
    ranks, dim_ffn = SHAPES[request.param]
    model = create(ModelShape(request.param, 2, 64, 65536, 64, 64, dim_ffn, ranks))
    initialise(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Decays keep their values: they decide how long something is remembered.
            if parameter.dim() == 2 and "time_decay" not in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    path = tmp_path_factory.mktemp("rwkv") / "model.pth"
    write_pth(path, model.state_dict())
    return request.param, path


def test_greedy_answers_equal_the_rwkv_packages(checkpoint) -> None:
    version, path = checkpoint
    environment = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "1" if version == "x070" else "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(path.with_suffix("")), PROMPT],
        env={**os.environ, **environment, "PYTHONUTF8": "1"},
        check=True,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    theirs = json.loads(done.stdout.splitlines()[-1])
    model = rookery.load(path, device="cpu")
    forms = {PlainForm(model), form_of(model)}
    from rookery.tokenizer import World

    world = World()
    for form in forms:
        for alpha, (tokens, text) in zip((0.0, 0.2), theirs, strict=True):
            sampling = Sampling(
                temperature=0, alpha_presence=alpha, alpha_frequency=alpha, token_stop=(), max_tokens=200
            )
            generation = generate(form, world, world.encode(PROMPT), sampling)
            ours = "".join(generation)
            assert generation.sequence.tokens == tokens
            assert len(set(tokens)) > 20
            assert "\ufffd" in ours or ours == text
