"""Processes that are started from here: none is left behind, whenever a signal comes."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from worker.held_signals import held_signals

STOP_SECONDS = 5.0  # what is told to end has so long before it is killed; a worker is gone sooner


@contextmanager
def running(command: list[str], **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that ends with the block, whenever a signal comes. `options`: those of `Popen`."""
    process: subprocess.Popen[bytes] | None = None
    try:
        with held_signals():
            process = subprocess.Popen(command, **options)
        yield process
    finally:
        if process is not None:
            end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Returns when it is gone."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
