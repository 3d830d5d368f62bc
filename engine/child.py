"""The engine's child: takes sequences from the pipe, runs the core a step at a time, sends one message a step.

Knows neither requests nor text. The core is named by a dotted path and imported here only, so that the parent, which
imports this module for its types, never imports torch.
"""

import contextlib
import ctypes
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from types import ModuleType
from typing import Protocol, TypeAlias

from engine.errors import DeviceLostError, DeviceMemoryError, EngineError
from engine.messages import (
    AbortSequences,
    AddSequence,
    Begun,
    ChildMessage,
    CoreFailed,
    EngineInfo,
    EngineStats,
    GetStats,
    ParentMessage,
    Shutdown,
    StartCore,
    StartFailed,
    StartProgress,
    StepOutput,
)

PARENTS_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
"""A terminal sends them to the whole process group, but the parent decides."""

ChildPipe: TypeAlias = "Connection[ChildMessage, ParentMessage]"
Report: TypeAlias = Callable[[str], None]
"""Is told how far something has come that takes long."""


class Core(Protocol):
    """What the loop needs of `engine.core.EngineCore`."""

    info: EngineInfo
    announce: Callable[[Begun], None]
    """Called with sequence ids before the core first works on them; set by the loop."""

    def add(self, message: AddSequence) -> None:
        """Raises `InvalidRequestError` for a sequence that can never run."""

    def abort(self, sequence_ids: list[int]) -> None: ...

    def has_work(self) -> bool: ...

    def step(self) -> StepOutput: ...

    def get_stats(self) -> EngineStats: ...


class _ParentGone(Exception):
    """The pipe is closed, or the parent sent `Shutdown`."""


def import_named(start: StartCore, report: Report) -> ModuleType:
    """The module of the core that is asked for."""
    return import_module(start.core_path.partition(":")[0])


def serve(
    pipe: ChildPipe,
    on_parent_gone: Callable[[], None],
    *,
    prepare_core: Callable[[StartCore, Report], ModuleType] = import_named,
) -> None:
    """Loads the core that the first message asks for and steps it until the parent is gone.

    `on_parent_gone` is called the moment that is seen, on another thread; `prepare_core` imports the core's module.
    What goes wrong reaches the parent as `StartFailed` or `CoreFailed`; what the core cannot handle is raised as well.
    """
    inbox: SimpleQueue[ParentMessage] = SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, inbox, on_parent_gone), name="engine-inbox", daemon=True).start()
    try:
        core = _load(pipe, inbox.get(), prepare_core)
        if core is not None:
            _Loop(pipe, inbox, core).run()
    except (_ParentGone, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(CoreFailed(_describe(error)))
        raise


def _load(
    pipe: ChildPipe, start: ParentMessage, prepare_core: Callable[[StartCore, Report], ModuleType]
) -> Core | None:
    """The core, announced to the parent; None where it says itself why it cannot start."""
    if not isinstance(start, StartCore):
        raise _ParentGone
    try:
        module = prepare_core(start, lambda message: pipe.send(StartProgress(message)))
        core: Core = getattr(module, start.core_path.partition(":")[2])(start.config)
    except (DeviceLostError, DeviceMemoryError):  # of which the next process may find another one, or more
        raise
    except EngineError as error:
        pipe.send(StartFailed(str(error)))
        return None
    pipe.send(core.info)
    return core


def _receive(pipe: ChildPipe, inbox: SimpleQueue[ParentMessage], on_parent_gone: Callable[[], None]) -> None:
    """Reads on a thread of its own, so that the parent never waits for a step and its end is seen at once."""
    with contextlib.suppress(EOFError, OSError):
        while not isinstance(message := pipe.recv(), Shutdown):
            inbox.put(message)
    inbox.put(Shutdown())
    on_parent_gone()


class _Loop:
    """Takes all that is pending between two steps; sleeps on the inbox while there is no work."""

    def __init__(self, pipe: ChildPipe, inbox: SimpleQueue[ParentMessage], core: Core) -> None:
        self._pipe = pipe
        self._inbox = inbox
        self._core = core
        core.announce = pipe.send

    def run(self) -> None:
        while True:
            for message in self._pending():
                self._handle(message)
            if self._core.has_work():
                self._pipe.send(self._core.step())

    def _pending(self) -> Iterator[ParentMessage]:
        if not self._core.has_work():
            yield self._inbox.get()
        with contextlib.suppress(Empty):
            while True:
                yield self._inbox.get_nowait()

    def _handle(self, message: ParentMessage) -> None:
        match message:
            case AddSequence():
                self._add(message)
            case AbortSequences(sequence_ids):
                self._core.abort(sequence_ids)
            case GetStats():
                self._pipe.send(self._core.get_stats())
            case Shutdown():
                raise _ParentGone

    def _add(self, message: AddSequence) -> None:
        """A sequence that cannot be added fails alone."""
        try:
            self._core.add(message)
        except Exception as error:
            if not isinstance(error, EngineError):
                traceback.print_exc()
            reason = str(error) if isinstance(error, EngineError) else _describe(error)
            self._pipe.send(StepOutput.nothing(errors={message.sequence_id: reason}))


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def main() -> None:
    """A process of its own, whose pipe is the file descriptor given as its argument."""
    leave_signals_to_parent()
    fd = int(sys.argv[1])
    os.set_inheritable(fd, False)  # what the core starts must not keep the pipe open
    pipe: ChildPipe = Connection(fd)
    exit_code = 1
    try:
        serve(pipe, on_parent_gone=lambda: os._exit(0), prepare_core=_prepare_lightly)
        exit_code = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)  # a device's own threads must not hold up the end


def _prepare_lightly(start: StartCore, report: Report) -> ModuleType:
    """The engine's own core runs transformers' models and nothing else of it, in a process where nobody else does. A
    model that is to be fetched or converted first is."""
    is_ours = start.core_path.startswith("engine.core:")
    gc.disable()  # nearly all that an import makes stays
    if is_ours:
        import_module("engine.model.preflight").check_model(start.config, report)
        import_module("engine.model.light_transformers").import_transformers(start.config)
        import_module("engine.runner.model_runner")
    module = import_named(start, report)
    gc.freeze()
    gc.enable()
    if is_ours:
        locate = import_module("engine.model.locate")
        locate.prepare_model_dir(start.config.model_path, locate.cache_dir_of(start.config), report)
    return module


def leave_signals_to_parent() -> None:
    """The parent blocked its signals until now. When it ends, so does this process, whatever it does."""
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # a step that never yields cannot outlive the parent either
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
