"""An engine's child played by hand: what it is told is looked at, what it says and when it dies is the test's."""

from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import Queue
from typing import Any

from engine.config import EngineConfig
from engine.messages import ChildMessage, EngineInfo, EngineStats, GetStats, ParentMessage
from tests.fakes.waiting import WAIT_SECONDS

INFO = EngineInfo(
    model_dir="",
    device="none",
    dtype="none",
    attention="none",
    max_model_len=1000,
    vocab_size=300,
    eos_token_ids=(1,),
    block_size=16,
    num_kv_blocks=100,
    fingerprint="played",
)


class PlayedChild:
    """A `Supervised`. Who asks for its figures has them at once, unless it `is_silent`."""

    def __init__(self) -> None:
        self.is_silent = False
        self.pipe: Connection[Any, Any]
        self.pipe, self._far_end = Pipe()
        self._told: Queue[ParentMessage] = Queue()

    def send(self, message: ParentMessage) -> None:
        if not isinstance(message, GetStats):
            self._told.put(message)
        elif not self.is_silent:
            self.say(EngineStats())

    def kill(self) -> None:
        self.die()

    def close(self) -> str:
        self.pipe.close()
        return "killed by hand"

    def is_told(self) -> ParentMessage:
        """The next message."""
        return self._told.get(timeout=WAIT_SECONDS)

    def say(self, message: ChildMessage) -> None:
        self._far_end.send(message)

    def die(self) -> None:
        self._far_end.close()


class Children:
    """Starts them, in `ChildProcess`' place. The first child may be ready at once, the others are on `say(INFO)`."""

    def __init__(self, *, is_first_ready: bool = True) -> None:
        self._started: Queue[PlayedChild] = Queue()
        self._is_next_ready = is_first_ready

    def __call__(self, config: EngineConfig) -> PlayedChild:
        child = PlayedChild()
        if self._is_next_ready:
            child.say(INFO)
        self._is_next_ready = False
        self._started.put(child)
        return child

    def next(self) -> PlayedChild:
        return self._started.get(timeout=WAIT_SECONDS)
