"""The ranks of one model as threads of this process, which add up their parts in memory."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from engine.config import EngineConfig
from engine.model.loader import LoadedModel, load_model
from engine.parallel.rank import Rank
from engine.parallel.row_parallel import add_up_parts
from tests.fakes.waiting import WAIT_SECONDS

R = TypeVar("R")


class RankThreads:
    """A model in parts, each on a thread while it runs."""

    def __init__(self, folder: Path, size: int, **fields: Any) -> None:
        """fields: of `EngineConfig`."""
        config = EngineConfig(model_path=str(folder), device="cpu", tensor_parallel_size=size, **fields)
        self._barrier = threading.Barrier(size)
        self._parts: list[Tensor | None] = [None] * size
        self.models = [load_model(config, Rank(index, size)) for index in range(size)]
        for index, model in enumerate(self.models):
            add_up_parts(model.model, _Member(self, index))

    def run(self, function: Callable[[LoadedModel], R]) -> R:
        """The leader's result, while the others do the same."""
        with ThreadPoolExecutor(len(self.models)) as pool:
            leader, *others = [pool.submit(self._guard, function, model) for model in self.models]
            for other in others:
                other.result(WAIT_SECONDS)
            return leader.result(WAIT_SECONDS)

    def add_up(self, index: int, part: Tensor) -> Tensor:
        self._parts[index] = part
        self._barrier.wait(WAIT_SECONDS)
        first, *others = (part for part in self._parts if part is not None)
        total = first.clone()
        for other in others:
            total += other
        self._barrier.wait(WAIT_SECONDS)
        return total

    def _guard(self, function: Callable[[LoadedModel], R], model: LoadedModel) -> R:
        try:
            return function(model)
        except BaseException:
            self._barrier.abort()
            raise


@dataclass
class _Member:
    ranks: RankThreads
    index: int

    def add_up(self, part: Tensor) -> Tensor:
        return self.ranks.add_up(self.index, part)
