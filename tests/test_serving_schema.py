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

EXAMPLES = 60


@pytest.mark.slow
def test_every_answer_is_as_the_document_says(tmp_path: Path) -> None:
    """Status, type and form of answers, to requests that fit the document and to such that do not."""
    service = open_service(write_run(tmp_path, "peml+mtl"), Limits(max_tokens=8, seconds=30), cache_tokens=512)
    with served(service) as server:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
        # A model, a prompt in one of two forms, ids of the vocabulary: what fits is more than the document can say.
        beyond = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]
        count = 0
        for found in schema.get_all_operations():
            operation = found.ok()
            for mode in GenerationMode:
                try:
                    cases = operation.as_strategy(generation_mode=mode)
                    cases.validate()
                except Exception as error:
                    # Of a route that takes nothing there is nothing that does not fit.
                    assert mode == GenerationMode.NEGATIVE and operation.method == "get", error
                    continue

                @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
                @given(case=cases)
                def ask(case: schemathesis.Case) -> None:
                    case.call_and_validate(excluded_checks=beyond)

                ask()
                count += 1
        assert count >= 8
        assert server.call("GET", "/health") == (200, {"status": "ok"}) and not service.engine.requests
