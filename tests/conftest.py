"""What every test shares."""

from __future__ import annotations

import pytest

from rookery import i18n


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are English whatever the language of the machine; a test may choose another one for itself."""
    monkeypatch.setattr(i18n, "_language", "en")
