"""Vocabularies that lie beside weight files, which have no place for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rookery.formats.load import sources_of
from rookery.tokenizer import Tokenizer, load, save_beside


def vocabulary_file(path: str | Path) -> Path | None:
    """The vocabulary kept with a weight file: `NAME.vocab.json` or `NAME.vocab.txt`, else `vocab.json` or `vocab.txt`
    in its folder or in a run directory; of a run that began with a model, also what is kept with that. None where there
    is none, as for World."""
    stems = []
    for place in dict.fromkeys((Path(path), sources_of(path).base)):
        stems += [place / "vocab"] if place.is_dir() else [_stem(place), place.parent / "vocab"]
    files = (Path(f"{stem}{suffix}") for stem in stems for suffix in (".json", ".txt"))
    return next((file for file in files if file.exists()), None)


def beside(path: str | Path) -> Tokenizer | None:
    """What is in `vocabulary_file`."""
    file = vocabulary_file(path)
    return load(file) if file else None


def carry(tokenizer: Tokenizer, file: Path) -> Path | None:
    """Keep the vocabulary of a weight file with it, where `beside` finds it.

    Returns:
        What was written; None if nothing had to be: World is known, and the folder may have the same vocabulary.
    """
    if not tokenizer.file_suffix or _same(beside(file), tokenizer):
        return None
    save_beside(tokenizer, _stem(file))
    return Path(f"{_stem(file)}{tokenizer.file_suffix}")


def carry_from(source: str | Path, file: Path) -> Path | None:
    """`carry` what is kept with `source` to a file that was made of it."""
    found = beside(source)
    return carry(found, file) if found else None


def _stem(file: Path) -> Path:
    return file.with_name(f"{file.stem}.vocab")


def _same(one: Tokenizer | None, other: Tokenizer) -> bool:
    if one is None or one.vocab_size != other.vocab_size or one.file_suffix != other.file_suffix:
        return False
    return all(map(np.array_equal, one.token_bytes(), other.token_bytes()))
