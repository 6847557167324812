"""From a TOML file and command-line words to a configuration that knows where each value came from."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rookery.config.legacy import LEGACY, NOT_GIVEN, LegacyFlag
from rookery.config.origin import Origin, Origins
from rookery.config.tree import SECTION_OF, TrainConfig, choices, leaf_field, section_model, value_type
from rookery.errors import UserError
from rookery.i18n import _


class Parsed(NamedTuple):
    """A configuration, the origin of every leaf, and what is said to the user about flags of other trainers."""

    config: TrainConfig
    origins: Origins
    notes: list[str]


def parse(words: Sequence[str], toml_path: str | Path | None = None) -> Parsed:
    """The configuration of `words` (flags and at most one recipe.toml) over a TOML file over the defaults.

    Args:
        words: command-line words: ``--ctx_len 512``, ``--ctx-len=512``, ``recipe.toml``, ``--config recipe.toml``.
        toml_path: the TOML file, when it is not among `words`.

    Raises:
        UserError: an unknown key or flag, a bad value, a file that cannot be read; the message names the place and the
            nearest valid name or value.
    """
    flags = _Flags(words)
    path = flags.toml_path or toml_path
    values, origins = _read_toml(Path(path)) if path else ({}, {})
    for leaf in flags.withdrawn:
        values.pop(leaf, None)
        origins.pop(leaf, None)
    values |= flags.values
    origins |= flags.origins
    for leaf, (value, flag) in flags.implied.items():
        if leaf not in values and leaf not in flags.withdrawn:
            values[leaf] = _read_value(leaf, value)
            origins[leaf] = Origin("rule", _("as the trainer that has {flag}", flag=flag))
    for leaf in SECTION_OF:
        origins.setdefault(leaf, Origin("default"))
    return Parsed(_validate(values, origins), origins, flags.notes)


class _Flags:
    """What the words of a command line say."""

    def __init__(self, words: Sequence[str]) -> None:
        self.values: dict[str, Any] = {}
        self.origins: Origins = {}
        self.withdrawn: set[str] = set()
        """Leaves that a flag explicitly leaves open, whatever the TOML file says."""
        self.implied: dict[str, tuple[str, str]] = {}
        """Leaf -> the value that a flag brings along when nothing else is said of it, and that flag."""
        self.notes: list[str] = []
        self.toml_path: str | None = None
        self._objects: list[tuple[str, LegacyFlag, dict[str, Any]]] = []
        """Flags whose value is a JSON object; which of them count is known only when all words are read."""
        self._additions: list[tuple[str, LegacyFlag]] = []
        """Flags that add to a list, which is known only then too."""
        for word, values in _split(words):
            self._take(word, values)
        for word, flag in self._additions:
            self._add_words(word, flag)
        for word, flag, content in self._objects:
            self._take_object(word, flag, content)

    def _take(self, word: str, values: list[str]) -> None:
        name = _name(word)
        if not _is_flag(word):
            self._take_file(word)
        elif name == "config":
            self._take_file(values[0])
        elif name in LEGACY and LEGACY[name].keys:
            self._objects.append((word, LEGACY[name], _read_object(word, values[0])))
        elif name in LEGACY and LEGACY[name].words:
            self._take_words(word, LEGACY[name], " ".join(values))
        elif name in LEGACY and LEGACY[name].adds:
            self._additions.append((word, LEGACY[name]))
        elif name in LEGACY:
            self._take_legacy(word, LEGACY[name], values)
        else:
            text = " ".join(values)
            self._set(name, word, text if values or value_type(name) is list else "true", written=text)

    def _take_file(self, word: str) -> None:
        if not word.endswith(".toml"):
            raise UserError(
                _("{word} belongs to no flag; a recipe ends in .toml, and a value with spaces needs quotes", word=word)
            )
        if self.toml_path is not None:
            raise UserError(_("two recipes are given: {first} and {second}", first=self.toml_path, second=word))
        self.toml_path = word

    def _take_legacy(self, word: str, flag: LegacyFlag, values: list[str]) -> None:
        text = " ".join(values)
        said = f"{word} {text}".rstrip() + ": "
        if text.lower() in flag.refusals:
            raise UserError(said + _(flag.refusals[text.lower()]))
        if text in flag.elsewhere:
            leaf, value = flag.elsewhere[text]
            self._set(leaf, word, value, written=text)
            return
        respelt = flag.values.get(text, text)
        if flag.answer and text.lower() not in flag.silent and (not flag.leaf or respelt != text):
            if flag.refused:
                raise UserError(said + _(flag.answer))
            self.notes.append(said + _(flag.answer))
        if flag.leaf and respelt is not None:
            self._set(flag.leaf, word, respelt, written=text)
        self.implied |= {leaf: (value, word) for leaf, value in flag.defaults.items()}

    def _take_words(self, word: str, flag: LegacyFlag, text: str) -> None:
        """A list that is divided among several leaves."""
        lists: dict[str, list[str]] = {leaf: [] for leaf, _name in flag.words.values()}
        for choice in text.split(","):
            if choice.strip() not in flag.words:
                raise UserError(
                    _("{flag} takes {known}, and no {value}", flag=word, known=", ".join(flag.words), value=choice)
                )
            leaf, name = flag.words[choice.strip()]
            lists[leaf].append(name)
        for leaf, names in lists.items():
            self._set(leaf, word, " ".join(names), written=text)

    def _add_words(self, word: str, flag: LegacyFlag) -> None:
        for leaf, names in flag.adds.items():
            given = self.values.get(leaf)
            if given is None and leaf in self.implied:
                given = _read_value(leaf, self.implied[leaf][0])
            self._set(leaf, word, " ".join([*(given or []), names]), written="")

    def _take_object(self, word: str, flag: LegacyFlag, content: dict[str, Any]) -> None:
        """The settings of a JSON object, if they belong to the method that `peft` asks for."""
        if self.values.get("peft") not in flag.methods and (self.toml_path is None or "peft" in self.values):
            self.notes.append(f"{word}: " + _("it only matters with --peft {methods}", methods="|".join(flag.methods)))
            return
        for key, value in content.items():
            if key not in flag.keys:
                raise UserError(
                    _("{flag} has the keys {keys}, and no {key}", flag=word, keys=", ".join(flag.keys), key=key)
                )
            written = value if isinstance(value, str) else json.dumps(value)
            self._set(flag.keys[key], f"{word} {key}", written)

    def _set(self, leaf: str, word: str, text: str, written: str | None = None) -> None:
        if text == NOT_GIVEN and leaf_field(leaf).default != "" and value_type(leaf) is not list:
            self.values.pop(leaf, None)
            self.origins.pop(leaf, None)
            self.withdrawn.add(leaf)
            return
        self.values[leaf] = _read_value(leaf, text)
        self.origins[leaf] = Origin("flag", f"{word} {text if written is None else written}".rstrip())
        self.withdrawn.discard(leaf)


def _name(word: str) -> str:
    return word.lstrip("-").replace("-", "_")


def _split(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the words that are its values; a word that is no value stands alone."""
    at = 0
    while at < len(words):
        word, equals, joined = words[at].partition("=")
        at += 1
        if not _is_flag(word):
            yield words[at - 1], []
            continue
        arity = _arity(word)
        following = [joined] if equals else []
        while not equals and at < len(words) and not _is_flag(words[at]):
            if arity == "none" or (following and arity != "many") or (arity == "optional" and _is_recipe(words[at])):
                break
            following.append(words[at])
            at += 1
        if not following and arity == "one":
            raise UserError(_("{flag} needs a value", flag=word))
        yield word, following


def _is_flag(word: str) -> bool:
    """Whether `word` is a flag and not a value: -1 and -1e-3 are values."""
    return re.match(r"--?[A-Za-z]", word) is not None


def _is_recipe(word: str) -> bool:
    return word.endswith(".toml")


def _arity(word: str) -> str:
    name = _name(word)
    if name == "config":
        return "one"
    if name in LEGACY:
        return LEGACY[name].arity
    if name in SECTION_OF:
        return {bool: "optional", list: "many"}.get(value_type(name), "one")
    known = [*SECTION_OF, *LEGACY]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if nearest:
        raise UserError(
            _("{flag} is not a flag of rookery train; did you mean --{nearest}?", flag=word, nearest=nearest[0])
        )
    raise UserError(_("{flag} is not a flag of rookery train; `rookery train --help` lists them", flag=word))


def _read_value(leaf: str, text: str) -> Any:
    """The words of a flag as what TOML would hold; what cannot be read is left for validation to refuse."""
    kind = value_type(leaf)
    if kind is dict:
        try:
            return json.loads(text)
        except ValueError:
            return text
    if kind is list:
        return re.findall(r"[^\s,\[\]\"']+", text)
    if kind is int and choices(leaf):
        return int(text) if re.fullmatch(r"-?\d+", text) else text
    return text


def _read_object(word: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(_("{flag} must be a JSON object in quotes; it is {text}", flag=word, text=text))
    return content


def _read_toml(path: Path) -> tuple[dict[str, Any], Origins]:
    """Leaf values of a recipe and their origins ``file:line``."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(_("{path} does not exist", path=path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(_("{path} cannot be read: {error}", path=path, error=error)) from None
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(_("{path} is not valid TOML: {error}", path=path, error=error)) from None

    lines = _toml_lines(text)
    values: dict[str, Any] = {}
    origins: Origins = {}
    for key, value in document.items():
        table = value if key in TrainConfig.model_fields else None
        if table is not None and not isinstance(table, dict):
            place = _place(path, lines, None, key)
            raise UserError(
                _("{place}: {key} is a section: write [{key}] and its settings below", place=place, key=key)
            )
        for leaf, leaf_value in {key: value}.items() if table is None else table.items():
            section = None if table is None else key
            place = _place(path, lines, section, leaf)
            _check_key(leaf, section, place)
            if leaf in values:
                raise UserError(_("{place}: {key} is given twice", place=place, key=leaf))
            values[leaf] = leaf_value
            origins[leaf] = Origin("toml", place)
    return values, origins


def _check_key(leaf: str, section: str | None, place: str) -> None:
    if leaf in SECTION_OF and section in (None, SECTION_OF[leaf]):
        return
    if leaf in SECTION_OF:
        raise UserError(
            _(
                "{place}: {key} belongs in [{right}], not in [{wrong}]",
                place=place,
                key=leaf,
                right=SECTION_OF[leaf],
                wrong=section,
            )
        )
    renamed = LEGACY[leaf].leaf if leaf in LEGACY else ""
    known = [*TrainConfig.model_fields, *SECTION_OF] if section is None else list(section_model(section).model_fields)
    nearest = [renamed] if renamed else difflib.get_close_matches(leaf, known, n=1, cutoff=0.5)
    nearest = nearest or difflib.get_close_matches(leaf, SECTION_OF, n=1, cutoff=0.5)
    if not nearest:
        raise UserError(
            _("{place}: there is no setting {key}; `rookery train --help` lists them", place=place, key=leaf)
        )
    raise UserError(
        _("{place}: there is no setting {key}; did you mean {nearest}?", place=place, key=leaf, nearest=nearest[0])
    )


def _place(path: Path, lines: dict[tuple[str, ...], int], section: str | None, leaf: str) -> str:
    keys: tuple[str, ...] = (leaf,) if section is None else (section, leaf)
    while keys and keys not in lines:
        keys = keys[:-1]
    return f"{path}:{lines[keys]}" if keys else str(path)


def _toml_lines(text: str) -> dict[tuple[str, ...], int]:
    """Line number of every key path of a valid TOML text, counted from 1. `tomllib` does not keep them."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    quote = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if quote:
            quote = "" if line.count(quote) % 2 else quote
            continue
        header = re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line)
        pair = re.match(r"\s*([^#=\[\s][^=]*?)\s*=", line)
        if header:
            table = _key_path(header[1])
            lines.setdefault(table, number)
        elif pair:
            lines.setdefault(table + _key_path(pair[1]), number)
            quote = next((q for q in ('"""', "'''") if line.count(q) % 2), "")
    return lines


def _key_path(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _validate(values: dict[str, Any], origins: Origins) -> TrainConfig:
    try:
        return TrainConfig(**values)
    except ValidationError as failure:
        problems = [_problem(error, origins) for error in failure.errors()]
        raise UserError("\n".join(dict.fromkeys(problems))) from None


def _problem(error: ErrorDetails, origins: Origins) -> str:
    """One sentence for one fault: the place, the value, what is allowed and the nearest of it."""
    leaf, value = str(error["loc"][1]), error["input"]
    origin = origins[leaf]
    said = f"{origin}" if origin.kind == "flag" else f"{origin}: {leaf} = {value!r}"
    named = choices(leaf)
    limits = error.get("ctx", {})
    kind = error["type"]
    if named:
        allowed = ", ".join(str(choice) for choice in named)
        nearest = difflib.get_close_matches(str(value), [str(choice) for choice in named], n=1, cutoff=0.3)
        if nearest:
            return _(
                "{said}: must be one of {allowed}; did you mean {nearest}?",
                said=said,
                allowed=allowed,
                nearest=nearest[0],
            )
        return _("{said}: must be one of {allowed}", said=said, allowed=allowed)
    if kind == "multiple_of":
        step = limits["multiple_of"]
        below = int(value) // step * step
        nearest = sorted({max(below, step), max(below, 0) + step})
        examples = " / ".join(map(str, nearest))
        return _("{said}: must be a multiple of {step}, such as {examples}", said=said, step=step, examples=examples)
    if kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        limit = f"{next(iter(limits.values())):g}"
        sentence = {
            "greater_than_equal": _("{said}: must be at least {limit}", said=said, limit=limit),
            "greater_than": _("{said}: must be more than {limit}", said=said, limit=limit),
            "less_than_equal": _("{said}: must be at most {limit}", said=said, limit=limit),
            "less_than": _("{said}: must be less than {limit}", said=said, limit=limit),
        }
        return sentence[kind]
    expected = {
        int: _("{said}: must be a whole number, such as {example}", said=said, example=_example(leaf, 12)),
        float: _("{said}: must be a number, such as {example}", said=said, example=_example(leaf, 6e-4)),
        bool: _("{said}: must be true or false", said=said),
        str: _("{said}: must be text", said=said),
        list: _("{said}: must be a list, such as {example}", said=said, example='["att.key", "ffn.value"]'),
        dict: _("{said}: must be JSON, such as {example}", said=said, example='\'{"mask0": "0", "mask1": "1"}\''),
    }
    return expected[value_type(leaf)]


def _example(leaf: str, otherwise: Any) -> Any:
    default = leaf_field(leaf).default
    return otherwise if default is None else default
