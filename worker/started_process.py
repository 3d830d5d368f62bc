"""Processes that are started from here: none is left behind, whenever a signal comes and whatever ends this process.

Each has a guard, a shell that reads from a pipe. Its end, which comes once nobody can write to it any more, says
that we are gone, even by `kill -9`, and the guard tells the process to end. The engine's child and a gateway's carrier
see their parent's end in the same way, by themselves; a Redis server cannot.
"""

import os
import subprocess
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from worker.held_signals import held_signals

STOP_SECONDS = 5.0  # what is told to end has so long before it is killed; a worker is gone sooner

# The shell turns into the command, so that signals reach it under the pid that we know. The guard is no child of it but
# in its process group: where the command leads that, nobody else gets its pid while the guard lives. A process that is
# stopped would see no signal, so it goes on. How soon it then ends is its own affair.
_GUARDED = """
exec {end}<&0 </dev/null
({{ read -r _ <&{end} || {{ kill -TERM $$; kill -CONT $$; }}; }} >/dev/null 2>&1 &)
exec "$@" {end}<&-
"""


class StartedProcess(subprocess.Popen[bytes]):
    """A command that ends at the latest when this process does. Its guard goes once its end has been seen here."""

    def __init__(self, command: list[str], *, pass_fds: Collection[int] = (), **options: Any) -> None:
        """`options`: those of `Popen` but for `stdin`, which is empty."""
        self._lifeline: int | None = None
        self._lifeline_lock = threading.RLock()  # several threads may wait for a process, and a signal may come amid it
        end, lifeline = os.pipe()
        script = _GUARDED.format(end=next(fd for fd in range(3, 10) if fd not in pass_fds))  # a shell knows one digit
        try:
            super().__init__(["/bin/sh", "-c", script, "sh", *command], stdin=end, pass_fds=pass_fds, **options)
        except BaseException:
            os.close(lifeline)
            raise
        finally:
            os.close(end)
        self._lifeline = lifeline

    @property
    def lifeline(self) -> int:
        """Whoever inherits this descriptor keeps the command alive behind our own end, for as long as it lives."""
        assert self._lifeline is not None
        return self._lifeline

    def poll(self) -> int | None:
        code = super().poll()
        if code is not None:
            self._dismiss_guard()
        return code

    def wait(self, timeout: float | None = None) -> int:
        code = super().wait(timeout)
        self._dismiss_guard()
        return code

    def _dismiss_guard(self) -> None:
        with self._lifeline_lock:
            lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None:
            with suppress(BrokenPipeError):  # a signal to the whole group has ended it
                os.write(lifeline, b"\n")
            os.close(lifeline)


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[StartedProcess]:
    """A process that ends with the block, whenever a signal comes. `options`: those of `StartedProcess`."""
    process: StartedProcess | None = None
    try:
        with held_signals():
            process = StartedProcess(command, **options)
        yield process
    finally:
        if process is not None:
            end(process)


def end(process: StartedProcess) -> None:
    """Returns when it is gone."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
