"""Requests made from our own OpenAPI document, right and wrong ones: none of them may be a fault of ours."""

from typing import Any

import httpx2 as httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.fakes.fake_worker import FakeWorker
from tests.fakes.gateways import RunningGateway
from tests.fakes.held_job import HeldJob

EXAMPLES_A_ROUTE = 15
ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/{response_id}"),
    ("DELETE", "/v1/responses/{response_id}"),
    ("POST", "/v1/responses/{response_id}/cancel"),
    ("GET", "/v1/responses/{response_id}/input_items"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/v1/jobs/{job_id}"),
    ("DELETE", "/v1/jobs/{job_id}"),
    ("GET", "/v1/jobs/{job_id}/stream"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches"),
    ("GET", "/v1/batches/{batch_id}"),
    ("POST", "/v1/batches/{batch_id}/cancel"),
    ("GET", "/console/series"),
    ("GET", "/console/jobs"),
    ("GET", "/console/jobs/{job_id}"),
    ("GET", "/console/jobs/{job_id}/stream"),
    ("POST", "/console/jobs/retry"),
    ("POST", "/console/jobs/cancel"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/{file_id}"),
    ("GET", "/v1/files/{file_id}/content"),
    ("DELETE", "/v1/files/{file_id}"),
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_request_of_the_document_is_a_fault_of_ours(
    gateway: RunningGateway, worker: FakeWorker, method: str, path: str
) -> None:
    operation = schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")[path][method]
    codes: set[int] = set()

    @settings(
        max_examples=EXAMPLES_A_ROUTE,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def check(case: schemathesis.Case[Any]) -> None:
        if isinstance(case.body, dict):
            case.body["model"] = "fake"  # a model that nobody serves would be all that is ever refused
        response = case.call(timeout=30)
        codes.add(response.status_code)
        assert response.status_code < 500, (case.body, response.text)
        if response.status_code >= 400:
            assert response.json()["error"]["message"]

    with worker.serving(answer, of_tenants=True):
        check()
    assert codes


def test_requests_of_tenants_are_among_those_that_are_answered(gateway: RunningGateway, worker: FakeWorker) -> None:
    body = {"model": "fake", "prompt": "x", "tenant": "acme"}
    with worker.serving(answer, of_tenants=True):
        assert httpx.post(f"{gateway.url}/v1/completions", json=body, timeout=30).status_code == 200


def answer(job: HeldJob) -> None:
    job.begin()
    for index in range(job.arguments.get("n", 1)):
        job.write("x", index=index, finish_reason="stop")
    job.end()


def test_the_document_describes_the_bodies_and_every_route(gateway: RunningGateway) -> None:
    document = httpx.get(f"{gateway.url}/openapi.json").json()
    assert {path for _, path in ROUTES} | {"/v1/models", "/health", "/stats", "/metrics"} <= set(document["paths"])
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["model", "messages"] and {"top_k", "priority", "tools"} <= set(body["properties"])
