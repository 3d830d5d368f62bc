"""A step's arrays to its logits: sent to the device, then through the model, kernel by kernel or as a CUDA graph.

Knows nothing of sampling, nor of steps before and after.
"""

import logging
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.attention.base import AttentionBatch
from engine.config import EngineConfig
from engine.model.loader import LoadedModel
from engine.runner.batch_inputs import BatchInputs
from engine.runner.cuda_graphs import CudaCapture, GraphedSteps
from engine.runner.device_errors import is_of_memory
from engine.runner.memory import MeasureGraphs
from engine.runner.step_sampler import StepLogits
from engine.runner.transfer import HostToDevice

logger = logging.getLogger(__name__)

_NOTHING = np.zeros(0, np.int64)


class Forwards(Protocol):
    """What a runner needs of whatever computes its forwards."""

    def run(self, inputs: BatchInputs, token_ids: Tensor | None = None) -> StepLogits:
        """token_ids: int64 on the device, in place of the inputs' first ones. Mutates the KV cache."""
        ...


class StepForwards:
    """`Forwards` of one model in this process."""

    def __init__(self, config: EngineConfig, model: LoadedModel, to_device: HostToDevice) -> None:
        self._model = model
        self._to_device = to_device
        self._graphs = _graphed_steps(config, model)

    @property
    def graphs(self) -> GraphedSteps | None:
        """None where there are none."""
        return self._graphs

    @property
    def measure_graphs(self) -> MeasureGraphs | None:
        """None where there are no graphs."""
        return self._graphs.measure if self._graphs is not None else None

    @property
    def max_graphs(self) -> int:
        """How many are kept, at most."""
        return self._graphs.max_graphs if self._graphs is not None else 0

    def prepare(self, max_graphs: int) -> None:
        """See `GraphedSteps.prepare`. Without memory for it steps run nevertheless, unless other ranks take part.

        max_graphs: the least of all ranks'.
        """
        if self._graphs is None:
            return
        self._graphs.max_graphs = max_graphs
        try:
            self._graphs.prepare()
        except RuntimeError as error:
            if self._graphs.has_ranks or not is_of_memory(error):
                raise
            logger.warning("action=graphs_unprepared reason=%r", str(error).partition("\n")[0])

    def run(self, inputs: BatchInputs, token_ids: Tensor | None = None) -> StepLogits:
        """See `Forwards.run`."""
        if self._graphs is not None and (graphed := self._graphs.run(inputs, token_ids)) is not None:
            logits, positions, num_rows = graphed
            return StepLogits(logits, positions, num_buffer_rows=num_rows)
        return self.run_eagerly(inputs, token_ids)

    def run_eagerly(self, inputs: BatchInputs, token_ids: Tensor | None = None) -> StepLogits:
        """`run`, kernel by kernel."""
        scored = inputs.scored
        num_sampled = len(inputs.logits_indices)
        logits_indices = inputs.logits_indices
        if scored is not None:
            logits_indices = np.concatenate((logits_indices, scored.logits_indices))
        elif not num_sampled and inputs.pooled is None:  # a model gives one row at least; nobody reads this one
            logits_indices = np.array([inputs.num_tokens - 1], np.int64)
        input_ids, position_ids, logits_rows, sampled_positions, scored_ids, pooled_rows, *batch = self._to_device.send(
            inputs.input_ids,
            inputs.position_ids,
            logits_indices,
            inputs.sampled_positions,
            scored.token_ids if scored is not None else _NOTHING,
            inputs.pooled.indices if inputs.pooled is not None else _NOTHING,
            inputs.slot_mapping,
            inputs.query_start,
            inputs.context_lens,
            inputs.block_tables,
        )
        slot_mapping, query_start, context_lens, block_tables = batch
        self._model.context.batch = AttentionBatch(
            query_start=query_start,
            context_lens=context_lens,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            num_seqs=inputs.num_seqs,
            num_tokens=inputs.num_tokens,
            max_query_len=inputs.max_query_len,
            max_context_len=inputs.max_context_len,
            num_decodes=inputs.num_decodes,
        )
        if token_ids is not None:
            input_ids = torch.cat((token_ids, input_ids[len(token_ids) :]))
        if inputs.pooled is None:
            logits, hidden_states = self._model.forward(input_ids, position_ids, logits_rows), None
        else:
            logits, hidden_states = self._model.forward_pooled(input_ids, position_ids, logits_rows, pooled_rows)
        if scored is not None:
            return StepLogits(logits, sampled_positions, scored_ids, hidden_states)
        return StepLogits(logits[:num_sampled], sampled_positions, hidden_states=hidden_states)


def _graphed_steps(config: EngineConfig, model: LoadedModel) -> GraphedSteps | None:
    """None where kernels are launched one by one: the host's time counts on CUDA alone, and torch's attention waits."""
    if not config.cuda_graphs or model.device.type != "cuda" or not model.uses_triton:
        return None
    # NCCL asks for its events on a thread of its own, at any time.
    make_capture = CudaCapture if config.tensor_parallel_size == 1 else partial(CudaCapture, "thread_local")
    return GraphedSteps(
        model,
        max_num_seqs=config.max_num_seqs,
        max_num_tokens=config.step_tokens(str(model.device)),
        has_ranks=config.tensor_parallel_size > 1,
        make_capture=make_capture,
    )
