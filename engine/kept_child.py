"""The engine's child through all its lives: started, told apart from one that hangs, started again.

Knows processes and the clock, and no request; what a message or an end means to those, `engine.supervisor` knows.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from selectors import EVENT_READ, BaseSelector

from engine.config import EngineConfig
from engine.messages import ChildMessage, CoreFailed, EngineInfo, ParentMessage, StartFailed, StartProgress, StepOutput
from engine.process import Supervised
from engine.restart_policy import RestartPolicy

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChildEnd:
    """How one life ended."""

    reason: str
    was_ready: bool
    is_refused: bool  # it cannot start, and says what would help
    can_start: bool  # another one, after the backoff


class KeptChild:
    """One child at a time, or none while a start waits. For one thread; others may do no more than kill what runs."""

    def __init__(
        self, config: EngineConfig, start_child: Callable[[EngineConfig], Supervised], selector: BaseSelector
    ) -> None:
        """The pipe of the child that runs is registered in `selector`."""
        self._config = config
        self._new_child = start_child
        self._selector = selector
        self._restarts = RestartPolicy()
        self._waiting_since = time.monotonic()  # for what `_max_wait_seconds` limits
        self._reason: str | None = None  # of the end, where it is known before
        self._is_refused = False
        self.running: Supervised | None = None
        self.is_ready = False

    @property
    def num_restarts(self) -> int:
        return self._restarts.num_restarts

    def start(self) -> ChildEnd | None:
        """Starts one; its end, where the system has no memory, process or thread left for it."""
        self.is_ready = self._is_refused = False
        self._reason = None
        self.note_wait()
        try:
            self.running = self._new_child(self._config)
        except (OSError, RuntimeError) as error:
            return self._ended(f"its process cannot be started ({error})")
        self._selector.register(self.running.pipe, EVENT_READ)
        return None

    def send(self, message: ParentMessage) -> None:
        assert self.running is not None
        self.running.send(message)

    def receive(self) -> ChildMessage | ChildEnd:
        """Its next message; blocks until the pipe has one."""
        assert self.running is not None
        try:
            message = self.running.pipe.recv()
        except (EOFError, OSError) as error:
            if isinstance(error, BlockingIOError):
                limit = self._config.step_timeout_seconds
                self._reason = f"the engine stopped in the middle of a message, for {limit:g} s, and was killed"
                self.running.kill()
            return self._close(self.running)
        self.note_wait()
        self._learn_from(message)
        return message

    def note_wait(self) -> None:
        """From now on the time counts that it has for its next message."""
        self._waiting_since = time.monotonic()

    def owes_by(self, *, is_busy: bool) -> float:
        """When `give_up_waiting` is due, in monotonic seconds. `is_busy`: whether it has something to compute."""
        limit = self._max_wait_seconds(is_busy)
        return inf if limit is None else self._waiting_since + limit

    def give_up_waiting(self) -> ChildEnd | None:
        """The backoff is over, and another one starts; or it owes a message for too long, and is killed: its end
        follows."""
        if self.running is None:
            self._restarts.num_restarts += 1
            return self.start()
        name = "step_timeout_seconds" if self.is_ready else "start_timeout_seconds"
        self._reason = f"the engine sent nothing within {name} ({self._max_wait_seconds(True):g} s) and was killed"
        self.note_wait()
        self.running.kill()
        return None

    def _max_wait_seconds(self, is_busy: bool) -> float | None:
        if self.running is None:
            return self._restarts.backoff_seconds
        if not self.is_ready:
            return self._config.start_timeout_seconds
        return self._config.step_timeout_seconds if is_busy else None

    def _learn_from(self, message: ChildMessage) -> None:
        match message:
            case StepOutput():
                if len(message.sequence_ids) or message.embeddings:
                    self._restarts.note_token()
            case EngineInfo():
                self._restarts.note_ready()
                self.is_ready = True
            case StartProgress(progress):
                _log.info("action=starting progress=%r", progress)
            case StartFailed(reason):
                self._reason = reason
                self._is_refused = True
            case CoreFailed(reason):
                self._reason = reason

    def _close(self, running: Supervised) -> ChildEnd:
        self._selector.unregister(running.pipe)
        exit_reason = running.close()
        self.running = None
        self.note_wait()
        return self._ended(self._reason or exit_reason)

    def _ended(self, reason: str) -> ChildEnd:
        was_ready, self.is_ready = self.is_ready, False
        if was_ready:
            self._restarts.note_death()
        else:
            self._restarts.note_failed_start(is_refused=self._is_refused)
        return ChildEnd(reason, was_ready, self._is_refused, self._restarts.can_start)
