"""House rules that no single part can see: import direction, translations, settings that are read, light help."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rookery import i18n
from rookery.cli import COMMANDS, build, load_command
from rookery.config.legacy import LEGACY
from rookery.config.resolve import RANK_LEAVES
from rookery.config.tree import SECTION_OF, TrainConfig, leaf_field, section_model

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rookery"
ORDER = (
    "errors",
    "i18n",
    "config",
    "tokenizer",
    "ops",
    "models",
    "data",
    "quant",
    "adapters",
    "formats",
    "train",
    "infer",
    "eval",
    "serve",
    "ui",
    "bench",
    "cli",
)
"""A package imports only packages that stand before it here."""

ANSWERED_WHEN_RESOLVED = {"strategy"}
"""Settings that `rookery.config.resolve` acts on and nobody behind it: one device needs no strategy, and says so."""

WITHOUT_TORCH = ("errors", "i18n", "config", "ui")

DISPLAYS = (PACKAGE / "train" / "progress.py",)
"""Observers of a run that write to the terminal."""

NOT_FILES = ("os", "archive", "webbrowser")
"""What has an `open` of another meaning."""

SOURCES = sorted(PACKAGE.rglob("*.py"))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def part_of(path: Path) -> str:
    """The package or module directly under rookery/ that `path` belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports inside Rookery are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def calls(path: Path, functions: tuple[str, ...] = (), methods: tuple[str, ...] = ()) -> Iterator[ast.Call]:
    """Calls in a file of a function or method with one of the names."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            is_function = isinstance(node.func, ast.Name) and node.func.id in functions
            is_method = isinstance(node.func, ast.Attribute) and node.func.attr in methods
            if is_function or is_method:
                yield node


def test_imports_point_upward() -> None:
    wrong = []
    for path in SOURCES:
        own = part_of(path)
        if own not in ORDER:
            continue
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] == "rookery" and parts[1] in ORDER and ORDER.index(parts[1]) > ORDER.index(own):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_every_package_has_its_place_in_the_order() -> None:
    assert {part_of(path) for path in SOURCES} <= {*ORDER, "__init__", "__main__"}


def test_torch_stays_out_of_configuration_and_console() -> None:
    heavy = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        if part_of(path) in WITHOUT_TORCH
        for line, name in imports(path)
        if name.split(".")[0] in ("torch", "numba", "triton")
    ]
    assert heavy == []


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["init", "--help"], ["--lang", "zh", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from rookery.cli import run; status = run(sys.argv[1:]);"
        "print(status, sorted({'torch', 'numba', 'numpy', 'triton', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    assert result.stdout.splitlines()[-1] == "0 []", result.stdout + result.stderr


def test_nothing_is_printed_outside_the_command_line() -> None:
    printed = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in SOURCES
        if part_of(path) != "cli" and path not in DISPLAYS
        for call in calls(path, ("print",))
    ]
    assert printed == []


def test_text_files_are_opened_as_utf_8() -> None:
    """Without it, Windows reads and writes them in the code page of the user's language."""
    wrong = []
    for path in SOURCES:
        for call in calls(path, ("open",), ("open", "read_text", "write_text")):
            owner = call.func.value if isinstance(call.func, ast.Attribute) else None
            if isinstance(owner, ast.Name) and (owner.id in NOT_FILES or owner.id[0].isupper()):
                continue
            constants = [a.value for a in call.args if isinstance(a, ast.Constant)]
            constants += [k.value.value for k in call.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
            binary = any(isinstance(c, str) and re.fullmatch(r"[rwxa]b\+?|[rwxa]\+b", c) for c in constants)
            if not binary and not any(keyword.arg == "encoding" for keyword in call.keywords):
                wrong.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert wrong == []


def test_every_setting_is_read() -> None:
    """A leaf of the configuration that no code outside rookery/config reads would be a promise that is not kept."""
    read = {
        node.attr
        for path in SOURCES
        if part_of(path) != "config"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    if any(name.endswith(".RANK_LEAVES") for path in SOURCES if part_of(path) != "config" for _, name in imports(path)):
        read |= set(RANK_LEAVES.values())
    assert sorted(SECTION_OF.keys() - read - ANSWERED_WHEN_RESOLVED) == []


def sentences_in_code() -> dict[str, str]:
    """Sentence -> its place: all literals given to `_`, `N_` or a page's `t`, settings, answers to flags, and help."""
    found: dict[str, str] = {}
    for path in SOURCES:
        for call in calls(path, ("_", "N_")):
            if call.args and isinstance(call.args[0], ast.Constant):
                found[call.args[0].value] = f"{path.relative_to(ROOT)}:{call.lineno}"
    for path in (PACKAGE / "ui" / "static").rglob("*.js"):
        for text in re.findall(r"\bt\(\s*(\"(?:[^\"\\]|\\.)*\")", path.read_text(encoding="utf-8")):
            found[json.loads(text)] = str(path.relative_to(ROOT))
    for leaf in SECTION_OF:
        found[leaf_field(leaf).description or ""] = f"setting {leaf}"
    for section in TrainConfig.model_fields:
        found[section_model(section).__doc__ or ""] = f"section {section}"
    for name, flag in LEGACY.items():
        if flag.answer:
            found[flag.answer] = f"flag {name}"
    for name in COMMANDS:
        found |= dict.fromkeys(help_of(load_command(name)), f"rookery {name} --help")
    found |= {" ".join(text.split()): "rookery --help" for text in help_of(build())}
    found.pop("", None)
    return found


def help_of(command: object) -> Iterator[str]:
    """The help of a command, its options and its subcommands."""
    yield getattr(command, "help", None) or ""
    for parameter in command.params:  # type: ignore[attr-defined]
        yield getattr(parameter, "help", None) or ""
    for subcommand in getattr(command, "commands", {}).values():
        yield from help_of(subcommand)


def test_every_sentence_has_its_translation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(i18n, "_language", "en")
    sentences = sentences_in_code()
    known = i18n.catalogue()
    assert {text: place for text, place in sentences.items() if text not in known} == {}
    assert known.keys() - sentences.keys() == set(), "translations of sentences that no longer exist"


def test_a_translation_keeps_the_places_for_values() -> None:
    def places(text: str) -> list[str]:
        return sorted(set(re.findall(r"(?<!{)\{(\w+)", text)))

    assert [text for text, chinese in i18n.catalogue().items() if places(text) != places(chinese)] == []


def test_a_sentence_has_one_translation() -> None:
    seen: dict[str, str] = {}
    for file in sorted((PACKAGE / "locale" / "zh").glob("*.json")):
        for text, chinese in json.loads(file.read_text(encoding="utf-8")).items():
            assert seen.setdefault(text, chinese) == chinese, f"{file.name}: {text}"
