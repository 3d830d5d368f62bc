"""One life of the engine's child as its parent sees it: a pipe, an end, and why it ended.

Knows nothing of requests and never starts a child again; `engine.kept_child` does. Whatever a child is, it speaks over
a pipe, whose EOF is its end.
"""

import contextlib
import io
import logging
import os
import signal
import socket
import struct
import subprocess
import threading
from abc import ABC, abstractmethod
from collections import deque
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import IO, Protocol, TypeAlias

from engine.child import ChildPipe
from engine.config import EngineConfig
from engine.messages import ChildMessage, ParentMessage, Shutdown, StartCore
from engine.python_process import start_python

_log = logging.getLogger(__name__)

ParentPipe: TypeAlias = "Connection[ParentMessage, ChildMessage]"

_SHUTDOWN_SECONDS = 0.5  # what a child has to leave by itself before it is killed
_REAP_SECONDS = 2.0
# A thread that waits for its mates spins for so long before it sleeps. libgomp's own 300,000 turns keep a core from the
# very mate that is waited for when another process has the other core; measured with both cores busy, a step of
# SmolLM2-135M's matrix products took 500 ms with them and 200 ms with these.
_OPENMP_DEFAULTS = {"GOMP_SPINCOUNT": "2000"}
_MAX_LAST_LINES = 20
_MAX_LINE_CHARS = 4096  # of an event; what is longer, as all of a bar that redraws itself, is cut


class Supervised(Protocol):
    """What a supervisor asks of a running child; `Child` says what each means."""

    pipe: ParentPipe

    def send(self, message: ParentMessage) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> str: ...


class Child(ABC):
    """A running child. `pipe` is read by one thread, the caller's; `send` never blocks.

    A read raises BlockingIOError where nothing comes for `step_timeout_seconds`: whoever knows that there is a message
    would otherwise wait for ever for the rest of one whose sender has stopped in the middle of it.
    """

    def __init__(self, config: EngineConfig, core_path: str = "engine.core:EngineCore") -> None:
        pipe, child_pipe = Pipe()
        _limit_reads(pipe, config.step_timeout_seconds)
        self.pipe: ParentPipe = pipe
        self._outbox: SimpleQueue[ParentMessage | None] = SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name="engine-outbox", daemon=True)
        self._start(child_pipe)
        self._sender.start()
        self.send(StartCore(config, core_path))

    def send(self, message: ParentMessage) -> None:
        """Queues a message: a child that has stopped reading must not stop the parent as well."""
        self._outbox.put(message)

    @abstractmethod
    def kill(self) -> None:
        """Ends the child at once; what it had sent can still be read, then comes EOF."""

    def close(self) -> str:
        """Makes sure that the child is gone, frees what it held here and says why it ended."""
        self._outbox.put(Shutdown())
        self._outbox.put(None)
        reason = self._end()
        self._sender.join(_REAP_SECONDS)
        self.pipe.close()
        return reason

    def _send_all(self) -> None:
        with contextlib.suppress(OSError):  # the child is gone; the reader of the pipe sees it
            while (message := self._outbox.get()) is not None:
                self.pipe.send(message)

    @abstractmethod
    def _start(self, child_pipe: ChildPipe) -> None: ...

    @abstractmethod
    def _end(self) -> str: ...


class ChildProcess(Child):
    """The core in a process of its own. Its output is logged, a line an event, and its last lines are kept."""

    def _start(self, child_pipe: ChildPipe) -> None:
        fd = child_pipe.fileno()
        self._process = start_python(
            "engine.child",
            [fd],
            fds=[fd],
            env=_OPENMP_DEFAULTS | os.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        child_pipe.close()
        assert self._process.stdout is not None
        self._words = _LastWords(self._process.stdout)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()

    def _end(self) -> str:
        try:
            self._process.wait(_SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # held up in the kernel: it is killed, whenever it wakes
            self._process.wait(_REAP_SECONDS)
        words = self._words.close()
        return describe_exit("the engine process", self._process.returncode) + (
            f"; its last words:\n{words}" if words else ""
        )


class _LastWords:
    """Logs a child's output, line by line, and keeps the last lines for the reason of its end.

    As warnings: what it has to say of lesser weight it does not write.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = io.TextIOWrapper(stream, "utf-8", "replace", newline="\n")
        self._lines: deque[str] = deque(maxlen=_MAX_LAST_LINES)
        self._thread = threading.Thread(target=self._pump, name="engine-stderr", daemon=True)
        self._thread.start()

    def close(self) -> str:
        self._thread.join(_REAP_SECONDS)
        if not self._thread.is_alive():
            self._stream.close()  # else something the child started still holds the other end
        return "".join(self._lines).strip()

    def _pump(self) -> None:
        for line in iter(lambda: self._stream.readline(_MAX_LINE_CHARS), ""):
            self._lines.append(line)
            # Whatever a handler of the application's raises: the child must not block on a pipe that nobody reads.
            with contextlib.suppress(Exception):
                if text := line.rstrip():
                    _log.warning("%s", text)


def describe_exit(name: str, code: int | None) -> str:
    """How a process ended; None: it did not."""
    if code is None:
        return f"{name} does not end, not even killed"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"{name} was killed by {signal.Signals(-code).name}"
    return f"{name} ended with exit code {code}"


def _limit_reads(pipe: "ParentPipe", seconds: float) -> None:
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:
        timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
