"""`/v1/embeddings` through the official client: alone, as a batch, and as lines of `promptmill run`."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx
import numpy as np
import openai
import pytest

from producer.embeddings import INPUTS_A_JOB
from tests.fakes.batch_runs import by_id, run
from tests.fakes.batches import jsonl
from tests.fakes.fake_embeddings import HIDDEN_SIZE, expected_vector
from tests.fakes.fake_tokenizer import FakeTokenizer
from tests.fakes.gateways import RunningGateway, open_client, running_gateway
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import WorkerThread

URL: Final = "/v1/embeddings"


@pytest.fixture
def embedding(worker_thread: WorkerThread) -> Iterator[WorkerThread]:
    yield worker_thread


def vector_of(text: str, dimensions: int | None = None) -> list[float]:
    return list(expected_vector(FakeTokenizer().encode(text), dimensions).tolist())


def test_every_form_of_input_is_answered_in_order(client: openai.OpenAI, embedding: WorkerThread) -> None:
    one = client.embeddings.create(model="fake", input="the mill", user="somebody")
    assert (one.object, one.model, one.data[0].object, one.data[0].index) == ("list", "fake", "embedding", 0)
    assert one.data[0].embedding == vector_of("the mill")  # the client asks for base64
    assert (one.usage.prompt_tokens, one.usage.total_tokens) == (2, 2)
    assert client.embeddings.create(model="fake", input=[5, 6]).data[0].embedding == expected_vector([5, 6]).tolist()
    ids = client.embeddings.create(model="fake", input=[[5, 6], [7]], dimensions=3)
    assert [item.embedding for item in ids.data] == [expected_vector(i, 3).tolist() for i in ([5, 6], [7])]
    texts = [f"text number {i}" for i in range(2 * INPUTS_A_JOB + 1)]
    many = client.embeddings.create(model="fake", input=texts)
    assert [item.embedding for item in many.data] == [vector_of(text) for text in texts]
    assert [item.index for item in many.data] == list(range(len(texts)))
    assert many.usage.prompt_tokens == 3 * len(texts)


def test_floats_are_the_same_numbers_as_base64(gateway: RunningGateway, embedding: WorkerThread) -> None:
    def ask(**fields: Any) -> Any:
        response = httpx.post(f"{gateway.url}{URL}", json={"model": "fake", "input": "a b", **fields})
        return response.json()["data"][0]["embedding"], response.headers["x-promptmill-job-id"]

    (floats, job_id), (encoded, _) = ask(), ask(encoding_format="base64")
    same = np.frombuffer(base64.b64decode(encoded), "<f4")
    assert np.array(floats, np.float32).tolist() == same.tolist() == vector_of("a b")
    again = httpx.get(f"{gateway.url}/v1/jobs/{job_id}").json()
    assert again["status"] == "finished" and again["response"]["data"][0]["embedding"] == floats
    assert again["response"]["id"] == f"embd-{job_id}"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "input", "input: is required"),
        ({"input": []}, "input", "input is empty"),
        ({"input": ["a", ""]}, "input[1]", "input[1] is empty"),
        ({"input": ["a", 5]}, "input[1]", "input[1]: must be text or a list of token ids"),
        ({"input": ["a"] * 2049}, "input", "must have at most 2048 items"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "must be 'float' or 'base64'; got 'hex'"),
        ({"input": "a", "dimensions": 0}, "dimensions", "must be at least 1"),
        ({"input": "a", "dimensions": HIDDEN_SIZE + 1}, "dimensions", f"must lie in [1, {HIDDEN_SIZE}]"),
        ({"input": "a", "max_tokens": 5}, "max_tokens", "has no meaning with task 'embed'"),
        ({"input": "a", "stream": True}, "stream", "an embedding comes as a whole"),
        ({"prompt": "a"}, "prompt", "/v1/embeddings takes input"),
        ({"input": "a", "task": "generate"}, "task", "/v1/embeddings takes input"),
        ({"input": ["a"] * INPUTS_A_JOB + ["b", "c " * 5000]}, f"input[{INPUTS_A_JOB + 1}]", "has 5000 tokens"),
    ],
)
def test_a_bad_request_names_its_field(
    gateway: RunningGateway, embedding: WorkerThread, fields: dict[str, Any], param: str, message: str
) -> None:
    response = httpx.post(f"{gateway.url}{URL}", json={"model": "fake", **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param) and message in error["message"], error


def test_a_batch_of_embeddings_is_answered(redis_url: str, tmp_path: Path, embedding: WorkerThread) -> None:
    inputs: list[Any] = ["the mill", ["a", "b c"], [[5, 6]], ["a"] * (INPUTS_A_JOB + 1)]
    lines: list[dict[str, Any]] = [
        {"custom_id": str(i), "method": "POST", "url": URL, "body": {"model": "fake", "input": given}}
        for i, given in enumerate(inputs)
    ]
    lines[2]["body"]["encoding_format"] = "base64"
    lines.append({"custom_id": "bad", "url": URL, "body": {"model": "fake", "input": "a", "temperature": 1.5}})
    with (
        running_gateway(redis_url, files=str(tmp_path)) as gateway,
        open_client(gateway) as client,
    ):
        file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        wait_until(lambda: client.batches.retrieve(made.id).status == "completed")
        batch = client.batches.retrieve(made.id)
        output = [json.loads(text) for text in client.files.content(str(batch.output_file_id)).text.splitlines()]
        errors = [json.loads(text) for text in client.files.content(str(batch.error_file_id)).text.splitlines()]
    assert batch.usage is not None and (batch.usage.input_tokens, batch.usage.output_tokens) == (72, 0)
    bodies = {answer["custom_id"]: answer["response"]["body"] for answer in output}
    assert [item["embedding"] for item in bodies["1"]["data"]] == [
        pytest.approx(vector_of("a"), abs=1e-7),
        pytest.approx(vector_of("b c"), abs=1e-7),
    ]
    data = base64.b64decode(bodies["2"]["data"][0]["embedding"])
    assert np.frombuffer(data, "<f4").tolist() == expected_vector([5, 6]).tolist()
    assert (len(bodies["0"]["data"]), len(bodies["3"]["data"])) == (1, INPUTS_A_JOB + 1)
    [bad] = errors
    assert bad["custom_id"] == "bad" and bad["response"]["body"]["error"]["param"] == "temperature"


def test_lines_of_a_file_are_embedded(redis_url: str, tmp_path: Path, embedding: WorkerThread) -> None:
    files = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    files[0].write_bytes(jsonl([{"custom_id": "a", "url": URL, "body": {"input": ["a", "b"]}}]))
    progress = run(redis_url, files)
    assert (progress.num_failed, progress.num_prompt_tokens) == (0, 2)
    assert re.fullmatch("[0-9]+ prompt tokens/s", progress.speed)
    body = by_id(files[1])["a"]["response"]["body"]
    assert len(body["data"]) == 2 and body["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
