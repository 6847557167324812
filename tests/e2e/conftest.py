"""The real command in a real process, and a small model to talk to."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from command import COMMAND, environment

from rookery.formats import write_pth
from rookery.models import ModelShape, create, initialise
from rookery.tokenizer import Character


@pytest.fixture(scope="session")
def rookery():
    """Runs `rookery ARGS`, with `text` on its standard input, to its end."""

    def run(*args: object, text: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, args)],
            input=text,
            capture_output=True,
            encoding="utf-8",
            env=environment(),
            cwd=cwd,
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def talker(tmp_path_factory) -> Path:
    """A run directory with a random model that chatters in a character vocabulary and seldom stops."""
    folder = tmp_path_factory.mktemp("talker")
    vocabulary = Character.build(
        "User: Assistant: System:\n 0123456789+-=?一二三四五六七八九十零你好世界", documents=True
    )
    vocabulary.save(folder / "vocab.json")
    model = create(ModelShape("x070", 2, 64, vocabulary.vocab_size, 64, 64, 256, dict.fromkeys("wavg", 32)))
    initialise(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        newline = vocabulary.encode("\n")[0]
        model.head.weight[newline] = 0
        model.head.weight[vocabulary.end_of_document] = 0
    write_pth(folder / "rwkv-final.pth", model.state_dict())
    return folder
