"""Draws the tokens of padded steps with CUDA graphs, one for each number of rows and kind of draw.

A small model computes a step in less time than a host takes to launch a draw's kernels one by one. What a graph reads
lies in one place: the logits of `GraphedSteps`, and the rows' parameters. Knows nothing of models or steps.
"""

import logging
from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from engine.runner.cuda_graphs import Capture, Graph, Uncaptured
from engine.runner.device_errors import is_of_memory
from engine.sampler import Sampler, SamplingBatch

logger = logging.getLogger(__name__)

_Kind = tuple[int, bool, bool]  # rows, may_draw, may_cut


class GraphedDraws:
    """Draws for rows that ask for nothing but a token, from one buffer of logits."""

    def __init__(self, sampler: Sampler, logits: Tensor, capture: Capture) -> None:
        """logits: `[max_rows, vocab_size]`, where every step's lie."""
        max_rows = len(logits)
        self._sampler = sampler
        self._logits = logits
        self._capture = capture
        # Each in memory of its own, aligned as all others' is: kernels are compiled for that.
        temperature, top_p, min_p = (logits.new_zeros(max_rows, dtype=torch.float32) for _ in range(3))
        top_k, seed, choice, position, self._tokens = (logits.new_zeros(max_rows, dtype=torch.int64) for _ in range(5))
        self._batch = SamplingBatch(temperature, top_p, top_k, min_p, seed, choice, position)
        self._placed: Tensor | None = None  # the temperatures of the rows whose parameters lie there
        self._graphs: dict[_Kind, Graph | None] = {}  # None: seen once

    def draw(self, batch: SamplingBatch, num_rows: int) -> Tensor:
        """As `Sampler.sample` and `Sampler.settle` of the buffer's first rows, in memory that the next draw overwrites.

        num_rows: the batch's, and perhaps some rows of padding.
        """
        if batch.may_draw:
            self._place(batch)
        self._compute((num_rows, batch.may_draw, batch.may_cut))
        tokens: Tensor = self._tokens[: len(batch.position)]
        return tokens

    def _compute(self, kind: _Kind) -> None:
        """By the kind's graph, from the second time on; see `GraphedSteps._compute`."""
        if kind not in self._graphs:
            self._graphs[kind] = None
            self._run(kind)
            return
        graph = self._graphs[kind] = self._graphs[kind] or self._captured(lambda: self._run(kind))
        try:
            graph.replay()
        except RuntimeError as error:
            if isinstance(graph, Uncaptured) or not is_of_memory(error):
                raise
            graph = self._graphs[kind] = self._given_up(lambda: self._run(kind), error)
            graph.replay()

    def _place(self, batch: SamplingBatch) -> None:
        """What does not change while the same rows are drawn for is copied once."""
        count = len(batch.position)
        self._batch.position[:count].copy_(batch.position)
        if batch.temperature is self._placed:
            return
        for field in fields(batch):
            values = getattr(batch, field.name)
            if isinstance(values, Tensor) and values is not batch.position:
                getattr(self._batch, field.name)[:count].copy_(values)
        self._placed = batch.temperature

    def _captured(self, run: Callable[[], None]) -> Graph:
        """What cannot be captured is run as it is."""
        try:
            return self._capture(run)
        except RuntimeError as error:
            return self._given_up(run, error)

    def _given_up(self, run: Callable[[], None], error: RuntimeError) -> Graph:
        logger.warning("action=draw_capture_failed reason=%r", str(error).partition("\n")[0])
        return Uncaptured(run)

    def _run(self, kind: _Kind) -> None:
        num_rows, may_draw, may_cut = kind
        batch = self._batch.first(num_rows, may_draw=may_draw, may_cut=may_cut)
        logits, tokens = self._logits[:num_rows], self._tokens[:num_rows]
        tokens.copy_(self._sampler.sample(logits, batch))
        self._sampler.settle(logits, tokens)
