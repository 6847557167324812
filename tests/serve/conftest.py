"""Two small models, and servers of them."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from serving import TOOLS, Server

from rookery.adapters import AdapterConfig, adapter_tensors, attach, detach
from rookery.formats import Base, write_adapter, write_pth
from rookery.models import Model, ModelShape, create, initialise
from rookery.tokenizer import Character, chat

CHARACTERS = string.printable[:95] + "\n"

DIALOGUES = [
    chat.document([chat.Message("user", "Hi"), chat.Message("assistant", "Hello, 世界! 🐦")]),
    chat.document(
        chat.with_tools(
            [
                chat.Message("user", "1+2?"),
                chat.Message("assistant", "I add.", calls=(chat.Call("add", {"a": 1, "b": 2}),)),
                chat.Message("tool", "3"),
                chat.Message("assistant", "It is 3."),
            ],
            TOOLS,
        )
    ),
    chat.document(
        [
            chat.Message("user", "Why (think a bit)"),
            chat.Message("assistant", "Because.\nSo.", "One.\n\nTwo."),
            chat.Message("user", "Hi"),  # an answer with thoughts ends where somebody else speaks
        ],
        "g1",
    ),
    chat.document([chat.Message("user", "Go"), chat.Message("assistant", "```json\n[1]\n```")]),
]
"""What the clerk knows by heart."""


def build(dialogues: list[str], width: int, seed: int) -> tuple[Model, Character]:
    vocabulary = Character.build("".join(dialogues) + CHARACTERS, documents=True)
    model = create(ModelShape("x070", 1, width, vocabulary.vocab_size, 32, width, 4 * width, dict.fromkeys("wavg", 16)))
    initialise(model, seed)
    return model, vocabulary


def keep(folder: Path, model: Model, vocabulary: Character) -> Path:
    vocabulary.save(folder / "vocab.json")
    write_pth(folder / "rwkv-final.pth", model.state_dict())
    return folder


@pytest.fixture(scope="session")
def clerk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a model that was trained on `DIALOGUES` until it knew them."""
    torch.manual_seed(0)
    model, vocabulary = build(DIALOGUES, 64, 1)
    rows = [vocabulary.encode(text + "\n\n") for text in DIALOGUES]
    tokens = torch.zeros(len(rows), max(map(len, rows)) + 1, dtype=torch.long)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    # What follows the end of a document is not trained.
    targets = torch.where(tokens[:, :-1] > 0, tokens[:, 1:], -100)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.9, 0.99))
    for _step in range(80):
        logits = model(tokens[:, :-1])[0]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    assert loss.detach() < 0.05
    return keep(tmp_path_factory.mktemp("clerk"), model, vocabulary)


@pytest.fixture(scope="session")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a random model that says anything and does not stop, and two states and two adapters."""
    model, vocabulary = build([], 32, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        model.head.weight[[vocabulary.encode("\n")[0], vocabulary.end_of_document]] = 0
    folder = keep(tmp_path_factory.mktemp("babbler"), model, vocabulary)
    states = folder / "states"
    (states / "more").mkdir(parents=True)
    for path in (states / "poet.pth", states / "more" / "clown.pth"):
        write_pth(path, {"blocks.0.att.time_state": torch.randn(1, 32, 32, generator=generator)})
    write_pth(folder / "outside.pth", {"blocks.0.att.time_state": torch.zeros(1, 32, 32)})
    adapters = folder / "adapters"
    adapters.mkdir()
    base = Base.of(model.state_dict(), folder / "rwkv-final.pth")
    for name in ("sailor", "judge"):
        config = AdapterConfig(method="lora", r=4, alpha=8)
        attach(model, config, name)
        tensors = {key: torch.randn(t.shape, generator=generator) for key, t in adapter_tensors(model, name).items()}
        write_adapter(adapters / f"{name}.safetensors", tensors, config, base)
        detach(model, name)
    return folder


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers, which end with the test."""
    started: list[Server] = []

    def start(*args: object, key: str = "unused") -> Server:
        started.append(Server(*args, log=tmp_path / f"{len(started)}.log", key=key))
        return started[-1]

    yield start
    for server in started:
        server.end()


def shared(folder: Path, *args: object) -> Iterator[Server]:
    server = Server(*args, log=folder / "server.log")
    yield server
    assert server.end() == 0
    assert server.errors == ""


@pytest.fixture(scope="session")
def knowing(clerk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the clerk; it must have nothing to complain of in the end."""
    yield from shared(tmp_path_factory.mktemp("knowing"), clerk, "--name", "clerk")


@pytest.fixture(scope="session")
def babbling(babbler: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the babbler, with a state and an adapter; likewise."""
    states = babbler / "states"
    adapters = babbler / "adapters"
    mounts = ["--state", f"poet={states / 'poet.pth'}", "--adapter", f"sailor={adapters / 'sailor.safetensors'}"]
    folders = ["--states-dir", states, "--adapters-dir", adapters]
    limits = ["--max-body", "1", "--slots", "8", "--max-prompt", "300", "--max-tokens", "100000"]
    options = ["--name", "babbler", *mounts, *folders, *limits]
    yield from shared(tmp_path_factory.mktemp("babbling"), babbler, *options)
