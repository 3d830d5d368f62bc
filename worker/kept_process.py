"""A child process that is started again when it is killed. Handles no signals of this process."""

import time
from contextlib import ExitStack

from worker.started_process import StartedProcess, running

MIN_LIFE_SECONDS = 5.0  # a process killed sooner, twice in a row, is not started again


class KeptProcess:
    """The first process and its successors. `pass_fds`: descriptors that each inherits: a socket, or the lifeline of a
    process that it keeps alive after our own end."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], pass_fds: list[int]) -> None:
        self.name = name
        self._command = command
        self._environment = environment
        self._pass_fds = pass_fds
        self._started_at: float | None = None
        self._was_killed_early = False  # the previous process
        self.process: StartedProcess

    def start(self, stack: ExitStack) -> None:
        """Start it in its own session: Ctrl-C reaches it through us, and a server of ours always outlives it."""
        self._was_killed_early = self._is_young
        self._started_at = time.monotonic()
        self.process = stack.enter_context(
            running(self._command, env=self._environment, start_new_session=True, pass_fds=self._pass_fds)
        )

    @property
    def was_killed(self) -> bool:
        """Whether a signal ended it, ours, `kill -9` or the kernel's. A process that gives up has an exit code
        instead."""
        return (self.process.poll() or 0) < 0

    @property
    def can_restart(self) -> bool:
        return self.was_killed and not (self._was_killed_early and self._is_young)

    @property
    def _is_young(self) -> bool:
        return self._started_at is not None and time.monotonic() - self._started_at < MIN_LIFE_SECONDS
