"""`rookery serve`: a model behind OpenAI's API."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import typer

from rookery.cli.chat import taken
from rookery.cli.ui import listen
from rookery.errors import UserError
from rookery.i18n import _
from rookery.serve.mounts import DEFAULT, Mounts

app = typer.Typer(rich_markup_mode=None, add_completion=False)

# As everywhere in the field, --max_tokens and --max-tokens are the same.
SETTINGS = {"token_normalize_func": lambda name: name.replace("_", "-")}

SHORTEST_KEY = 16


@app.command(no_args_is_help=True, context_settings=SETTINGS)
def serve(
    path: Path = typer.Argument(..., metavar="PATH", help="A .pth or .safetensors file, or a run directory"),
    name: str = typer.Option("", help="What clients call the model; its file's or folder's name when left out"),
    host: str = typer.Option(
        "127.0.0.1", help="Address to listen on; any other than this machine's own needs a key, or --no-auth"
    ),
    port: int = typer.Option(8000, min=0, max=65535, help="Port to listen on; 0 = any that is free"),
    api_key: list[str] = typer.Option([], "--api-key", help="A key that clients must show; may be repeated"),
    api_key_file: Path = typer.Option(None, metavar="FILE", help="A file with such keys, one a line"),
    no_auth: bool = typer.Option(False, "--no-auth", help="Let everybody who reaches the address in"),
    allow_host: list[str] = typer.Option(
        [], "--allow-host", help="A further name by which this machine's own address may be asked; may be repeated"
    ),
    allow_origin: list[str] = typer.Option(
        [], "--allow-origin", help="A web site whose pages may ask, as https://example.org; may be repeated"
    ),
    state: list[str] = typer.Option(
        [],
        "--state",
        metavar="[NAME=]FILE",
        help="Mount a tuned state; without a name, requests that name none use it; may be repeated",
    ),
    adapter: list[str] = typer.Option(
        [], "--adapter", metavar="[NAME=]FILE", help="Mount an adapter, likewise; may be repeated"
    ),
    states_dir: Path = typer.Option(None, metavar="DIR", help="Folder whose states clients may mount and unmount"),
    adapters_dir: Path = typer.Option(None, metavar="DIR", help="Folder whose adapters clients may mount and unmount"),
    think: str = typer.Option(
        "none", help="How a G1 model reasons when a request does not say: none, quick, think, bit or lot"
    ),
    slots: int = typer.Option(32, min=1, help="Answers in progress at the same time"),
    queue: int = typer.Option(64, min=0, help="Answers that may wait; beyond, requests are refused at once"),
    max_tokens: int = typer.Option(4096, min=1, help="Longest answer, in tokens"),
    max_prompt: int = typer.Option(32768, min=1, help="Longest prompt, in tokens"),
    max_body: float = typer.Option(4.0, min=0.001, help="Largest request, in MB"),
    timeout: float = typer.Option(600.0, min=0.1, help="Longest time for a request, in seconds"),
    drain: float = typer.Option(30.0, min=0.0, help="Seconds that running answers have when the server ends"),
    cache: int = typer.Option(256, min=0, help="Memory for the states of prompts' beginnings, in MB"),
    tokenizer: str = typer.Option("", help="world or a vocabulary file; found beside the weights when left out"),
    device: str = typer.Option("auto", help="cpu, cuda or auto"),
    dtype: str = typer.Option("auto", help="Format of the weights: fp32, bf16, fp16, int8 or auto"),
) -> None:
    """Serve a model over HTTP with OpenAI's API. Ctrl-C lets running answers finish, a second one cuts them short."""
    from rookery.serve.guard import is_loopback
    from rookery.tokenizer.chat import Thinking

    keys = [*api_key, *(keys_in(api_key_file) if api_key_file else [])]
    for key in keys:
        if len(key) < SHORTEST_KEY:
            raise UserError(_("An API key needs {n} characters at least.", n=SHORTEST_KEY))
    local = is_loopback(host)
    if not (local or keys or no_auth):
        raise UserError(
            _(
                "--host {host} lets other machines in: give --api-key-file FILE (or --api-key KEY), or say --no-auth.",
                host=host,
            )
        )
    for folder in (states_dir, adapters_dir):
        if folder and not folder.is_dir():
            raise UserError(_("{path} is no folder", path=folder))
    if think not in get_args(Thinking):
        raise UserError(_("--think {name}: expected one of {known}", name=think, known=", ".join(get_args(Thinking))))
    tuned, adapted = named(state, "--state"), named(adapter, "--adapter")
    listener = listen(host, port)

    from rookery.infer import Engine, Request, Sampling, open_form
    from rookery.serve.app import create_app
    from rookery.serve.prompts import Prompter
    from rookery.serve.server import Server
    from rookery.serve.service import Limits, Service

    form, vocabulary = open_form(path, device=device, dtype=dtype, tokenizer_name=tokenizer)
    # A model with a vocabulary of its own was trained on a task of its own, which has one right answer.
    own_task = vocabulary.name != "world"
    sampling = (
        Sampling(temperature=0, alpha_presence=0, alpha_frequency=0, max_tokens=max_tokens)
        if own_task
        else Sampling(max_tokens=max_tokens)
    )
    # The service does the refusing.
    engine = Engine(
        form.model, vocabulary, form=form, slots=slots, waiting=2 * (slots + queue), cache_bytes=cache << 20
    )
    states = Mounts(engine.mount_state, engine.unmount_state, states_dir, "--states-dir")
    adapters = Mounts(engine.mount_adapter, engine.unmount_adapter, adapters_dir, "--adapters-dir")
    for mounts, files in ((states, tuned), (adapters, adapted)):
        for shown, file in files:
            mounts.add(shown, file)
    limits = Limits(queue, max_prompt, timeout, int(max_body * 1e6), drain=drain)
    with engine:
        # What the first answer makes the libraries compile is done before anybody waits for it.
        engine.submit(Request([0, 0], replace(sampling, max_tokens=2), reuse=False)).result()
        shown = name or (path if path.is_dir() else path.with_suffix("")).resolve().name
        service = Service(
            engine, shown, Prompter(vocabulary, sampling, cast("Thinking", think)), limits, states, adapters
        )
        hosts = {"localhost", "127.0.0.1", "::1", host, *allow_host} if local else set()
        server = Server(create_app(service, hosts=hosts, origins=allow_origin, keys=keys), service)
        greet(host, listener.getsockname()[1], shown, bool(keys))
        for line in taken(path, []):
            typer.echo(line)
        server.serve_on(listener)
    typer.echo(_("Ended."))


def greet(host: str, port: int, name: str, with_key: bool) -> None:
    """Say where the server is, and a command to try it."""
    place = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{place}:{port}/v1"
    key = ' -H "Authorization: Bearer KEY"' if with_key else ""
    question = '{"messages": [{"role": "user", "content": "Hello"}]}'
    typer.echo(_("{name} is served at {url} (Ctrl-C ends it). Try:", name=name, url=url))
    typer.echo(f"curl {url}/chat/completions -H \"Content-Type: application/json\"{key} -d '{question}'")


def keys_in(file: Path) -> list[str]:
    """The keys of a file, one a line.

    Raises:
        UserError: it cannot be read or holds none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(_("Cannot read {path}: {reason}", path=file, reason=error)) from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise UserError(_("{path} holds no key.", path=file))
    return keys


def named(given: list[str], flag: str) -> list[tuple[str, Path]]:
    """Names and files of a flag that mounts, both checked.

    Raises:
        UserError: a name is none, or there is no such file.
    """
    found = []
    for word in given:
        name, equals, file = word.partition("=")
        if not equals or Path(word).exists():
            name, file = DEFAULT, word
        if not re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", name):
            raise UserError(_("{flag} {word}: a name has letters, digits, _ . and - only", flag=flag, word=word))
        if not Path(file).exists():
            raise UserError(_("{path} does not exist", path=file))
        found.append((name, Path(file)))
    return found
