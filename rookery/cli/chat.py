"""`rookery chat`: talk to a model in the terminal, or through a pipe, one message a line."""

from __future__ import annotations

import difflib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rookery.errors import UserError
from rookery.i18n import N_, _

if TYPE_CHECKING:
    from rookery.infer import Conversation, Sampling


app = typer.Typer(rich_markup_mode=None, add_completion=False)


# As everywhere in the field, --top_p and --top-p are the same.
SETTINGS = {"token_normalize_func": lambda name: name.replace("_", "-")}


@app.command(no_args_is_help=True, context_settings=SETTINGS)
def chat(
    path: Path = typer.Argument(..., metavar="PATH", help="A .pth or .safetensors file, or a run directory"),
    temperature: float = typer.Option(None, help="Larger is more varied; 0 takes the likeliest token"),
    top_p: float = typer.Option(
        None, "--top-p", help="Draw from the likeliest tokens whose probability adds up to this"
    ),
    greedy: bool = typer.Option(False, "--greedy", help="Always take the likeliest token, without penalties"),
    system: str = typer.Option("", help="What the model is told first"),
    max_tokens: int = typer.Option(None, "--max-tokens", help="Longest answer, in tokens"),
    seed: int = typer.Option(None, help="Makes the answers repeatable"),
    tokenizer: str = typer.Option("", help="world or a vocabulary file; found beside the weights when left out"),
    device: str = typer.Option("auto", help="cpu, cuda or auto"),
) -> None:
    """Talk to a model: in the terminal, or one message a line through a pipe."""
    from rookery.infer import Conversation, Sampling, open_model

    model, vocabulary = open_model(path, tokenizer_name=tokenizer, device=device)
    # A model with a vocabulary of its own was trained on a task of its own, which has one right answer.
    likeliest = greedy or (vocabulary.name != "world" and temperature is None and top_p is None)
    sampling = Sampling(temperature=0, alpha_presence=0, alpha_frequency=0) if likeliest else Sampling()
    given: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    sampling = replace(sampling, **{name: value for name, value in given.items() if value is not None})
    conversation = Conversation(model, vocabulary, system)
    if sys.stdin.isatty():
        Terminal(path, conversation, sampling).run()
    else:
        answer_lines(conversation, sampling)


def answer_lines(conversation: Conversation, sampling: Sampling) -> None:
    """Answer every line of standard input.

    Raises:
        UserError: the tokenizer cannot encode a line; its number is named.
    """
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    for number, line in enumerate(sys.stdin, 1):
        if not line.strip():
            continue
        try:
            pieces = conversation.ask(line.strip(), sampling)
        except UserError as error:
            raise UserError(_("Line {number}: {reason}", number=number, reason=error)) from error
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


class Terminal:
    """The conversation as a person sees it: a prompt, streamed answers, commands that begin with a slash."""

    def __init__(self, path: Path, conversation: Conversation, sampling: Sampling) -> None:
        self.path = path
        self.conversation = conversation
        self.sampling = sampling
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/reset": (self.reset, N_("forget the conversation")),
            "/save": (
                self.save,
                N_("FILE: keep the conversation, to go on with /load; in a .txt file, its text alone"),
            ),
            "/load": (self.load, N_("FILE: go on with a conversation that /save kept")),
            "/state": (self.state, N_("show what the model remembers: shape, size and norms of its state")),
            "/help": (self.help, N_("this list")),
            "/exit": (self.exit, N_("leave; so does Ctrl-D (Ctrl-Z and Enter on Windows)")),
        }

    def run(self) -> None:
        """Read and answer until /exit or the end of input."""
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() line editing and history, where the system has it
        print(_("{path}. /help lists the commands; Ctrl-C stops an answer.", path=self.path))
        while True:
            try:
                line = input("\nUser: ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n" + _("Ctrl-D or /exit leaves."), end="")
                continue
            try:
                if line.startswith("/"):
                    self.obey(line)
                elif line:
                    self.answer(line)
            except UserError as error:
                print(error)
            except typer.Exit:
                return

    def answer(self, text: str) -> None:
        """Stream the answer to `text`; Ctrl-C ends it and keeps what was said."""
        pieces = self.conversation.ask(text, self.sampling)
        print("\nAssistant: ", end="", flush=True)
        with on_interrupt(self.conversation.stop):
            for piece in pieces:
                print(piece, end="", flush=True)
        print()

    def obey(self, line: str) -> None:
        """Run a command."""
        name, _space, argument = line.partition(" ")
        if name not in self.commands:
            near = difflib.get_close_matches(name, self.commands, n=1, cutoff=0.4)
            hint = _("Did you mean {name}?", name=near[0]) if near else _("/help lists the commands.")
            raise UserError(_("There is no command {name}. {hint}", name=name, hint=hint))
        self.commands[name][0](argument.strip())

    def reset(self, _argument: str) -> None:
        self.conversation.reset()
        print(_("The conversation begins anew."))

    def save(self, argument: str) -> None:
        self.conversation.save(_file(argument, "/save"))
        print(_("Saved in {path}.", path=argument))

    def load(self, argument: str) -> None:
        self.conversation.load(_file(argument, "/load"))
        print(_("Going on after {n} messages.", n=len(self.conversation.messages)))

    def state(self, _argument: str) -> None:
        state = self.conversation.state
        if state is None:
            print(_("The state is empty: nothing was said yet."))
            return
        layers, _batch, heads, size, _size = state.wkv.shape
        width = state.att_shift.shape[-1]
        parts = (state.att_shift, state.wkv, state.ffn_shift)
        megabytes = sum(part.numel() * part.element_size() for part in parts) / 1e6
        print(
            _(
                "{tokens} tokens so far, in a state of {megabytes:.2f} MB that does not grow:",
                tokens=self.conversation.tokens,
                megabytes=megabytes,
            )
        )
        print(f"  wkv {layers} × {heads} × {size} × {size}, att_shift {layers} × {width}, ffn_shift {layers} × {width}")
        print(_("Norms by layer:"))
        for layer, (attention, matrix, channel) in enumerate(self.conversation.norms()):
            print(f"  {layer:3d}  wkv {matrix:9.3f}  att_shift {attention:8.3f}  ffn_shift {channel:8.3f}")

    def help(self, _argument: str) -> None:
        for name, (_run, about) in self.commands.items():
            print(f"  {name:7} {_(about)}")

    def exit(self, _argument: str) -> None:
        raise typer.Exit


def _file(argument: str, command: str) -> Path:
    if not argument:
        raise UserError(_("{command} needs the name of a file.", command=command))
    return Path(argument).expanduser()


@contextmanager
def on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `action` instead of raising KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, lambda _signal, _frame: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
