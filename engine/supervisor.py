"""Keeps one child running and its requests fed: starts it, watches it, starts it again and carries the requests on.

One thread does all of it: it reads the pipe, takes commands from other threads, calls back with outputs and watches the
clock. So requests need no lock, and a callback sees its outputs in order. Knows nothing of prompts, text or asyncio.
"""

import logging
import selectors
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any

from engine.config import EngineConfig
from engine.errors import EngineDiedError, EngineError, EngineNotRunningError, InvalidRequestError, ModelLoadError
from engine.mailbox import Command, Mailbox
from engine.messages import (
    AbortSequences,
    Begun,
    ChildMessage,
    CoreFailed,
    EngineInfo,
    EngineStats,
    GetStats,
    StartFailed,
    StartProgress,
    StepOutput,
)
from engine.outputs import ErrorKind
from engine.process import Supervised
from engine.request import Request
from engine.request_table import RequestTable
from engine.restart_policy import RestartPolicy

_STOP_SECONDS = 1.0  # what a child that goes by itself, or is inside a step, takes at most
_STATS_SECONDS = 1.0  # how long a caller waits for figures while the child is inside a step

_log = logging.getLogger(__name__)


class Supervisor:
    """One engine from its start to its end. Public methods may be called from any thread."""

    def __init__(
        self,
        config: EngineConfig,
        start_child: Callable[[EngineConfig], Supervised],
        after_outputs: Callable[[], None] = lambda: None,
        output_interval: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`after_outputs` is called behind whatever may have called back: a message of the child's, some commands.

        `output_interval`: how many seconds lie between two deliveries of choices that go on, at least.
        """
        self._config = config
        self._new_child = start_child
        self._after_outputs = after_outputs
        self._output_interval = output_interval
        self._outputs_due = 0.0  # monotonic seconds
        self._table = RequestTable()
        self._mailbox = Mailbox()
        self._lock = threading.Lock()  # guards the ids in the table, and `_end` against further commands
        self._end: EngineError | None = None  # why no more commands are taken
        self._end_kind: ErrorKind = "died"
        self._started: Future[EngineInfo] = Future()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._mailbox, selectors.EVENT_READ)
        self._child: Supervised | None = None
        self._is_ready = False
        self._reason: str | None = None  # of the child's end, where it is known before
        self._is_start_refused = False
        self._waiting_since = time.monotonic()  # for what `_max_wait_seconds` limits
        self._restarts = RestartPolicy()
        self._stats: EngineStats | None = None
        self._stats_futures: list[Future[None]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.last_step_at = time.monotonic()

    @property
    def is_healthy(self) -> bool:
        """Whether requests are served, if only after a restart that is under way."""
        return self._end is None and self._started.done()

    @property
    def has_ended(self) -> bool:
        """Whether it takes no more requests, for good."""
        return self._end is not None

    def launch(self) -> None:
        """Starts the child and returns."""
        self._thread.start()

    def wait_until_ready(self) -> EngineInfo:
        """Returns once the child is ready. Raises `ModelLoadError` with the child's reason."""
        return self._started.result()

    def stop(self) -> None:
        """Ends the child and every request, the latter with error kind `stopped`."""
        self._post(partial(self._finish, EngineNotRunningError("the engine was stopped"), "stopped"))
        if threading.current_thread() is self._thread:
            return
        self._thread.join(_STOP_SECONDS)
        if self._thread.is_alive() and (child := self._child) is not None:
            child.kill()  # the thread waits for the rest of a message
        self._thread.join()

    def submit(self, request: Request) -> None:
        """Raises `EngineDiedError` or `EngineNotRunningError` after the end, `InvalidRequestError` for an id in use."""
        with self._lock:
            if self._end is not None:
                raise type(self._end)(str(self._end))
            if not self._table.reserve(request.request_id):
                raise InvalidRequestError(f"request_id {request.request_id!r} is in use", param="request_id")
            self._mailbox.put(partial(self._table.add, request))

    def abort(self, request_id: str) -> None:
        self._post(partial(self._table.abort, request_id))

    def get_stats(self) -> dict[str, Any]:
        """The child's figures and the parent's; the last ones known while a long step or a restart goes on."""
        answered: Future[None] = Future()
        if threading.current_thread() is not self._thread and self._post(partial(self._ask_stats, answered)):
            with suppress(TimeoutError):
                answered.result(_STATS_SECONDS)
        figures = self._stats.as_dict() if self._stats is not None else {}
        return {"num_requests": len(self._table), "num_restarts": self._restarts.num_restarts, **figures}

    def _post(self, command: Command) -> bool:
        with self._lock:
            if self._end is None:
                self._mailbox.put(command)
            return self._end is None

    # everything below runs on the supervisor's thread

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # until the child can ignore them
        try:
            self._start_child()
            while self._end is None:
                self._turn()
        except BaseException as error:  # nobody else would end those who wait
            _log.exception("the engine's supervisor failed")
            self._finish(EngineDiedError(f"the engine's supervisor failed: {error!r}"), "died")
        finally:
            self._clean_up()

    def _turn(self) -> None:
        """Sleeps until there is something to do, and does it."""
        limit = self._max_wait_seconds()
        ends_at = inf if limit is None else self._waiting_since + limit
        due = min(ends_at, self._outputs_due) if self._table.has_fresh else ends_at
        events = self._selector.select(None if due == inf else max(0.0, due - time.monotonic()))
        for key, _ in events:
            if key.fileobj is self._mailbox:
                for command in self._mailbox.take_all():
                    command()
                    self._feed()  # before what a later command sends: figures asked for then count it
            else:
                self._receive()
                self._feed()
        now = time.monotonic()
        if not events and now >= ends_at:
            self._give_up_waiting()
        if now >= self._outputs_due and self._table.has_fresh:
            self._table.deliver()
            self._outputs_due = now + self._output_interval()
        self._after_outputs()

    def _feed(self) -> None:
        """Tells the child what has ended here and what it may begin. One that is not ready yet is told once it is."""
        if not self._is_ready:
            return
        assert self._child is not None
        if forgotten := self._table.take_forgotten():
            self._child.send(AbortSequences(forgotten))
        was_busy = self._table.is_child_busy
        for message in self._table.start_more():
            self._child.send(message)
        if not was_busy:
            self._waiting_since = time.monotonic()

    def _max_wait_seconds(self) -> float | None:
        if self._child is None:
            return self._restarts.backoff_seconds
        if not self._is_ready:
            return self._config.start_timeout_seconds
        return self._config.step_timeout_seconds if self._table.is_child_busy else None

    def _give_up_waiting(self) -> None:
        """The backoff is over, or the child owes a message for too long: then it counts as dead."""
        self._waiting_since = time.monotonic()
        if self._child is None:
            self._restarts.num_restarts += 1
            self._start_child()
            return
        name = "step_timeout_seconds" if self._is_ready else "start_timeout_seconds"
        self._reason = f"the engine sent nothing within {name} ({self._max_wait_seconds():g} s) and was killed"
        self._child.kill()

    def _start_child(self) -> None:
        self._is_ready = self._is_start_refused = False
        self._reason = None
        self._waiting_since = time.monotonic()
        try:
            self._child = self._new_child(self._config)
        except (OSError, RuntimeError) as error:  # no memory, no process or no thread left, for now
            self._note_end(f"its process cannot be started ({error})", was_ready=False)
            return
        self._selector.register(self._child.pipe, selectors.EVENT_READ)

    def _receive(self) -> None:
        assert self._child is not None
        try:
            message = self._child.pipe.recv()
        except (EOFError, OSError) as error:
            if isinstance(error, BlockingIOError):
                limit = self._config.step_timeout_seconds
                self._reason = f"the engine stopped in the middle of a message, for {limit:g} s, and was killed"
                self._child.kill()
            self._on_child_end(self._child)
            return
        self.last_step_at = self._waiting_since = time.monotonic()
        self._handle(message)

    def _handle(self, message: ChildMessage) -> None:
        match message:
            case StepOutput():
                if len(message.sequence_ids) or message.embeddings:
                    self._restarts.note_token()
                self._table.apply(message)
            case Begun(sequence_ids):
                self._table.note_begun(sequence_ids)
            case EngineStats():
                self._stats = message
                self._answer_stats()
            case EngineInfo():
                self._on_ready(message)
            case StartProgress(progress):
                _log.info("action=starting progress=%r", progress)
            case StartFailed(reason):
                self._reason = reason
                self._is_start_refused = True
            case CoreFailed(reason):
                self._reason = reason

    def _on_ready(self, info: EngineInfo) -> None:
        self._restarts.note_ready()
        if self._started.done() and self._started.result().fingerprint != info.fingerprint:
            reason = f"the engine came back as {info.fingerprint}, it was {self._started.result().fingerprint}"
            self._finish(EngineDiedError(reason), "died")  # carrying on would mix two arithmetics in one answer
            return
        self._is_ready = True
        self._stats = EngineStats(num_kv_blocks=info.num_kv_blocks, num_kv_blocks_free=info.num_kv_blocks)
        if not self._started.done():
            self._started.set_result(info)

    def _on_child_end(self, child: Supervised) -> None:
        self._selector.unregister(child.pipe)
        exit_reason = child.close()
        was_ready, self._is_ready, self._child = self._is_ready, False, None
        self._waiting_since = time.monotonic()
        self._answer_stats()
        self._note_end(self._reason or exit_reason, was_ready=was_ready)

    def _note_end(self, reason: str, *, was_ready: bool) -> None:
        """Decides what the end of a child means: the end of all, or another start when the backoff is over."""
        if not self._started.done():
            path = self._config.model_path
            self._finish(
                ModelLoadError(reason if self._is_start_refused else f"{path} was not loaded: {reason}"), "died"
            )
        elif was_ready:
            _log.error("action=engine_restarts reason=%r", reason)
            self._restarts.note_death()
            self._table.note_death(reason)
        else:
            _log.error("action=engine_restart_failed reason=%r", reason)
            self._restarts.note_failed_start(is_refused=self._is_start_refused)
            if not self._restarts.can_start:
                self._finish(EngineDiedError(f"the engine died and cannot be started again: {reason}"), "died")

    def _ask_stats(self, answered: Future[None]) -> None:
        self._stats_futures.append(answered)
        if self._child is not None and self._is_ready:
            self._child.send(GetStats())
        else:
            self._answer_stats()

    def _answer_stats(self) -> None:
        while self._stats_futures:
            self._stats_futures.pop().set_result(None)

    def _finish(self, error: EngineError, kind: ErrorKind) -> None:
        with self._lock:
            self._end = error
            self._end_kind = kind

    def _clean_up(self) -> None:
        """Nobody can post any more; what was posted before is carried out, so that every request hears of the end."""
        assert self._end is not None
        self._is_ready = False
        for command in self._mailbox.take_all():
            command()
        self._answer_stats()
        self._table.fail_all(str(self._end), self._end_kind)
        self._after_outputs()
        if self._child is not None:
            self._child.close()
        self._selector.close()
        self._mailbox.close()
        if not self._started.done():
            self._started.set_exception(self._end)
