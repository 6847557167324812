"""`rookery chat` as a person and as a pipe see it."""

from __future__ import annotations

import io
import json
import os
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from command import COMMAND, environment
from safetensors import safe_open
from safetensors.torch import save_file

from rookery import formats
from rookery.adapters import AdapterConfig, adapter_tensors, attach
from rookery.cli.chat import Terminal, taken
from rookery.errors import UserError
from rookery.formats import read_weights, write_adapter, write_pth
from rookery.infer import Conversation, Sampling, Template, form_of, open_form, open_model, read
from rookery.models import ModelShape, create, initialise

posix = pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are POSIX")


class Person:
    """Somebody at a terminal: types, waits for what should appear, presses keys."""

    CTRL_C, CTRL_D = "\x03", "\x04"

    def __init__(self, *args: object, cwd: Path | None = None) -> None:
        import pty

        self.screen = ""
        self.read_to = 0
        self._terminal, other = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, args)],
            stdin=other,
            stdout=other,
            stderr=other,
            env=environment() | {"TERM": "dumb"},
            cwd=cwd,
            start_new_session=True,
            preexec_fn=self._take_terminal,
        )
        os.close(other)

    @staticmethod
    def _take_terminal() -> None:
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """The next match of `pattern` on the screen, after the one before."""
        end = time.monotonic() + seconds
        while not (match := re.compile(pattern, re.S).search(self.screen, self.read_to)):
            assert time.monotonic() < end, f"no {pattern!r} in:\n{self.screen}"
            if select.select([self._terminal], [], [], 0.1)[0]:
                try:
                    data = os.read(self._terminal, 65536)
                except OSError:
                    data = b""
                assert data, f"the program ended without {pattern!r}:\n{self.screen}"
                self.screen += data.decode("utf-8", "replace").replace("\r\n", "\n")
        self.read_to = match.end()
        return match

    def press(self, key: str, pattern: str) -> None:
        """Press `key`, again where nothing came of it: while it prints its prompt, readline hears of no Ctrl-C before
        the next key."""
        for _attempt in range(5):
            self.type(key)
            try:
                self.wait_for(pattern, 10)
            except AssertionError:
                continue
            return
        raise AssertionError(f"no {pattern!r} in:\n{self.screen}")

    def leaves(self) -> int:
        return self.process.wait(30)


@pytest.fixture(scope="module")
def babbler(tmp_path_factory) -> Path:
    """A model of the World vocabulary with random weights, a tuned state for it and an adapter."""
    folder = tmp_path_factory.mktemp("babbler")
    shape = ModelShape("x070", 2, 32, 65536, 16, 32, 128, dict.fromkeys("wavg", 16))
    model = create(shape)
    initialise(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "ln" not in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    write_pth(folder / "model.pth", model.state_dict())
    states = {f"blocks.{i}.att.time_state": torch.randn(2, 16, 16, generator=generator) for i in range(2)}
    write_pth(folder / "state.pth", states)
    base = formats.Base.of(model.state_dict(), folder / "model.pth")
    attach(model, AdapterConfig("lora", r=4, alpha=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5, generator=generator)
    write_adapter(folder / "adapter.safetensors", adapter_tensors(model), AdapterConfig("lora", r=4, alpha=8), base)
    return folder


def test_a_pipe_gets_one_answer_a_line(rookery, talker) -> None:
    done = rookery("chat", talker, "--max_tokens", 12, text="1+2=?\n\n三+四=?\n你好")
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == 3
    assert all(answers)


def test_a_file_beside_its_vocabulary_is_the_same_model(rookery, talker, tmp_path) -> None:
    save_file(read_weights(talker), tmp_path / "model.safetensors")
    shutil.copy(talker / "vocab.json", tmp_path)
    answers = {
        rookery("chat", file, "--max-tokens", 8, text="1+1\n").stdout
        for file in (talker, tmp_path / "model.safetensors")
    }
    assert len(answers) == 1
    assert len(answers.pop().strip()) == 8


def test_the_best_of_a_run_is_pointed_out(talker, tmp_path) -> None:
    assert taken(talker / "rwkv-final.pth", []) == [], "a file is what it is"
    assert taken(talker, []) == [f"Weights: {talker / 'rwkv-final.pth'}"]
    shutil.copy(talker / "rwkv-final.pth", tmp_path)
    shutil.copy(talker / "rwkv-final.pth", tmp_path / "best.pth")
    lines = taken(tmp_path, [Path("adapter.safetensors")])
    assert lines[0] == f"Weights: {tmp_path / 'rwkv-final.pth'} + adapter.safetensors"
    assert lines[1] == f"The validation loss was lowest with {tmp_path / 'best.pth'}."


def test_options_change_the_answer_as_they_say(rookery, talker) -> None:
    def answer(*options: object) -> str:
        done = rookery("chat", talker, "--max-tokens", 16, *options, text="1\n")
        assert done.returncode == 0, done.stderr
        return done.stdout

    plain = answer()
    drawn = answer("--temperature", 2, "--top-p", 1, "--seed", 1)
    assert answer("--temperature", 2, "--top-p", 1, "--seed", 1) == drawn != plain
    assert answer("--greedy", "--seed", 5) == plain
    assert answer("--system", "3+3") != plain


@pytest.mark.parametrize(
    ("args", "text", "message"),
    [
        (["absent"], "", "absent does not exist"),
        (["{talker}", "--top-p", "3"], "1", "top_p is 3.0"),
        (["{talker}", "--think", "hard"], "1", "--think hard: expected one of none, quick"),
        (["{talker}", "--dtype", "int3"], "1", "int3 is none of auto, fp32"),
        (["{talker}", "--device", "tpu"], "1", "There is no device tpu here that PyTorch can use, only auto, cpu"),
        (["{talker}", "--load", "absent"], "1", "Cannot read the conversation absent"),
        (["{talker}", "--tokenizer", "world"], "1", "belongs to another model"),
        (["{lonely}"], "1", "--tokenizer FILE"),
        (["{talker}"], "1\nwhat\n", "Line 2: the character 'w'"),
    ],
)
def test_bad_input_is_one_message(rookery, talker, tmp_path, args, text, message) -> None:
    shutil.copy(talker / "rwkv-final.pth", tmp_path)
    done = rookery("chat", *(arg.format(talker=talker, lonely=tmp_path) for arg in args), text=text, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_mounted_changes_the_answer(rookery, babbler) -> None:
    def answer(*options: object) -> str:
        done = rookery("chat", babbler / "model.pth", "--greedy", "--max-tokens", 8, *options, text="Hello\n")
        assert done.returncode == 0, done.stderr
        return done.stdout

    mounted = [["--state", babbler / "state.pth"], ["--adapter", babbler / "adapter.safetensors"]]
    plain = answer()
    answers = {plain, *(answer(*options) for options in mounted), answer(*mounted[0], *mounted[1])}
    assert len(answers) == 4
    beginning = plain.strip()[:6]
    assert answer("--stop", beginning[2:4]).strip() == beginning[:2]
    assert answer("--template", "qa") != plain


def test_a_g1_model_thinks_as_told(rookery, babbler) -> None:
    for mode, beginning in (("think", "<think"), ("quick", "<think>\n</think")):
        done = rookery("chat", babbler / "model.pth", "--think", mode, "--max-tokens", 4, text="Hi\n")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(beginning)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_smaller_weights_and_figures(rookery, babbler, dtype) -> None:
    done = rookery("chat", babbler / "model.pth", "--dtype", dtype, "--max-tokens", 5, "--stats", text="Hi\nHo\n")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"\d+ tokens read in [\d.]+ s, \d+ a second; 5 generated, [\d.]+ a second", done.stderr)) == 2


@posix
def test_a_conversation_in_a_terminal(talker, tmp_path) -> None:
    person = Person("chat", talker, "--max-tokens", 20, cwd=tmp_path)
    person.wait_for(rf"/help lists.*Weights: {talker / 'rwkv-final.pth'}\n.*User: ")
    person.type("/state\n")
    person.wait_for("nothing was said yet.*User: ")
    person.type("/save early.safetensors\n")
    person.wait_for("nothing to save.*User: ")
    person.type("一+1=?\n")
    first = person.wait_for(r"Assistant: (\S[^\n]*)\n\nUser: ")[1]
    assert len(first) == 20
    person.type("/state\n")
    match = person.wait_for(r"(\d+) tokens so far.*wkv 2 × 1 × 64 × 64.*0  wkv +([\d.]+).*1  wkv.*User: ")
    assert int(match[1]) == len("User: 一+1=?\n\nAssistant:") + 20
    assert float(match[2]) > 0
    person.type("/save kept\n")
    person.wait_for("Saved in kept.*User: ")
    person.type("/save said.txt\n")
    person.wait_for("Saved in said.txt.*User: ")
    person.type("2\n")
    second = person.wait_for(r"Assistant: (\S[^\n]*)\n\nUser: ")[1]
    person.type("/reset\n")
    person.wait_for("begins anew.*User: ")
    person.type("一+1=?\n")
    assert person.wait_for(r"Assistant: (\S[^\n]*)\n\nUser: ")[1] == first
    person.type("/load kept\n")
    person.wait_for("after 2 messages.*User: ")
    person.type("2\n")
    assert person.wait_for(r"Assistant: (\S[^\n]*)\n\nUser: ")[1] == second
    person.type("/sate\n")
    person.wait_for("no command /sate.*Did you mean /s[ta]")
    person.type("/help\n")
    for command in (
        "/reset",
        "/again",
        "/history",
        "/save",
        "/load",
        "/system",
        "/think",
        "/set",
        "/speed",
        "/state",
        "/help",
        "/exit",
    ):
        person.wait_for(command)
    person.type("what?\n")
    person.wait_for("character 'w'.*User: ")
    person.type("/save\n")
    person.wait_for("needs the name of a file.*User: ")
    person.type("/load absent\n")
    person.wait_for("Cannot read the conversation absent.*User: ")
    for place in ("absent/kept", "absent/said.txt", "."):
        person.type(f"/save {place}\n")
        person.wait_for(f"Cannot write {place}: .*User: ")
    person.type("/exit\n")
    assert person.leaves() == 0

    assert (tmp_path / "said.txt").read_text(encoding="utf-8") == f"User: 一+1=?\n\nAssistant: {first}\n"
    with safe_open(tmp_path / "kept", "pt") as file:
        assert set(file.keys()) == {"att_shift", "wkv", "ffn_shift"}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["kept", "said.txt"]


@posix
def test_messages_of_several_lines_settings_and_another_answer(babbler, tmp_path) -> None:
    person = Person("chat", babbler / "model.pth", "--greedy", "--max-tokens", 4, "--stats", cwd=tmp_path)
    person.wait_for("User: ")
    person.type('"""one\ntwo\n"""\n')
    first = person.wait_for(r"\nAssistant: (.*?)\n\d+ tokens read.*?User: ")[1]
    person.type("/again\n")
    assert person.wait_for(r"\nAssistant: (.*?)\n\d+ tokens read.*?User: ")[1] == first
    person.type("/set temperature 9\n")
    person.type("/set seed 1\n")
    person.type("/set\n")
    person.wait_for(r"temperature +9\.0.*seed +1.*User: ")
    person.type("/again\n")
    assert person.wait_for(r"\nAssistant: (.*?)\n\d+ tokens read.*?User: ")[1] != first
    person.type("three\\\nfour\n")
    person.wait_for(r"4 generated.*User: ")
    person.type("/history\n")
    person.wait_for(r"User: one\ntwo\n\nAssistant: .*User: three\nfour\n\nAssistant: .*User: ")
    person.type("/set top_p lots\n")
    person.wait_for("top_p needs a number, not 'lots'.*User: ")
    person.type("/set colour 1\n")
    person.wait_for("/set colour: expected one of temperature.*User: ")
    person.type("/save kept\n")
    person.wait_for("Saved in kept.*User: ")
    person.type("/system Be brief.\n")
    person.wait_for("begins anew.*User: ")
    person.type("/think quick\n")
    person.wait_for("User: ")
    person.type("Hi\n")
    person.wait_for("\x1b\\[2m<think>\n</think.*User: ")
    person.type("/history\n")
    person.wait_for(r"System: Be brief.\n\nUser: Hi\n\nAssistant: <think>")
    person.type("/exit\n")
    assert person.leaves() == 0

    person = Person("chat", babbler / "model.pth", "--load", "kept", cwd=tmp_path)
    person.wait_for("User: ")
    person.type("/history\n")
    person.wait_for(r"User: one\ntwo\n\nAssistant: .*User: three\nfour\n\nAssistant: .*User: ")
    person.type(person.CTRL_D)
    assert person.leaves() == 0


@posix
def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(talker) -> None:
    person = Person("chat", talker, "--max-tokens", 1000000)
    person.wait_for("User: ")
    person.type("1+1\n")
    person.wait_for(r"Assistant: \S{5,}")
    person.type(person.CTRL_C)
    person.wait_for("\n\nUser: ")
    person.press(person.CTRL_C, "Ctrl-D or /exit leaves.*User: ")
    person.type("/state\n")
    assert int(person.wait_for(r"(\d+) tokens so far.*User: ")[1]) > 20
    person.type(person.CTRL_D)
    assert person.leaves() == 0
    assert "Traceback" not in person.screen


def test_ctrl_c_before_an_answer_begins_keeps_the_conversation(talker, monkeypatch, capsys) -> None:
    """At the first start that takes seconds, in which loops are compiled."""
    form, vocabulary = open_form(talker, device="cpu")
    conversation = Conversation(form, vocabulary)
    encode, interrupts = vocabulary.encode, [KeyboardInterrupt]

    def interrupted(text: str) -> list[int]:
        if interrupts:
            raise interrupts.pop()
        return encode(text)

    monkeypatch.setattr(vocabulary, "encode", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("1+2=?\n3+4=?\n/exit\n"))
    Terminal(talker, conversation, Sampling(temperature=0, max_tokens=5), stats=False).run()
    assert [message.text for message in conversation.messages if message.role == "user"] == ["3+4=?"]
    assert "Assistant:" in capsys.readouterr().out


def test_a_conversation_of_another_model_is_refused(talker, tmp_path) -> None:
    model, vocabulary = open_model(talker)
    conversation = Conversation(form_of(model), vocabulary)
    "".join(conversation.ask("1", Sampling(temperature=0, max_tokens=3)))
    conversation.save(tmp_path / "kept")
    other = create(ModelShape("x070", 3, 64, vocabulary.vocab_size, 64, 64, 256, dict.fromkeys("wavg", 32)))
    initialise(other, 1)
    with pytest.raises(UserError, match="belongs to another model"):
        Conversation(form_of(other), vocabulary).load(tmp_path / "kept")
    for damaged in (b"", b"\x00" * 40, (tmp_path / "kept").read_bytes()[:200]):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(UserError, match="Cannot read"):
            conversation.load(tmp_path / "damaged")
    older = create(ModelShape("x060", 2, 64, vocabulary.vocab_size, 64, 64, 256, {"mix": 8, "decay": 8}))
    initialise(older, 1)
    with pytest.raises(UserError, match="of version x070, and this one is x060"):
        Conversation(form_of(older), vocabulary).load(tmp_path / "kept")
    with safe_open(tmp_path / "kept", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("att_shift", "wkv", "ffn_shift")}
        said = json.loads(file.metadata()["conversation"])
    for change in ({"unread": [1 << 30]}, {"messages": [["nobody", "Hi"]]}, {"template": {}}):
        metadata = {"format": "rookery-conversation", "conversation": json.dumps(said | change)}
        save_file(tensors, tmp_path / "changed", metadata)
        with pytest.raises(UserError, match="Cannot read"):
            conversation.load(tmp_path / "changed")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(UserError, match="not a conversation"):
        conversation.load(tmp_path / "other")


def test_a_conversation_keeps_its_template(talker, tmp_path) -> None:
    model, vocabulary = open_model(talker)
    conversation = Conversation(form_of(model), vocabulary, template=Template("一", "二", "三"))
    "".join(conversation.ask("1", Sampling(temperature=0, max_tokens=3)))
    conversation.save(tmp_path / "kept")
    other = Conversation(form_of(model), vocabulary)
    other.load(tmp_path / "kept")
    assert (other.text(), other.template) == (conversation.text(), conversation.template)


def test_the_carried_state_is_that_of_the_whole_text(talker) -> None:
    """What is carried from turn to turn equals the state after reading the chat as one document."""
    model, vocabulary = open_model(talker)
    conversation = Conversation(form_of(model), vocabulary, system="你好")
    whole = "System: 你好"
    for text in ("1+1", "二+3", "4"):
        "".join(conversation.ask(text, Sampling(temperature=0, max_tokens=9)))
        whole += f"\n\nUser: {text}\n\nAssistant:{conversation.generation.sequence.text}"
    logits, state = read(model, [conversation.unread], conversation.state)
    expected_logits, expected = read(model, [vocabulary.encode(whole)])
    torch.testing.assert_close(logits, expected_logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state.wkv, expected.wkv, rtol=1e-3, atol=1e-4)
    assert conversation.tokens == len(whole)
