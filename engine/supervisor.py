"""Feeds requests to a child that is kept running, and carries them on where another takes its place.

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

from engine.child import PARENTS_SIGNALS
from engine.config import EngineConfig
from engine.errors import EngineDiedError, EngineError, EngineNotRunningError, InvalidRequestError, ModelLoadError
from engine.kept_child import ChildEnd, KeptChild
from engine.mailbox import Command, Mailbox
from engine.messages import (
    AbortSequences,
    Begun,
    ChildMessage,
    EngineInfo,
    EngineStats,
    GetStats,
    StepOutput,
)
from engine.outputs import ErrorKind
from engine.process import Supervised
from engine.request import Request
from engine.request_table import RequestTable

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
        self._child = KeptChild(config, start_child, self._selector)
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
        if self._thread.is_alive() and (running := self._child.running) is not None:
            running.kill()  # the thread waits for the rest of a message
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
        return {"num_requests": len(self._table), "num_restarts": self._child.num_restarts, **figures}

    def _post(self, command: Command) -> bool:
        with self._lock:
            if self._end is None:
                self._mailbox.put(command)
            return self._end is None

    # everything below runs on the supervisor's thread

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)  # until the child can ignore them
        try:
            self._note_end(self._child.start())
            while self._end is None:
                self._turn()
        except BaseException as error:  # nobody else would end those who wait
            _log.exception("action=supervisor_failed")
            self._finish(EngineDiedError(f"the engine's supervisor failed: {error!r}"), "died")
        finally:
            self._clean_up()

    def _turn(self) -> None:
        """Sleeps until there is something to do, and does it."""
        ends_at = self._child.owes_by(is_busy=self._table.is_child_busy)
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
            self._note_end(self._child.give_up_waiting())
        if now >= self._outputs_due and self._table.has_fresh:
            self._table.deliver()
            self._outputs_due = now + self._output_interval()
        self._after_outputs()

    def _feed(self) -> None:
        """Tells the child what has ended here and what it may begin. One that is not ready yet is told once it is."""
        if not self._child.is_ready or self._end is not None:
            return
        if forgotten := self._table.take_forgotten():
            self._child.send(AbortSequences(forgotten))
        was_busy = self._table.is_child_busy
        for message in self._table.start_more():
            self._child.send(message)
        if not was_busy:
            self._child.note_wait()

    def _receive(self) -> None:
        message = self._child.receive()
        if isinstance(message, ChildEnd):
            self._answer_stats()
            self._note_end(message)
        else:
            self.last_step_at = time.monotonic()
            self._handle(message)

    def _handle(self, message: ChildMessage) -> None:
        match message:
            case StepOutput():
                self._table.apply(message)
            case Begun():
                self._table.note_begun(message)
            case EngineStats():
                self._stats = message
                self._answer_stats()
            case EngineInfo():
                self._on_ready(message)

    def _on_ready(self, info: EngineInfo) -> None:
        if self._started.done() and self._started.result().fingerprint != info.fingerprint:
            reason = f"the engine came back as {info.fingerprint}, it was {self._started.result().fingerprint}"
            self._finish(EngineDiedError(reason), "died")  # carrying on would mix two arithmetics in one answer
            return
        self._stats = EngineStats(num_kv_blocks=info.num_kv_blocks, num_kv_blocks_free=info.num_kv_blocks)
        if not self._started.done():
            self._started.set_result(info)

    def _note_end(self, end: ChildEnd | None) -> None:
        """Decides what the end of a child means: the end of all, or another start when the backoff is over."""
        if end is None:
            return
        if not self._started.done():
            path = self._config.model_path
            self._finish(
                ModelLoadError(end.reason if end.is_refused else f"{path} was not loaded: {end.reason}"), "died"
            )
        elif end.was_ready:
            _log.error("action=engine_restarts reason=%r", end.reason)
            self._table.note_death(end.reason)
        else:
            _log.error("action=engine_restart_failed reason=%r", end.reason)
            if not end.can_start:
                self._finish(EngineDiedError(f"the engine died and cannot be started again: {end.reason}"), "died")

    def _ask_stats(self, answered: Future[None]) -> None:
        self._stats_futures.append(answered)
        if self._child.is_ready:
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
        for command in self._mailbox.take_all():
            command()
        self._answer_stats()
        self._table.fail_all(str(self._end), self._end_kind)
        self._after_outputs()
        if self._child.running is not None:
            self._child.running.close()
        self._selector.close()
        self._mailbox.close()
        if not self._started.done():
            self._started.set_exception(self._end)
