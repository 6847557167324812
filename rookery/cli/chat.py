"""`rookery chat`: talk to a model in the terminal, or through a pipe, one message a line."""

from __future__ import annotations

import difflib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
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

THINKING = ("none", "quick", "think", "bit", "lot")
TEMPLATES = ("chat", "qa", "instruct", "text")

FENCE = '"""'
"""Begins and ends a message of several lines."""

DIM, PLAIN = "\x1b[2m", "\x1b[22m"


@app.command(no_args_is_help=True, context_settings=SETTINGS)
def chat(
    path: Path = typer.Argument(..., metavar="PATH", help="A .pth or .safetensors file, or a run directory"),
    state: Path = typer.Option(None, metavar="FILE", help="A tuned state to start from"),
    adapter: list[Path] = typer.Option([], metavar="FILE", help="An adapter to add; may be given several times"),
    load: Path = typer.Option(None, metavar="FILE", help="Go on with a conversation that /save kept"),
    system: str = typer.Option("", help="What the model is told first"),
    template: str = typer.Option(
        "chat", help="How turns are marked: chat (User, Assistant), qa (Question, Answer), instruct (Instruction, "
        "Response), text (the model continues what you write)"
    ),
    think: str = typer.Option("none", help="How a G1 model reasons: none, quick, think, bit or lot"),
    temperature: float = typer.Option(None, help="Larger is more varied; 0 takes the likeliest token"),
    top_p: float = typer.Option(
        None, "--top-p", help="Draw from the likeliest tokens whose probability adds up to this"
    ),
    top_k: int = typer.Option(None, "--top-k", help="Draw from this many of the likeliest tokens; 0 is all"),
    min_p: float = typer.Option(None, "--min-p", help="Drop tokens less likely than this share of the likeliest"),
    presence: float = typer.Option(None, help="Taken off the logit of every token seen"),
    frequency: float = typer.Option(None, help="Taken off the logit for each time a token was seen"),
    decay: float = typer.Option(None, help="How fast the counts of seen tokens fade; 1 is never"),
    greedy: bool = typer.Option(False, "--greedy", help="Always take the likeliest token, without penalties"),
    stop: list[str] = typer.Option([], metavar="TEXT", help="A text that ends an answer; may be given several times"),
    max_tokens: int = typer.Option(None, "--max-tokens", help="Longest answer, in tokens"),
    seed: int = typer.Option(None, help="Makes the answers repeatable"),
    stats: bool = typer.Option(False, "--stats", help="Say after each answer how fast it was"),
    tokenizer: str = typer.Option("", help="world or a vocabulary file; found beside the weights when left out"),
    device: str = typer.Option("auto", help="cpu, cuda or auto"),
    dtype: str = typer.Option("auto", help="Format of the weights: fp32, bf16, fp16, int8 or auto"),
    any_base: bool = typer.Option(False, "--any-base", help="Accept an adapter that was trained on other weights"),
) -> None:  # fmt: skip
    """Talk to a model: in the terminal, or one message a line through a pipe."""
    from rookery.infer import TEMPLATES as BY_NAME
    from rookery.infer import Conversation, Sampling, open_form

    _one_of("--template", template, TEMPLATES)
    _one_of("--think", think, THINKING)
    form, vocabulary = open_form(
        path, tokenizer_name=tokenizer, device=device, dtype=dtype, state=state, adapter=adapter or None,
        any_base=any_base,
    )  # fmt: skip
    # A model with a vocabulary of its own was trained on a task of its own, which has one right answer.
    likeliest = greedy or (vocabulary.name != "world" and temperature is None and top_p is None)
    sampling = Sampling(temperature=0, alpha_presence=0, alpha_frequency=0) if likeliest else Sampling()
    given: dict[str, Any] = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "alpha_presence": presence,
        "alpha_frequency": frequency, "alpha_decay": decay, "max_tokens": max_tokens, "seed": seed,
        "stop": tuple(stop) or None,
    }  # fmt: skip
    sampling = replace(sampling, **{name: value for name, value in given.items() if value is not None})
    conversation = Conversation(form, vocabulary, system, template=BY_NAME[template], thinking=think)  # type: ignore[arg-type]
    if load is not None:
        conversation.load(load)
    if sys.stdin.isatty():
        Terminal(path, conversation, sampling, stats, taken(path, adapter)).run()
    else:
        answer_lines(conversation, sampling, stats)


def _one_of(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(_("{flag} {value}: expected one of {known}", flag=flag, value=value, known=", ".join(known)))


def taken(path: Path, adapters: Sequence[Path]) -> list[str]:
    """Which files a run directory stands for, and whether another was better when the run measured it."""
    if not path.is_dir():
        return []
    from rookery.formats.load import files_of

    files = [*files_of(path)[: 1 if adapters else None], *adapters]
    lines = [_("Weights: {files}", files=" + ".join(str(file) for file in files))]
    for best, flag in (("best.pth", ""), ("adapter-best.safetensors", "--adapter ")):
        file = path / best
        if file.exists() and file not in files:
            lines.append(_("The validation loss was lowest with {choice}.", choice=f"{flag}{file}"))
    return lines


def answer_lines(conversation: Conversation, sampling: Sampling, stats: bool) -> None:
    """Answer every line of standard input; figures, if wanted, go to standard error.

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
        if stats:
            print(speed(conversation), file=sys.stderr, flush=True)


def speed(conversation: Conversation) -> str:
    """How fast the last answer was.

    Raises:
        UserError: nothing was said yet.
    """
    generation = conversation.generation
    if generation is None:
        raise UserError(_("Nothing was said yet."))
    generated = len(generation.sequence.tokens)
    return _(
        "{read} tokens read in {reading:.2f} s, {rate:.0f} a second; {generated} generated, {answer_rate:.1f} a second",
        read=generation.read,
        reading=generation.prompt_seconds,
        rate=generation.read / max(generation.prompt_seconds, 1e-9),
        generated=generated,
        answer_rate=(generated - 1) / generation.answer_seconds if generation.answer_seconds else 0,
    )


class Terminal:
    """The conversation as a person sees it: a prompt, streamed answers, commands that begin with a slash."""

    def __init__(
        self, path: Path, conversation: Conversation, sampling: Sampling, stats: bool, taken: Sequence[str] = ()
    ) -> None:
        self.path = path
        self.taken = taken
        self.conversation = conversation
        self.sampling = sampling
        self.stats = stats
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/reset": (self.reset, N_("forget the conversation")),
            "/again": (self.again, N_("another answer to the last message")),
            "/history": (self.history, N_("show the conversation")),
            "/save": (
                self.save,
                N_("FILE: keep the conversation, to go on with /load; in a .txt file, its text alone"),
            ),
            "/load": (self.load, N_("FILE: go on with a conversation that /save kept")),
            "/system": (self.system, N_("TEXT: begin anew, with this told first; without TEXT, with nothing")),
            "/think": (self.think, N_("none, quick, think, bit or lot: how a G1 model reasons")),
            "/set": (self.set, N_("NAME VALUE: change a setting; without them, show the settings")),
            "/speed": (self.speed, N_("how fast the last answer was")),
            "/state": (self.state, N_("show what the model remembers: shape, size and norms of its state")),
            "/help": (self.help, N_("this list")),
            "/exit": (self.exit, N_("leave; so does Ctrl-D (Ctrl-Z and Enter on Windows)")),
        }

    def run(self) -> None:
        """Read and answer until /exit or the end of input."""
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() line editing and history, where the system has it
        print(_("{path}. /help lists the commands; Ctrl-C stops an answer.", path=self.path))
        for line in self.taken:
            print(line)
        # What is compiled for this processor the first time is ready by the time a message is written.
        threading.Thread(target=self.conversation.warm_up, daemon=True).start()
        while True:
            try:
                text = read_message(f"\n{self.conversation.template.user or '>'} ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n" + _("Ctrl-D or /exit leaves."), end="")
                continue
            try:
                if text.startswith("/"):
                    self.obey(text)
                elif text:
                    self.answer(self.conversation.ask(text, self.sampling))
            except UserError as error:
                print(error)
            except KeyboardInterrupt:  # before the answer began: nothing was said, the conversation is as it was
                print()
            except typer.Exit:
                return

    def answer(self, pieces: Iterable[str]) -> None:
        """Stream an answer, thoughts dimmed; Ctrl-C ends it and keeps what was said."""
        mark = self.conversation.template.assistant
        print(f"\n{mark} " if mark else "\n", end="", flush=True)
        if self.conversation.thinking != "none" and sys.stdout.isatty():
            pieces = dimmed(pieces)
        with on_interrupt(self.conversation.stop):
            for piece in pieces:
                print(piece, end="", flush=True)
        print()
        if self.stats:
            print(speed(self.conversation))

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

    def again(self, _argument: str) -> None:
        self.answer(self.conversation.again(self.sampling))

    def history(self, _argument: str) -> None:
        print(self.conversation.text() or _("Nothing was said yet."))

    def save(self, argument: str) -> None:
        self.conversation.save(_file(argument, "/save"))
        print(_("Saved in {path}.", path=argument))

    def load(self, argument: str) -> None:
        self.conversation.load(_file(argument, "/load"))
        print(_("Going on after {n} messages.", n=len(self.conversation.messages)))

    def system(self, argument: str) -> None:
        self.conversation.system = argument
        self.reset("")

    def think(self, argument: str) -> None:
        _one_of("/think", argument, THINKING)
        self.conversation.thinking = argument  # type: ignore[assignment]

    def set(self, argument: str) -> None:
        name, _space, text = argument.partition(" ")
        settings = {
            name: value
            for name, value in vars(self.sampling).items()
            if isinstance(value, int | float) or name == "seed"
        }
        if not name:
            for name, value in settings.items():
                print(f"  {name:16} {'-' if value is None else value}")
            return
        _one_of("/set", name, tuple(settings))
        kind = int if name in ("top_k", "max_tokens", "seed") else float
        try:
            number: Any = kind(text)
        except ValueError as error:
            raise UserError(_("{name} needs a number, not {text}", name=name, text=repr(text))) from error
        self.sampling = replace(self.sampling, **{name: number})

    def speed(self, _argument: str) -> None:
        print(speed(self.conversation))

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
            print(f"  {name:9} {_(about)}")
        print(_('A message of several lines stands between lines of """, or each line but the last ends with \\.'))

    def exit(self, _argument: str) -> None:
        raise typer.Exit


def read_message(prompt: str) -> str:
    """What the person writes: a line, lines that end with a backslash and the one after them, or what stands between
    two fences.

    Raises:
        EOFError, KeyboardInterrupt: as `input`.
    """
    line = input(prompt).strip()
    if line.startswith(FENCE):
        lines = [line.removeprefix(FENCE)]
        while not lines[-1].rstrip().endswith(FENCE):
            lines.append(input())
        return "\n".join(lines).rstrip().removesuffix(FENCE).strip()
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(input().rstrip())
    return "\n".join(lines)


def dimmed(pieces: Iterable[str]) -> Iterator[str]:
    """An answer that begins with thoughts, these shown dim."""
    end, last = "</think>", ""
    yield DIM
    for piece in pieces:
        for character in piece:
            yield character
            last = (last + character)[-len(end) :]
            if last == end:
                yield PLAIN
    yield PLAIN


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
