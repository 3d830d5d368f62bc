"""A follower's process: what it hears from the leader, and how it ends. It never outlives the leader.

What it computes is `engine.parallel.shard_runner`'s affair. Imports torch only once it is told of a model.
"""

import gc
import os
import sys
import threading
import traceback
from importlib import import_module
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeAlias

from engine.child import leave_signals_to_parent
from engine.errors import EngineError
from engine.parallel.messages import (
    AllocateCache,
    FollowerFailed,
    FollowerMessage,
    LeaderMessage,
    Loaded,
    RunForward,
    StartFollower,
)

FollowerPipe: TypeAlias = "Connection[FollowerMessage, LeaderMessage]"

_FAREWELL_SECONDS = 5.0  # what a leader has to read why a start failed, if it does not wait for this very rank


def main() -> None:
    """A process of its own, whose pipe is the file descriptor given as its argument."""
    leave_signals_to_parent()
    pipe: FollowerPipe = Connection(int(sys.argv[1]))
    os.set_inheritable(pipe.fileno(), False)
    inbox: SimpleQueue[LeaderMessage] = SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, inbox), name="follower-inbox", daemon=True).start()
    try:
        _follow(pipe, inbox)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)  # the leader ends with it


def _receive(pipe: FollowerPipe, inbox: SimpleQueue[LeaderMessage]) -> None:
    """On a thread of its own, so that the leader's end is seen at once, whatever collective this rank is in."""
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)


def _follow(pipe: FollowerPipe, inbox: SimpleQueue[LeaderMessage]) -> None:
    runner = _start(pipe, inbox)
    while True:
        message = inbox.get()
        assert isinstance(message, RunForward), "steps follow the cache"
        runner.run(message)


def _start(pipe: FollowerPipe, inbox: SimpleQueue[LeaderMessage]) -> "ShardRunner":
    start = inbox.get()
    assert isinstance(start, StartFollower), "the first message says what to load"
    try:
        import_module("engine.model.light_transformers").import_transformers(start.config)
        runner: ShardRunner = import_module("engine.parallel.shard_runner").ShardRunner(start.config, start.rank)
        pipe.send(Loaded())
        runner.join(start.store_fd)
        pipe.send(runner.measure())
        allocate = inbox.get()
        assert isinstance(allocate, AllocateCache), "blocks are agreed upon before the first step"
        runner.allocate(allocate)
        gc.freeze()  # what is there now stays
        return runner
    except EngineError as error:
        pipe.send(FollowerFailed(f"{start.rank}: {error}"))
        threading.Event().wait(_FAREWELL_SECONDS)
        raise


if TYPE_CHECKING:
    from engine.parallel.shard_runner import ShardRunner
