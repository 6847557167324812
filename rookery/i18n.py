"""Messages in English and Chinese.

The English sentence is the key: ``_("{path} is empty", path=p)``. The JSON files in ``locale/zh`` (one for each
package) map it to Chinese; a test proves that every sentence passed to ``_`` has its translation.
"""

from __future__ import annotations

import json
import locale
from functools import cache
from importlib import resources

LANGUAGES = ("en", "zh")
_language: str | None = None


def language() -> str:
    """The language in use: the one set by `set_language`, else the system locale's, else English."""
    global _language
    if _language is None:
        name = locale.getlocale()[0] or ""
        _language = "zh" if name.lower().startswith(("zh", "chinese")) else "en"
    return _language


def set_language(name: str) -> None:
    """Choose `"en"` or `"zh"` for this process.

    Raises:
        ValueError: another name.
    """
    global _language
    if name not in LANGUAGES:
        raise ValueError(f"language {name!r} is not one of {', '.join(LANGUAGES)}")
    _language = name


@cache
def catalogue() -> dict[str, str]:
    """English sentence -> Chinese sentence."""
    sentences: dict[str, str] = {}
    for file in resources.files("rookery").joinpath("locale", "zh").iterdir():
        sentences |= json.loads(file.read_text(encoding="utf-8"))
    return sentences


def N_(sentence: str) -> str:
    """Mark a sentence in a table that is translated later, where it is shown, by ``_(entry)``."""
    return sentence


def _(sentence: str, **values: object) -> str:
    """`sentence` in the user's language, with `{name}` places filled from `values`."""
    if language() == "zh":
        sentence = catalogue().get(sentence, sentence)
    return sentence.format(**values) if values else sentence
