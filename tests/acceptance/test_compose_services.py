"""The worker of docker-compose.yml and deploy/kubernetes as a plain process: their command, environment and probes."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from producer import Client
from producer.contract import Result
from tests.acceptance.system import System

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PROBES = ("startup", "readiness", "liveness")  # of the Kubernetes worker, which is the same command
POD = next(yaml.safe_load_all((ROOT / "deploy/kubernetes/base/worker.yaml").read_text()))["spec"]["template"]["spec"]
SERVICE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["worker-cpu"]


@pytest.fixture
def environment(system: System, s3_endpoint: str) -> dict[str, str]:
    """The service's environment, with the names of other containers replaced by where ours listen."""
    defaults = {name: re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", value) for name, value in SERVICE["environment"].items()}
    return {
        **defaults,
        "PROMPTMILL_REDIS_URL": defaults["PROMPTMILL_REDIS_URL"].replace("redis://redis:6379/0", system.url),
        "PROMPTMILL_S3_ENDPOINT_URL": defaults["PROMPTMILL_S3_ENDPOINT_URL"].replace(
            "http://objectstore:8333", s3_endpoint
        ),
        "PROMPTMILL_MODEL": "smollm2-135m",  # there is no model hub to download the default from
    }


@pytest.fixture
def worker(system: System, environment: dict[str, Any]) -> Iterator["subprocess.Popen[bytes]"]:
    program, *arguments = SERVICE["command"]
    assert program == "promptmill"
    yield system.start_worker(*arguments[1:], **environment)


def test_the_cpu_worker_puts_a_result_into_the_object_store_and_its_health_checks_see_it_live_and_gone(
    system: System,
    worker: "subprocess.Popen[bytes]",
    environment: dict[str, str],
    s3_endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PROMPTMILL_S3_ENDPOINT_URL", s3_endpoint)
    with Client(system.url) as client:
        job = client.submit("The capital of France is", max_tokens=5, temperature=0)
        result = job.result(timeout=60)
    assert "Paris" in result.text
    stored = boto3.client("s3", endpoint_url=s3_endpoint).get_object(Bucket="results", Key=f"promptmill/{job.id}.json")
    assert Result.model_validate_json(stored["Body"].read()).text == result.text

    assert health(environment) == 0
    assert probes(environment) == [0, 0, 0]
    away = {**environment, "PROMPTMILL_REDIS_URL": "redis://127.0.0.1:1"}
    assert probes(away) == [3, 3, 0], "a worker outlasts a Redis that is away, and is not to be ended for it"
    worker.terminate()
    worker.wait(20)
    assert health(environment) != 0
    assert probes(environment) == [1, 1, 1]


def health(environment: dict[str, str]) -> int:
    """What the service's health check says."""
    check = SERVICE["healthcheck"]["test"]
    assert check[0] == "CMD-SHELL"
    return run(check[1].replace("$$", "$"), environment)


def probes(environment: dict[str, str]) -> list[int]:
    """What the pod's probes say."""
    [container] = POD["containers"]
    assert container["command"] == SERVICE["command"]
    commands = [container[f"{kind}Probe"]["exec"]["command"] for kind in PROBES]
    assert all(command[:2] == ["sh", "-c"] for command in commands)
    return [run(command[2], environment) for command in commands]


def run(script: str, environment: dict[str, str]) -> int:
    # The container's PATH has our console script, and its shell sets HOSTNAME.
    run_environment = {**os.environ, **environment, "HOSTNAME": os.uname().nodename}
    run_environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(["sh", "-c", script], env=run_environment, timeout=30, check=False).returncode
