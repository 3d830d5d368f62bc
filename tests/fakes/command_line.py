"""`promptmill` as a test runs it: in its own process, or as one that gets signals."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from click.testing import CliRunner, Result

from producer.cli import main
from worker.started_process import StartedProcess

Invoke = Callable[..., Result]


def invoke(redis_url: str, *arguments: object, input: str | bytes | None = None, **environment: str) -> Result:
    """What it prints, where, and its exit code. Whatever goes wrong is said, not raised."""
    environment = {"PROMPTMILL_REDIS_URL": redis_url, **environment}
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=input, env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def new_key(redis_url: str, *arguments: str) -> str:
    """What `promptmill keys add` prints."""
    made = invoke(redis_url, "keys", "add", *arguments)
    assert made.exit_code == 0, made.output
    return made.stdout.strip()


def start(*arguments: str, url: str) -> Any:
    """A `StartedProcess` whose pipes carry text."""
    return StartedProcess(
        [sys.executable, "-m", "producer", *arguments],
        env={**os.environ, "PROMPTMILL_REDIS_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
