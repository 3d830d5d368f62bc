"""Surroundings in which a worker does not start: one line on stderr that names what is wrong, and exit code 3."""

from pathlib import Path
from typing import Any

import pytest
import redis

from tests.acceptance.system import System
from tests.fakes.ports import free_port
from tests.fakes.tiny_models import make_tiny_model


def refusal(system: System, *arguments: str, **environment: Any) -> str:
    done = system.run("worker", "--log-level", "error", *arguments, **environment)
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def test_a_model_folder_that_is_missing(system: System, tmp_path: Path) -> None:
    missing = tmp_path / "no-model"
    assert str(missing) in refusal(system, "--model", str(missing))


def test_a_model_folder_that_is_damaged(system: System, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert str(tmp_path) in refusal(system, "--model", str(tmp_path))


def test_a_model_that_cannot_be_shared_out_among_so_many_ranks(system: System, tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path)
    line = refusal(system, "--model", str(folder), "--tensor-parallel-size", "4")
    assert "tensor_parallel_size 4 does not divide" in line and "set it to 1 or 2" in line


def test_a_redis_that_is_not_there(system: System) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    line = refusal(system, "--redis-url", url)
    assert url in line and "PROMPTMILL_REDIS_URL" in line


def test_a_redis_that_evicts(system: System, redis_client: redis.Redis) -> None:
    redis_client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        assert "noeviction" in refusal(system)
    finally:
        redis_client.config_set("maxmemory-policy", "noeviction")


def test_a_bucket_that_is_missing(system: System, s3_endpoint: str) -> None:
    line = refusal(system, "--results", "s3://nowhere/x", "--s3-endpoint-url", s3_endpoint)
    assert "'nowhere'" in line and s3_endpoint in line and "create it" in line


@pytest.mark.parametrize(("flag", "value"), [("--device", "abacus"), ("--max-num-seqs", "0"), ("--results", "disk")])
def test_a_wrong_setting_has_exit_code_2(system: System, flag: str, value: str) -> None:
    done = system.run("worker", flag, value)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert flag in line and value in line
