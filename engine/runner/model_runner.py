"""Runs steps on a device: takes numpy arrays, runs the model over its KV cache and the sampler, returns tokens.

Owns the loaded model and the cache's size. Knows nothing of sequences.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import DeviceMemoryError
from engine.messages import EngineInfo
from engine.model.devices import describe_devices
from engine.model.loader import LoadedModel, load_model
from engine.parallel.leader import AnnouncedForwards, Leader
from engine.parallel.messages import Measured
from engine.runner.batch_inputs import BatchInputs
from engine.runner.device_errors import device_errors
from engine.runner.first_steps import first_steps
from engine.runner.graphed_draws import GraphedDraws
from engine.runner.memory import choose_num_blocks, largest_step, warn_of_short_context
from engine.runner.step_ahead import StepAhead, Taken
from engine.runner.step_budget import few_prefill_tokens, measure_step_tokens
from engine.runner.step_forwards import Forwards, StepForwards
from engine.runner.step_sampler import DeviceTokens, StepLogits, StepSampler
from engine.runner.thread_governor import ThreadGovernor
from engine.runner.transfer import HostToDevice
from engine.sampler import create_sampler
from engine.step_plan import SampledTokens

logger = logging.getLogger(__name__)

_FIRST_ROWS = 2  # of logits that are drawn from before any job's are


@dataclass(frozen=True, slots=True, eq=False)
class _StepAhead:
    """The part of a step that was computed before its plan existed."""

    logits: Tensor  # [num_sampled, vocab_size]
    token_ids: Tensor | None  # int64 [num_sampled], if rows need only logits; the next draw reuses its memory


class ModelRunner:
    """`Runner` on torch."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the model and allocate its cache. Raises `ModelLoadError` with the remedy."""
        leader = Leader(config) if config.tensor_parallel_size > 1 else None
        self._model: LoadedModel = load_model(config) if leader is None else leader.load_model()
        self._to_device = HostToDevice(self._model.device)
        sampler = create_sampler(self._model.device, self._model.cache_dir, uses_triton=self._model.uses_triton)
        own = StepForwards(config, self._model, self._to_device)
        self.graphs = own.graphs  # None: there are none
        draws = None if self.graphs is None else GraphedDraws(sampler, self.graphs.logits, self.graphs.capture)
        self._sampler = StepSampler(sampler, self._to_device, draws)
        self._ahead = StepAhead(self._compute_ahead) if self._runs_ahead() else None
        num_blocks = choose_num_blocks(
            config, self._model, lambda: self._run_largest_step(own, config), own.measure_graphs
        )
        max_graphs = own.max_graphs
        if leader is not None:
            agreed = leader.agree(Measured(num_blocks, max_graphs))
            num_blocks, max_graphs = agreed.num_blocks, agreed.max_graphs
        warn_of_short_context(config, self._model, num_blocks)
        self._forwards: Forwards = own if leader is None else AnnouncedForwards(leader, own)
        self._model.allocate_kv_cache(num_blocks)
        own.prepare(max_graphs)
        if self._ahead is not None:
            self._prepare(config, num_blocks)
        is_measured = self._ahead is not None and config.max_num_tokens is None
        step_tokens = measure_step_tokens(config, self._model, num_blocks, self._run_to_end) if is_measured else None
        self.info = self._describe(config, num_blocks, step_tokens)
        self._governor = _thread_governor(config, self._model.device)

    @torch.inference_mode()
    def execute(self, inputs: BatchInputs) -> SampledTokens:
        """See `Runner.execute`."""
        if self._governor is None:
            return self._execute(inputs)
        self._governor.begin(inputs.num_tokens)
        tokens = self._execute(inputs)
        self._governor.end()
        return tokens

    def _execute(self, inputs: BatchInputs) -> SampledTokens:
        with device_errors():
            taken = self._ahead.take(inputs) if self._ahead is not None else None
            tokens = self._compute(inputs) if taken is None else self._complete(inputs, taken)
            reading = tokens.start_reading(inputs)
            if self._ahead is not None:
                self._ahead.launch(inputs, tokens.token_ids)
            sampled = reading()
            if self._ahead is not None:
                self._ahead.expect(sampled.token_ids)
            return sampled

    def _compute(self, inputs: BatchInputs) -> DeviceTokens:
        return self._sampler.sample(inputs, self._forwards.run(inputs))

    def _compute_ahead(self, inputs: BatchInputs, token_ids: Tensor) -> _StepAhead:
        """Run a step before its plan exists. Rows that need more than logits are sampled later, with their plan."""
        step = self._forwards.run(inputs, token_ids)
        return _StepAhead(
            step.logits, self._sampler.sample(inputs, step).token_ids if inputs.sampling.is_plain else None
        )

    def _complete(self, inputs: BatchInputs, taken: Taken[_StepAhead]) -> DeviceTokens:
        """Compute the rest of a step whose first rows were computed ahead."""
        step, rest = taken.computed, taken.rest
        rows = None if taken.rows is None else self._to_device.send(taken.rows)[0]
        if step.token_ids is not None and inputs.sampling.is_plain:
            token_ids = step.token_ids if rows is None else step.token_ids[rows]
            if rest is None:
                return DeviceTokens(token_ids)
            token_ids = token_ids.clone()  # computing the rest may overwrite them
            return DeviceTokens(torch.cat((token_ids, self._compute(rest).token_ids)))
        logits = step.logits if rows is None else step.logits[rows]
        if rest is not None:
            parts, num_taken = logits, len(logits)
            logits = parts.new_empty((len(inputs.logits_indices), parts.shape[1]))
            logits[:num_taken] = parts  # computing the rest may overwrite `parts`
            logits[num_taken:] = self._forwards.run(rest).logits
        positions = self._to_device.send(inputs.sampled_positions)[0]
        return self._sampler.sample(inputs, StepLogits(logits, positions))

    @torch.inference_mode()
    def _run_largest_step(self, forwards: StepForwards, config: EngineConfig) -> None:
        """Prefill `max_num_tokens` tokens and sample `max_num_seqs`, all of it in the cache's first block."""
        inputs = largest_step(config, self._model.max_model_len)
        num_sampled = len(inputs.logits_indices)
        # At the same time memory holds the logits of a step computed ahead, and the rows that are taken from them.
        num_beside = 0 if self._ahead is None else 2
        beside = torch.empty(
            (num_beside, num_sampled, self._model.vocab_size),
            dtype=self._model.dtypes.activations,
            device=self._model.device,
        )
        self._sampler.sample(inputs, forwards.run_eagerly(inputs))
        torch.cuda.synchronize(self._model.device)
        del beside

    @torch.inference_mode()
    def _run_to_end(self, inputs: BatchInputs) -> None:
        with device_errors():
            self._compute(inputs).start_reading(inputs)()

    @torch.inference_mode()
    def _prepare(self, config: EngineConfig, num_blocks: int) -> None:
        """Run what else jobs may need beside the graphs' kernels, so that none is compiled among them.

        Without memory for it steps run nevertheless, unless other ranks take part.
        """
        shape = _FIRST_ROWS, self._model.vocab_size
        options: dict[str, Any] = {"dtype": self._model.dtypes.activations, "device": self._model.device}
        try:
            with device_errors():
                self._sampler.prepare(torch.zeros(shape, **options))
            steps = first_steps(
                config, num_blocks, max_model_len=self._model.max_model_len, has_graphs=self.graphs is not None
            )
            for inputs in steps:
                self._run_to_end(inputs)
        except DeviceMemoryError as error:
            logger.warning("action=kernels_unprepared reason=%r", str(error).partition("\n")[0])

    def _describe(self, config: EngineConfig, num_blocks: int, step_tokens: int | None) -> EngineInfo:
        model = self._model
        return EngineInfo(
            device=describe_devices(model.device, config.tensor_parallel_size),
            dtype=str(model.dtypes.weights).removeprefix("torch."),
            attention=model.backend_name,
            max_model_len=min(model.max_model_len, num_blocks * model.block_size),
            is_bound_by_cache=num_blocks * model.block_size < model.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            block_size=model.block_size,
            num_kv_blocks=num_blocks,
            fingerprint=model.fingerprint,
            model_dir=str(model.model_dir),
            is_batch_invariant=model.is_batch_invariant,
            runs_ahead=self._ahead is not None,
            step_tokens=step_tokens,
            few_prefill_tokens=self._few_prefill_tokens(config),
            hidden_size=model.hidden_size,
            can_generate=model.can_generate,
        )

    def _few_prefill_tokens(self, config: EngineConfig) -> int | None:
        is_ours_to_choose = self._model.device.type == "cpu" and config.max_num_tokens is None
        return few_prefill_tokens(torch.get_num_threads()) if is_ours_to_choose else None

    def _runs_ahead(self) -> bool:
        """Whether steps are computed ahead: on a GPU, where no part of a step waits for the device."""
        return self._model.device.type == "cuda" and self._model.uses_triton


def _thread_governor(config: EngineConfig, device: torch.device) -> ThreadGovernor | None:
    """For the threads of a CPU's steps, unless their number is asked for."""
    num_threads = torch.get_num_threads()
    if config.tensor_parallel_size > 1:  # a rank's threads wait for those of the others
        return None
    if device.type != "cpu" or config.num_threads is not None or num_threads == 1:
        return None
    return ThreadGovernor(num_threads, torch.set_num_threads)
