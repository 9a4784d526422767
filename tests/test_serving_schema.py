"""The server's own schema, tried out by schemathesis: whatever it allows or forbids, no answer is a 5xx."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from tests.servers import MODEL, RunningServer, build_bank, run_server

KEY = "a-key-of-at-least-16-letters"

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder: Path = tmp_path_factory.mktemp("schema")
    with run_server(build_bank(folder), folder / "log", "--explore", key=KEY) as running:
        yield running


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_makes_the_server_fail(server: RunningServer, mode: GenerationMode) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=headers)
    statuses: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        takes_numbers = "/explore/" in operation.path and not operation.path.endswith("/bank")
        takes_any = operation.method != "post" and "ref_id" not in operation.path and not takes_numbers
        if mode is GenerationMode.NEGATIVE and takes_any:
            continue  # nothing that is given can be wrong

        @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(mode))
        def try_out(case: Case[Any]) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = MODEL  # else nearly all answers would be that there is no such model
                if mode is GenerationMode.POSITIVE:
                    case.body |= {"max_tokens": 2}
                    case.body.pop("max_completion_tokens", None)
            response = case.call(headers=headers, timeout=120)
            statuses.setdefault(case.operation.label, set()).add(response.status_code)
            case.validate_response(response, checks=CHECKS, headers=headers)

        try_out()
    assert len(statuses) == (16 if mode is GenerationMode.POSITIVE else 10)
    if mode is GenerationMode.POSITIVE:
        assert {label for label, found in statuses.items() if 200 in found} >= set(statuses) - {
            "GET /v1/memories/{ref_id}",
            "GET /v1/models/{name}",
            "GET /v1/explore/differences/{before}/{after}",
            "GET /v1/explore/references/{ref_id}",
            "GET /v1/explore/references/{ref_id}/duplicates",
            "GET /v1/explore/references/{ref_id}/places",
        }
    assert 'status="500"' not in server.open_client().get("/metrics").text
    assert server.log.read_text() == ""
