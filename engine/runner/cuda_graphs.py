"""Runs padded steps as CUDA graphs, each captured when its shape is seen for the second time.

A launch costs the host some microseconds, and a step has hundreds: a replay costs one. The first step of a shape runs
kernel by kernel, which also compiles what was not compiled yet. All graphs share one memory pool and one buffer of
logits. A shape for which there is no memory stays uncaptured; a model whose forward cannot be captured, since it waits
for the device, has no graphs at all. Knows nothing of sampling.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.model.loader import LoadedModel
from engine.runner.batch_inputs import BatchInputs
from engine.runner.device_errors import is_of_memory
from engine.runner.step_shapes import StepBuffers, StepShape, choose_shape, largest_shapes

logger = logging.getLogger(__name__)


class Graph(Protocol):
    def replay(self) -> None:
        """Run what was captured, on the inputs that lie in its memory now."""
        ...


Capture = Callable[[Callable[[], Any]], Graph]


@dataclass(frozen=True, slots=True)
class Uncaptured:
    """Stands in for the graph of what cannot be captured: it is run as it is."""

    replay: Callable[[], Any]


class CudaCapture:
    """Captures into graphs that share a pool and a stream.

    Not `torch.cuda.graph`: that gives all cached memory back to the driver before each capture, and stays on its stream
    when a capture fails.
    """

    def __init__(self, errors_of: str = "global") -> None:
        """errors_of: whose calls spoil a capture; see `capture_error_mode` of `torch.cuda.graph`."""
        self._errors_of = errors_of
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], Any]) -> Graph:
        """Capture what `run` launches, without running it. Raises what `run` does, or `torch.AcceleratorError`."""
        try:
            return self._capture(run)
        except RuntimeError as error:
            if not is_of_memory(error):
                raise
        torch.cuda.empty_cache()  # what plain steps have cached is not given back while one is captured
        return self._capture(run)

    def _capture(self, run: Callable[[], Any]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode=self._errors_of)
            try:
                run()
            finally:
                self._end(graph)
        return graph

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """torch leaves the pool open where a capture cannot be ended, and empties no cache while one is."""
        try:
            graph.capture_end()
        except RuntimeError:
            with suppress(RuntimeError):  # it is closed already
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            raise


class GraphedSteps:
    """The padded steps of one model."""

    def __init__(
        self, model: LoadedModel, *, max_num_seqs: int, max_num_tokens: int, make_capture: Callable[[], Capture]
    ) -> None:
        """Of steps of `max_num_tokens` at most; `make_capture`: gives captures a memory pool of their own."""
        self._model = model
        self._make_capture = make_capture
        self.capture = make_capture()  # into the memory pool of the steps
        self._max_num_seqs = max_num_seqs
        self._max_blocks = -(-model.max_model_len // model.block_size)
        self._largest = largest_shapes(max_num_seqs, max_num_tokens, self._max_blocks, row_step=model.row_step)
        self._buffers = StepBuffers(self._largest, model.device)
        max_rows = self._largest[0].num_logits
        # [max_rows, vocab_size], where every step's lie
        self.logits = torch.empty((max_rows, model.vocab_size), dtype=model.dtypes.activations, device=model.device)
        self._graphs: dict[StepShape, Graph | None] = {}  # None: seen once
        self._can_capture = True

    @property
    def num_graphs(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def measure(self, free_bytes: Callable[[], int]) -> int:
        """Bytes that graphs of the largest shapes take: of these two, which are captured and dropped.

        `free_bytes`: what is free on the device. Raises what torch does for want of memory. Needs a KV cache, of any
        size.
        """
        for shape in self._largest:  # compiles and warms up
            self._buffers.fill(shape, None)
            self._forward(shape)
        before = free_bytes()
        capture = self._make_capture()
        try:
            graphs = [capture(lambda shape=shape: self._forward(shape)) for shape in self._largest]  # type: ignore[misc]
        except RuntimeError as error:
            if is_of_memory(error):
                raise
            self._give_up(self._largest[0], error)
            return 0
        num_bytes = before - free_bytes()
        del graphs
        return max(num_bytes, 0)

    def run(self, inputs: BatchInputs, token_ids: Tensor | None = None) -> tuple[Tensor, Tensor, int] | None:
        """Logits `[num_sampled, vocab_size]`, the sampled positions, and of how many rows logits were computed; None if
        the step is not one for graphs.

        token_ids: int64 on the device, in place of the inputs' first ones. What is returned lies in memory that the
        next step overwrites. Mutates the KV cache.
        """
        shape = choose_shape(
            inputs, max_num_seqs=self._max_num_seqs, max_blocks=self._max_blocks, row_step=self._model.row_step
        )
        if shape is None:
            return None
        self._buffers.fill(shape, inputs)
        tensors = self._buffers.tensors(shape)
        if token_ids is not None:
            tensors.input_ids[: len(token_ids)].copy_(token_ids)
        graph = self._graph(shape)
        if graph is None:
            self._forward(shape)
        else:
            graph.replay()
        num_sampled = len(inputs.logits_indices)
        return self.logits[:num_sampled], tensors.sampled_positions[:num_sampled], shape.num_logits

    def _graph(self, shape: StepShape) -> Graph | None:
        if shape not in self._graphs:
            self._graphs[shape] = None
        elif self._graphs[shape] is None and self._can_capture:
            try:
                self._graphs[shape] = self.capture(lambda: self._forward(shape))
            except RuntimeError as error:
                self._give_up(shape, error)
        return self._graphs[shape]

    def _give_up(self, shape: StepShape, error: RuntimeError) -> None:
        """A shape for which there is no memory, or all of them, if something in the model waits for the device."""
        logger.warning("action=capture_failed shape=%s reason=%r", shape, str(error).partition("\n")[0])
        self._graphs[shape] = Uncaptured(lambda: self._forward(shape))
        self._can_capture = is_of_memory(error)

    def _forward(self, shape: StepShape) -> None:
        tensors = self._buffers.tensors(shape)
        self._model.context.batch = tensors.batch(shape, self._model.block_size)
        self._model.forward(
            tensors.input_ids,
            tensors.position_ids,
            tensors.logits_indices,
            out=self.logits[: shape.num_logits],
        )
