"""Every flag of the reference trainers has its answer, and the page that lists them is current."""

from __future__ import annotations

from pathlib import Path

import pytest

from rookery import i18n
from rookery.config import parse
from rookery.config.legacy import LEGACY, TRAINERS
from rookery.config.reference import fate, flags_page
from rookery.config.tree import SECTION_OF
from rookery.errors import UserError

DOCS = Path(__file__).parents[2] / "docs"

ALL_FLAGS = sorted({name for flags in TRAINERS.values() for name in flags})


@pytest.mark.parametrize("name", ALL_FLAGS)
def test_every_flag_of_the_reference_trainers_has_its_answer(name: str) -> None:
    assert name in SECTION_OF or name in LEGACY
    assert fate(name)


@pytest.mark.parametrize("name", LEGACY)
def test_an_entry_makes_sense(name: str) -> None:
    flag = LEGACY[name]
    assert name in ALL_FLAGS, "an entry belongs to a trainer"
    divided = [*flag.elsewhere.values(), *flag.words.values(), *flag.adds.items()]
    leaves = {flag.leaf, *flag.keys.values(), *(leaf for leaf, _value in divided)} - {""}
    assert leaves <= SECTION_OF.keys()
    assert leaves or flag.answer, "a leaf, or an answer"
    assert not (flag.refused and flag.leaf)
    assert [value for value in flag.silent if value != value.lower()] == []
    for spelling in (*flag.values, *flag.elsewhere):
        parse([f"--{name}={spelling}"])
    for value in flag.silent:
        assert parse([f"--{name}={value}"]).notes == []
    if flag.refused:
        with pytest.raises(UserError, match=f"--{name}"):
            parse([f"--{name}", "something"] if flag.arity != "none" else [f"--{name}"])


@pytest.mark.parametrize("language", i18n.LANGUAGES)
def test_the_page_is_current(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(i18n, "_language", language)
    written = (DOCS / language / "flags.md").read_text(encoding="utf-8")
    assert written == flags_page(), "run python -m rookery.config.reference"
