"""Requests made from our own OpenAPI document by schemathesis: valid ones and broken ones.

Every answer must have a status and a form that the document names, no error may be the server's, and what breaks the
document must be refused. A few examples here, always the same; `schemathesis run URL/openapi.json` makes thousands.
"""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from serving import Server

UNKNOWN_TO_THE_DOCUMENT = "positive_data_acceptance"
"""A document cannot say which models and states there are, and which characters a vocabulary has."""


@pytest.fixture(scope="module")
def document(babbler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed")
    options = ["--states-dir", babbler / "states", "--max-tokens", "8", "--queue", "200", "--name", "babbler"]
    server = Server(babbler, *options, log=folder / "log")
    yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    server.wait_until(slots_active=0, queue=0, accepted=0)
    assert server.end() == 0
    assert "Traceback" not in server.errors


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
def test_requests_by_the_document(document, mode) -> None:
    checks = [check for check in CHECKS.get_all() if check.__name__ != UNKNOWN_TO_THE_DOCUMENT]
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) == 13
    for operation in operations:

        @settings(
            max_examples=10, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case) -> None:
            case.call_and_validate(checks=checks, timeout=60)

        if mode is GenerationMode.POSITIVE or operation.body:
            ask()
