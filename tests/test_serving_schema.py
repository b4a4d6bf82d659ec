"""The document of the API against the server: whatever it allows or forbids gets an answer that it describes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")
pytest.importorskip("schemathesis", reason="needs the package schemathesis")

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from export_kit import write_run
from peml.serving import Limits, open_service
from serving_kit import served

EXAMPLES = 40


@pytest.mark.slow
def test_every_answer_is_as_the_document_says(tmp_path: Path) -> None:
    """Status, type and form of answers, to requests that fit the document and to such that do not."""
    service = open_service(write_run(tmp_path, "peml+mtl"), Limits(max_tokens=8, seconds=30), cache_tokens=512)
    with served(service) as server:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
        # A model, a prompt in one of two forms, ids of the vocabulary: what fits is more than the document can say.
        beyond = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]
        modes, wrong = {"get": [GenerationMode.POSITIVE], "post": list(GenerationMode)}, []
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) == 7
        for operation, mode in [(each, mode) for each in operations for mode in modes[each.method]]:

            @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                case.call_and_validate(excluded_checks=beyond)

            try:
                ask()
            except Exception as error:  # all of them are worth knowing
                wrong.append(f"{operation.method} {operation.path}, {mode}: {error}")
        assert not wrong, "\n\n".join(wrong)
        assert server.call("GET", "/health") == (200, {"status": "ok"}) and not service.engine.requests
