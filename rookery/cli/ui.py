"""`rookery ui`: the web console."""

from __future__ import annotations

import secrets
import socket
import webbrowser
from contextlib import suppress
from pathlib import Path

import typer

from rookery.errors import UserError
from rookery.i18n import _

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def ui(
    port: int = typer.Option(8520, min=0, max=65535, help="Port to listen on; 0 = any that is free"),
    host: str = typer.Option(
        "127.0.0.1", help="Address to listen on; any other than this machine's own needs the token that is printed"
    ),
    token: str = typer.Option("", help="The token of a console that others can reach; made up when left out"),
    folder: list[Path] = typer.Option(
        [], "--folder", help="A folder with runs, models and data; may be repeated; the current one when left out"
    ),
    open_browser: bool = typer.Option(True, "--open/--no-open", help="Open it in the browser"),
    settings: Path = typer.Option(None, metavar="FILE", help="Where its settings are kept"),
) -> None:
    """Open the web console: train, watch, chat and merge in a browser. Ctrl-C ends it; training goes on."""
    import uvicorn

    from rookery.serve.guard import is_loopback
    from rookery.ui.app import create_app
    from rookery.ui.console import Console
    from rookery.ui.settings import default_file

    folders = folder or [Path.cwd()]
    for place in folders:
        if not place.is_dir():
            raise UserError(_("{path} is no folder", path=place))
    secret = token if is_loopback(host) else token or secrets.token_urlsafe(24)
    listener = listen(host, port)
    console = Console(folders, settings or default_file(), host=host, token=secret)
    server = uvicorn.Server(uvicorn.Config("", log_level="warning", timeout_graceful_shutdown=2))
    server.config.app = create_app(console, ended=lambda: server.should_exit)
    shown = "127.0.0.1" if is_loopback(host) else socket.gethostname() if host in ("0.0.0.0", "::") else host
    address = f"http://{shown}:{listener.getsockname()[1]}/" + (f"?token={secret}" if secret else "")
    typer.echo(_("The console is at {address}", address=address))
    typer.echo(_("Ctrl-C ends the console; training goes on."))
    if open_browser:
        webbrowser.open_new_tab(address)
    with suppress(KeyboardInterrupt):  # Ctrl-C is how it ends
        server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: the port is taken, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    else:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(
            _(
                "cannot listen on {host}:{port}: {reason}. Choose another --port, or end the program that has it.",
                host=host,
                port=port,
                reason=error.strerror or error,
            )
        ) from error
    return listener
