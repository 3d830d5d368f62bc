"""The commands that need a worker: `worker`, `serve`, `demo`. Everything heavy is imported when a command runs.

Owns the exit codes: 0 done, 2 a setting is wrong, 3 something cannot start, or is gone. Each failure is one line on
stderr.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from engine.errors import EngineError
from producer.errors import PortTakenError, SettingsError
from producer.logs import configure_logging
from producer.settings import load_settings, settings_options, warn_of_misspelt_variables
from worker.errors import WorkerError
from worker.held_signals import ending_signals
from worker.serve import ServeSettings
from worker.serve import serve as serve_until_stopped
from worker.settings import WorkerSettings

EXIT_INTERRUPTED = 130


class _SettingsFailure(click.ClickException):
    exit_code = 2


class _StartFailure(click.ClickException):
    exit_code = 3


@click.command()
@settings_options(WorkerSettings)
def worker(**flags: Any) -> None:
    """Answer the jobs of the queues with a model on one device. Ends at SIGTERM or Ctrl-C."""
    with _one_line_errors():
        settings = load_settings(WorkerSettings, flags)
        configure_logging(settings.log_level, settings.log_format)
        warn_of_misspelt_variables(WorkerSettings)
        from worker.run import run_worker

        run_worker(settings)


@click.command()
@settings_options(ServeSettings)
def serve(**flags: Any) -> None:
    """Start a Redis of its own, a worker and a gateway (OpenAI's API). Ends at SIGTERM or Ctrl-C.

    With --redis-url, or PROMPTMILL_REDIS_URL, it uses that Redis instead.

    The gateway takes its other settings from their PROMPTMILL_* variables; see `promptmill gateway --help`.
    """
    with _one_line_errors():
        settings = load_settings(ServeSettings, flags)
        code = 0
        with _ended_by_signals():
            code = serve_until_stopped(settings)
    sys.exit(code)


@click.command()
@settings_options(WorkerSettings, leave_out=frozenset({"redis_url"}))
def demo(**flags: Any) -> None:
    """Start everything, stream a handful of prompts side by side, clean up."""
    with _one_line_errors():
        settings = load_settings(WorkerSettings, flags)
        from worker.demo import run_demo

        code = EXIT_INTERRUPTED
        with _ended_by_signals():
            code = run_demo(settings)
    sys.exit(code)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except SettingsError as error:
        raise _SettingsFailure(_one_line(error)) from error
    except (WorkerError, EngineError, PortTakenError) as error:
        raise _StartFailure(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """The first signal unwinds, so that every process started is ended; then the block is left. More do not disturb
    that: it takes seconds at most."""
    is_ending = False

    def interrupt(signum: int, frame: object) -> None:
        nonlocal is_ending
        if not is_ending:
            is_ending = True
            raise KeyboardInterrupt

    for number in ending_signals():
        signal.signal(number, interrupt)
    with suppress(KeyboardInterrupt):
        yield
