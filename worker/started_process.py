"""Starts child processes of which none is left behind, whenever a signal comes and however this process ends.

Each has a guard, a shell that reads from a pipe. End of file means that all writers are gone, even by `kill -9`, and
the guard then tells the process to end. The engine's child and a gateway's carrier notice their parent's end in the
same way by themselves; a Redis server cannot.
"""

import os
import subprocess
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from worker.held_signals import held_signals

STOP_SECONDS = 5.0  # from SIGTERM to SIGKILL; a worker ends sooner

# The shell `exec`s the command, so that signals reach it under the pid that we know. The guard is not its child but in
# its process group: if the command leads the group, its pid is not reused while the guard lives. A stopped process
# would not see the signal, so it is continued. How soon it then ends is up to it.
_GUARDED = """
exec {end}<&0 </dev/null
({{ read -r _ <&{end} || {{ kill -TERM $$; kill -CONT $$; }}; }} >/dev/null 2>&1 &)
exec "$@" {end}<&-
"""


class StartedProcess(subprocess.Popen[bytes]):
    """A command that ends at the latest with this process. Its guard ends once its end was noticed here."""

    def __init__(self, command: list[str], *, pass_fds: Collection[int] = (), **options: Any) -> None:
        """`options`: those of `Popen` except `stdin`, which is empty."""
        self._lifeline: int | None = None
        self._lifeline_lock = threading.RLock()  # several threads may wait for a process, and a signal may interrupt it
        end, lifeline = os.pipe()
        script = _GUARDED.format(end=next(fd for fd in range(3, 10) if fd not in pass_fds))  # shells take one digit
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
        """A process that inherits this descriptor keeps the command alive after our own end, for as long as it lives
        itself."""
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
            with suppress(BrokenPipeError):  # a signal to the whole group has ended the guard
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
