"""schemathesis over the OpenAPI document: whatever fits it or nearly does is answered as the document says."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.http.app import create_app
from app.settings import Settings
from tests.app.fakes import FakeEngine

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]

app = create_app(Settings(_env_file=None), FakeEngine(capacity=10**9))  # type: ignore[call-arg]
schema = schemathesis.openapi.from_asgi("/openapi.json", app)


@schema.parametrize()
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_every_operation_answers_as_described(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)
