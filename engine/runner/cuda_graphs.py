"""Runs padded steps as CUDA graphs, each captured when its shape is seen for the second time.

A launch costs the host some microseconds, and a step has hundreds: a replay costs one. The first step of a shape runs
kernel by kernel. All graphs share one memory pool and one buffer of logits; beside these each has memory of its own, so
only so many are kept. A shape for which there is no memory stays uncaptured; a model whose forward cannot be captured,
since it waits for the device, has no graphs at all. Knows nothing of sampling.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.model.loader import LoadedModel
from engine.runner.batch_inputs import BatchInputs
from engine.runner.device_errors import is_of_memory
from engine.runner.step_shapes import StepBuffers, StepShape, choose_shape, every_table, largest_shapes

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 512
_LEAST_GRAPHS = 16  # in however little memory: the shapes of one load, if they come again and again
_LONG_UNUSED = 1000  # steps; to capture a graph in place of another costs as much as some launches kernel by kernel


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
        self._keeper: torch.cuda.CUDAGraph | None = None  # of the pool: torch captures into none whose graphs are gone
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.num_captured = 0
        self.seconds = 0.0  # that captures took, and so the work that waited
        self.num_bytes = 0  # that they took of the device's memory, pool included

    def __call__(self, run: Callable[[], Any]) -> Graph:
        """Capture what `run` launches, without running it. Raises what `run` does, or `torch.AcceleratorError`."""
        begun, free_bytes = time.perf_counter(), torch.cuda.mem_get_info()[0]
        graph = self._capture_if_there_is_memory(run)
        if graph is None:
            torch.cuda.empty_cache()  # what plain steps have cached is not given back while one is captured
            graph = self._capture(run)
        self.num_captured += 1
        self.seconds += time.perf_counter() - begun
        self.num_bytes += max(0, free_bytes - torch.cuda.mem_get_info()[0])
        return graph

    def _capture_if_there_is_memory(self, run: Callable[[], Any]) -> Graph | None:
        try:
            return self._capture(run)
        except RuntimeError as error:
            if not is_of_memory(error):
                raise
        return None

    def _capture(self, run: Callable[[], Any]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode=self._errors_of)
                run()
            except BaseException:
                with suppress(RuntimeError):  # of a capture that is spoilt, which tells less than what spoilt it
                    self._end(graph)
                raise
            self._end(graph)
        return graph

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """torch may leave the pool open where a capture cannot be ended, and empties no cache while one is. Nor does it
        capture into that pool again, since nobody can close what it keeps of it for pinned memory: another one is for
        the next."""
        self._keeper = self._keeper or graph
        try:
            graph.capture_end()
        except RuntimeError:
            with suppress(RuntimeError):  # it is closed already
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
                self._pool, self._keeper = torch.cuda.graph_pool_handle(), None
            raise


class GraphedSteps:
    """The padded steps of one model."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        make_capture: Callable[[], Capture],
        has_ranks: bool = False,
    ) -> None:
        """Of steps of `max_num_tokens` at most; `make_capture`: gives captures a memory pool of their own; `has_ranks`:
        whether others take part in each step, which then capture and replay what this one does."""
        self._model = model
        self.has_ranks = has_ranks
        self._make_capture = make_capture
        self.capture = make_capture()  # into the memory pool of the steps
        self._max_num_seqs = max_num_seqs
        self._max_blocks = -(-model.max_model_len // model.block_size)
        self._largest = largest_shapes(max_num_seqs, max_num_tokens, self._max_blocks, row_step=model.row_step)
        self._buffers = StepBuffers(self._largest, model.device)
        max_rows = self._largest[0].num_logits
        # [max_rows, vocab_size], where every step's lie
        self.logits = torch.empty((max_rows, model.vocab_size), dtype=model.dtypes.activations, device=model.device)
        self._graphs: dict[StepShape, Graph] = {}
        self._last_runs: dict[StepShape, int] = {}  # of the shapes that were seen, the last one's number
        self._num_runs = 0
        self.max_graphs = _MAX_GRAPHS  # that are kept; none if a forward cannot be captured

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def measure(self, free_bytes: Callable[[], int], spare_share: float) -> int:
        """Bytes that graphs of the largest shapes take: of these two, which are captured and dropped. What one more
        takes decides how many are kept, since half of what the KV cache leaves is for them.

        `free_bytes`: what is free on the device; `spare_share`: how much of it the cache leaves. Raises what torch does
        for want of memory. Needs a KV cache, of any size.
        """
        for shape in self._largest:  # compiles and warms up
            self._run_padding(shape)
        before = free_bytes()
        capture = self._make_capture()
        left, graphs = [], []
        try:
            for shape in (*self._largest, self._largest[-1]):
                graphs.append(capture(lambda shape=shape: self._forward(shape)))  # type: ignore[misc]
                graphs[-1].replay()  # some of its memory is taken only then
                left.append(free_bytes())
        except RuntimeError as error:
            if is_of_memory(error):
                raise
            self._give_up(self._largest[0], error)
            return 0
        graphs.clear()
        del capture  # and with it their memory pool
        *_, with_largest, with_one_more = left
        room, one_more = int(spare_share * free_bytes()) // 2, max(with_largest - with_one_more, 1)
        self.max_graphs = min(_MAX_GRAPHS, max(_LEAST_GRAPHS, room // one_more))
        logger.info("action=graphs_measured bytes_of_one=%d max_graphs=%d", one_more, self.max_graphs)
        return max(before - with_largest, 0)

    def prepare(self) -> None:
        """Run padding alone through every kernel that a step's graph may have, so that none is compiled later, beside
        sequences; and capture the largest shapes, in whose memory all others then have room.

        Needs the KV cache that steps will use. Raises what torch does for want of memory: steps may run all the same.
        """
        for shape in self._largest:
            self._run_padding(shape)
            if self.max_graphs:
                self._capture(shape)
        for shape in self._shapes_of_all_kernels():
            self._run_padding(shape)
            self._last_runs[shape] = 0

    def _shapes_of_all_kernels(self) -> Iterator[StepShape]:
        context, row_step = self._model.context, self._model.row_step
        assert context.paged_backend is not None and context.kv_cache is not None, "graphs are of Triton's kernels"
        seen = set()
        for shape in every_table(self._max_num_seqs, self._max_blocks, row_step=row_step):
            batch = self._buffers.tensors(shape).batch(shape, self._model.block_size)
            kernels = context.paged_backend.kernels_of(batch, context.kv_cache[0])
            if kernels not in seen:
                seen.add(kernels)
                yield shape

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
        self._compute(shape)
        num_sampled = len(inputs.logits_indices)
        return self.logits[:num_sampled], tensors.sampled_positions[:num_sampled], shape.num_logits

    def _compute(self, shape: StepShape) -> None:
        """What lies in the buffers, by the shape's graph if it has one. Some of a graph's memory is taken only when it
        is replayed: a shape that lacks it then is one that cannot be captured."""
        graph = self._graph(shape)
        try:
            if graph is not None:
                graph.replay()
                return
        except RuntimeError as error:
            if isinstance(graph, Uncaptured) or not is_of_memory(error):
                raise
            self._give_up(shape, error)
        del graph  # what memory it has is for the step
        self._forward(shape)

    def _graph(self, shape: StepShape) -> Graph | None:
        self._num_runs += 1
        if shape in self._last_runs and shape not in self._graphs and self._has_room():
            self._capture(shape)
        self._last_runs[shape] = self._num_runs
        return self._graphs.get(shape)

    def _has_room(self) -> bool:
        """Whether one more graph may be kept, perhaps in place of one that was not replayed for long."""
        if len(self._graphs) < self.max_graphs:
            return True
        if not self.max_graphs:
            return False
        oldest = min(self._graphs, key=self._last_runs.__getitem__)
        if self._num_runs - self._last_runs[oldest] <= _LONG_UNUSED:
            return False
        del self._graphs[oldest]
        return True

    def _capture(self, shape: StepShape) -> None:
        self._last_runs.setdefault(shape, 0)
        try:
            self._graphs[shape] = self.capture(lambda: self._forward(shape))
        except RuntimeError as error:
            self._give_up(shape, error)

    def _give_up(self, shape: StepShape, error: RuntimeError) -> None:
        """A shape for which there is no memory, or all of them, if something in the model waits for the device."""
        logger.warning("action=capture_failed shape=%s reason=%r", shape, str(error).partition("\n")[0])
        self._graphs[shape] = Uncaptured(lambda: self._forward(shape))
        if not is_of_memory(error):
            self.max_graphs = 0
        elif self.has_ranks:  # the others have captured it, and would wait
            raise error

    def _run_padding(self, shape: StepShape) -> None:
        self._buffers.fill(shape, None)
        self._forward(shape)

    def _forward(self, shape: StepShape) -> None:
        tensors = self._buffers.tensors(shape)
        self._model.context.batch = tensors.batch(shape, self._model.block_size)
        self._model.forward(
            tensors.input_ids,
            tensors.position_ids,
            tensors.logits_indices,
            out=self.logits[: shape.num_logits],
        )
