"""Rank 0 of those that share a model: starts the others, tells them what to compute, and ends with any of them.

Only the leader decides: it announces each forward before it runs it, so that the ranks cannot diverge. A forward that
raises here has left the others within it; the leader is then lost, and the parent starts all of them again.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import TypeAlias, TypeVar

from torch import Tensor

from engine.config import EngineConfig
from engine.errors import DeviceLostError, ModelLoadError
from engine.model.devices import resolve_device
from engine.model.loader import LoadedModel, load_model
from engine.model.locate import cache_dir_of, prepare_model_dir
from engine.parallel.messages import (
    AllocateCache,
    FollowerFailed,
    FollowerMessage,
    LeaderMessage,
    Loaded,
    Measured,
    RunForward,
    StartFollower,
)
from engine.parallel.rank import Rank
from engine.parallel.row_parallel import join_ranks
from engine.process import describe_exit
from engine.python_process import start_python
from engine.runner.batch_inputs import BatchInputs
from engine.runner.step_budget import plain_rows
from engine.runner.step_forwards import Forwards
from engine.runner.step_sampler import StepLogits

M = TypeVar("M", Loaded, Measured)
LeaderPipe: TypeAlias = "Connection[LeaderMessage, FollowerMessage]"

_NOBODY = plain_rows(0)


class Leader:
    """Belongs to the child's process, and ends it when a follower ends."""

    def __init__(self, config: EngineConfig) -> None:
        """Start the followers, which load while this process does. Raises `ModelLoadError` if they cannot be."""
        if not hasattr(os, "memfd_create"):
            raise ModelLoadError("tensor_parallel_size needs Linux; set it to 1")
        self._config = config
        self._rank = Rank(0, config.tensor_parallel_size)
        resolve_device(config.device, self._rank)
        folder = prepare_model_dir(config.model_path, cache_dir_of(config))  # converted or fetched once, not by each
        self._store_fd = os.memfd_create("promptmill-ranks", 0)
        self._followers = [
            _Follower(StartFollower(replace(config, model_path=str(folder)), Rank(i, self._rank.size), self._store_fd))
            for i in range(1, self._rank.size)
        ]

    def load_model(self) -> LoadedModel:
        """This rank's part, joined with the others'. Raises `ModelLoadError`, also for them."""
        model = load_model(self._config, self._rank)
        for follower in self._followers:
            follower.receive(Loaded)
        self._group = join_ranks(model, self._config, self._rank, self._store_fd)
        return model

    def agree(self, own: Measured) -> AllocateCache:
        """What fits on every rank, of which the others allocate as much.

        NCCL allows no sum that some ranks replay and others launch, so that all must keep the same graphs.
        """
        measured = [own, *(follower.receive(Measured) for follower in self._followers)]
        least = AllocateCache(min(rank.num_blocks for rank in measured), min(rank.max_graphs for rank in measured))
        self._send(least)
        return least

    def run(self, forwards: Forwards, inputs: BatchInputs, token_ids: Tensor | None) -> StepLogits:
        """A forward of all ranks. Raises `DeviceLostError`."""
        arrays = replace(inputs, sampling=_NOBODY, edits=None, masks=None, following=None)
        with _lost_if_it_raises():
            self._send(RunForward(arrays, 0 if token_ids is None else len(token_ids)))
            if token_ids is not None:
                self._group.give(token_ids)
            return forwards.run(inputs, token_ids)

    def _send(self, message: LeaderMessage) -> None:
        packed = ForkingPickler.dumps(message)  # once for all
        for follower in self._followers:
            follower.send(packed)


class AnnouncedForwards:
    """`Forwards` of all ranks."""

    def __init__(self, leader: Leader, own: Forwards) -> None:
        self._leader = leader
        self._own = own

    def run(self, inputs: BatchInputs, token_ids: Tensor | None = None) -> StepLogits:
        """See `Forwards.run`. Raises `DeviceLostError` for whatever goes wrong."""
        return self._leader.run(self._own, inputs, token_ids)


class _Follower:
    """A follower's process as the leader sees it."""

    def __init__(self, start: StartFollower) -> None:
        self._pipe, end = _pipe()
        self._rank = start.rank
        self._inbox: SimpleQueue[FollowerMessage] = SimpleQueue()
        self._process = start_python(
            "engine.parallel.follower", [end.fileno()], fds=[end.fileno(), start.store_fd], env=os.environ
        )
        end.close()
        self._pipe.send(start)
        threading.Thread(target=self._read, name=f"follower-{start.rank.index}", daemon=True).start()

    def send(self, packed: memoryview) -> None:
        self._pipe.send_bytes(packed)

    def receive(self, kind: type[M]) -> M:
        """Wait for a message of the start. Raises `ModelLoadError` if the rank failed."""
        message = self._inbox.get()
        if isinstance(message, FollowerFailed):
            raise ModelLoadError(message.reason)
        assert isinstance(message, kind), "a start has one order"
        return message

    def _read(self) -> None:
        """Until the follower ends. It may be waited for in a collective, so that nothing but this thread can act."""
        with suppress(EOFError, OSError):
            while True:
                self._inbox.put(self._pipe.recv())
        print(describe_exit(str(self._rank), self._process.wait()), file=sys.stderr, flush=True)
        os._exit(1)


def _pipe() -> tuple[LeaderPipe, LeaderPipe]:
    return Pipe()


@contextmanager
def _lost_if_it_raises() -> Iterator[None]:
    try:
        yield
    except DeviceLostError:
        raise
    except Exception as error:
        raise DeviceLostError(f"a forward failed on rank 0, and the other ranks are within it: {error!r}") from error
