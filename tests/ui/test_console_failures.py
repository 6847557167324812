"""The table of failures: stable codes, sentences that exist, pages of the docs that list them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rookery.i18n import catalogue
from rookery.ui import failures

DOCS = Path(__file__).parents[2] / "docs"


def test_codes_are_unique() -> None:
    codes = [failure.code for failure in (*failures.ALL, failures.HIGH_LOSS)]
    assert len(codes) == len(set(codes))


def test_every_sentence_is_still_said() -> None:
    """A sentence that was changed elsewhere would no longer be recognised."""
    known = [sentence for failure in failures.ALL for sentence in failure.sentences]
    assert [sentence for sentence in known if not failures.said(sentence)] == []


@pytest.mark.parametrize("failure", failures.FAILURES, ids=lambda failure: failure.code)
def test_a_failure_is_known_by_its_sentence_in_both_languages(failure: failures.Failure) -> None:
    for sentence in failure.sentences:
        for text in (text for pair in failures.said(sentence) for text in pair):
            assert failures.find(text).code == failure.code, text


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_docs_list_every_code_with_cause_and_remedy(language: str) -> None:
    page = (DOCS / language / "console.md").read_text(encoding="utf-8")
    for failure in (*failures.ALL, failures.HIGH_LOSS):
        row = next((line for line in page.splitlines() if line.startswith(f"| {failure.code} ")), "")
        for text in (failure.cause, failure.remedy):
            assert (catalogue()[text] if language == "zh" else text) in row, failure.code
