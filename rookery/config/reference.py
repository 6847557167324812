"""The reference page of settings and flags, made from the configuration tree and the table of other trainers' flags.

`python -m rookery.config.reference` writes docs/en/flags.md and docs/zh/flags.md; a test proves that they are current.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rookery.config.legacy import LEGACY, TRAINERS
from rookery.config.tree import SECTION_OF, TrainConfig, allowed, leaf_field, section_model
from rookery.i18n import LANGUAGES, _, set_language


def flags_page() -> str:
    """The page in the language in use, as Markdown."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "<!-- python -m rookery.config.reference -->"
    yield "# " + _("Settings and flags of rookery train")
    yield ""
    yield _(
        "Each setting is a flag (`--ctx_len 512` or `--ctx-len 512`) and a key of a TOML recipe under its section. "
        "Flags go over the recipe, the recipe over the defaults. "
        "`rookery train --explain` prints every value and its origin."
    )
    for section in TrainConfig.model_fields:
        model = section_model(section)
        yield f"\n## [{section}]\n"
        yield _(model.__doc__ or "")
        yield ""
        yield from _table_head(_("setting"), _("values"), _("default"), _("meaning"))
        for leaf in model.model_fields:
            field = leaf_field(leaf)
            default = "" if field.default in (None, "", []) else f"`{field.default}`"
            yield _row(f"`{leaf}`", allowed(leaf).replace("|", " "), default, _(field.description or ""))
    yield ""
    yield "## " + _("Flags of other trainers")
    yield ""
    yield _(
        "In an existing script, `python train.py` becomes `rookery train`; every flag of these trainers is understood. "
        "An unknown flag is an error that names the nearest one."
    )
    yield ""
    yield from _table_head(_("flag"), _("trainers"), _("what becomes of it"))
    for name in sorted({name for flags in TRAINERS.values() for name in flags}):
        trainers = ", ".join(trainer for trainer, flags in TRAINERS.items() if name in flags)
        yield _row(f"`--{name}`", trainers, fate(name))


def fate(name: str) -> str:
    """One sentence: what `rookery train` does with a flag of another trainer."""
    flag = LEGACY.get(name)
    if flag is None:
        return _("honoured") if name in SECTION_OF else ""
    said = []
    if flag.leaf == name:
        said.append(_("honoured"))
    elif flag.leaf:
        said.append(_("honoured as --{leaf}", leaf=flag.leaf))
    for old, new in flag.values.items():
        said.append(f"{_code(old)} → {_code(new) if new else _('not given')}")
    for old, (leaf, new) in flag.elsewhere.items():
        said.append(f"{_code(old)} → {_code(f'--{leaf} {new}')}")
    for word, (leaf, name_there) in flag.words.items():
        said.append(f"{_code(word)} → {_code(f'--{leaf} {name_there}')}")
    for leaf, names in flag.adds.items():
        said.append(_("adds {names} to --{leaf}", names=_code(names), leaf=leaf))
    if flag.keys:
        said.append(
            _("its keys with --peft {methods}: ", methods="|".join(flag.methods))
            + ", ".join(
                _code(key) if key == leaf else f"{_code(key)} → {_code(leaf)}" for key, leaf in flag.keys.items()
            )
        )
    for leaf, value in flag.defaults.items():
        said.append(_("{leaf} is then {value} when it is not given", leaf=_code(leaf), value=_code(value)))
    if flag.silent and flag.refused:
        said.append(_("{values}: as Rookery does anyway", values=", ".join(map(_code, flag.silent))))
    for reason in dict.fromkeys(flag.refusals.values()):
        values = ", ".join(_code(value) for value, why in flag.refusals.items() if why == reason)
        said.append(f"{values} " + _("refused: {answer}").format(answer=_(reason)))
    if flag.answer:
        said.append((_("refused: {answer}") if flag.refused else _("answered: {answer}")).format(answer=_(flag.answer)))
    return "; ".join(said)


def _code(value: str) -> str:
    return f"`{value}`" if value else '`""`'


def _table_head(*titles: str) -> Iterator[str]:
    yield _row(*titles)
    yield _row(*("---" for _title in titles))


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_pages(docs: Path) -> None:
    """Write the page in every language under `docs`."""
    for name in LANGUAGES:
        set_language(name)
        page = docs / name / "flags.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(flags_page(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write_pages(Path(__file__).parents[2] / "docs")
