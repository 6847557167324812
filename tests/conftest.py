"""What every test shares."""

from __future__ import annotations

import os

import pytest

from rookery import i18n

if "PYTEST_XDIST_WORKER" in os.environ:
    # Its share of the cores: threads of several processes that wait for each other by spinning take the time of all.
    # PyTorch, which nothing has imported yet, reads it, and so do the commands that tests start.
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are English whatever the language of the machine; a test may choose another one for itself."""
    monkeypatch.setattr(i18n, "_language", "en")
