"""An engine from its start to its end: the supervisor that keeps its child, and what is read from the model's folder.

Knows nothing of requests.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from engine.config import EngineConfig
from engine.embedding_reader import EmbeddingReader
from engine.errors import EngineNotRunningError
from engine.messages import EngineInfo
from engine.process import Child
from engine.prompt_reader import PromptReader
from engine.supervisor import Supervisor
from engine.tokenizer import Tokenizer


class EngineLifecycle:
    """Starts and stops, from any thread."""

    def __init__(self, config: EngineConfig, start_child: Callable[[EngineConfig], Child]) -> None:
        self._config = config
        self._start_child = start_child
        self._lock = threading.Lock()  # of start and stop
        self.after_outputs: Callable[[], None] = lambda: None
        """Called on the engine's thread once all outputs of a step have been delivered. It must not raise."""
        self.output_interval_seconds = 0.0
        """For how long new tokens of unfinished choices may be held, to be delivered together with later ones. Ends are
        delivered at once."""
        self._supervisor: Supervisor | None = None
        self._reader: PromptReader | None = None  # of the supervisor that runs
        self._embedding_reader: EmbeddingReader | None = None  # likewise

    def launch(self) -> None:
        """Begins to load the model and returns; `start()` waits for it. A second call does nothing."""
        self._launched()

    def start(self) -> None:
        """Returns once the model is loaded; an engine that runs is left as it is. Raises `ModelLoadError`."""
        supervisor = self._launched()
        if self._reader is not None:
            return
        try:
            info = supervisor.wait_until_ready()
            reader = PromptReader(Tokenizer.from_folder(info.model_dir), info)
            embedding_reader = EmbeddingReader.from_folder(Path(info.model_dir), reader.tokenizer, info)
        except BaseException:
            self._stop(supervisor)
            raise
        with self._lock:
            if self._supervisor is supervisor:
                self._reader, self._embedding_reader = reader, embedding_reader

    def _launched(self) -> Supervisor:
        with self._lock:
            if self._supervisor is None or self._supervisor.has_ended:
                self._reader = self._embedding_reader = None
                self._supervisor = Supervisor(
                    self._config, self._start_child, lambda: self.after_outputs(), lambda: self.output_interval_seconds
                )
                self._supervisor.launch()
            return self._supervisor

    def stop(self) -> None:
        """Ends the child within a second or two and every request with an error. May be called at any time, more than
        once."""
        self._stop(self._supervisor)

    def _stop(self, supervisor: Supervisor | None) -> None:
        """Another one that was launched meanwhile goes on."""
        with self._lock:
            if self._supervisor is supervisor:
                self._supervisor = self._reader = None
        if supervisor is not None:
            supervisor.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def info(self) -> EngineInfo:
        """What was loaded, as the child reported it at the start."""
        return self._running()[1].info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._running()[1].tokenizer

    @property
    def embedding_reader(self) -> EmbeddingReader:
        """How the model embeds, or why it does not."""
        self._running()
        assert self._embedding_reader is not None, "it is read with the tokenizer"
        return self._embedding_reader

    @property
    def is_healthy(self) -> bool:
        """Whether requests are served, perhaps only after a restart of the child that is in progress."""
        supervisor = self._supervisor
        return supervisor is not None and supervisor.is_healthy

    @property
    def last_step_at(self) -> float:
        """`time.monotonic()` of the child's last message; an idle child sends none."""
        return self._running()[0].last_step_at

    def get_stats(self) -> dict[str, Any]:
        """The fields of `EngineStats` (of the current child), `num_requests` and `num_restarts` (of the engine).

        Waits for the child's answer, which comes between two steps, for at most a second; then gives the last known.
        """
        return self._running()[0].get_stats()

    def _running(self) -> tuple[Supervisor, PromptReader]:
        supervisor, reader = self._supervisor, self._reader
        if supervisor is None or reader is None:
            raise EngineNotRunningError("the engine is not running: call start(), or use it as a context manager")
        return supervisor, reader
