"""Runs steps on a device: the model, its KV cache and the sampler behind numpy arrays.

Owns the loaded model, the cache's size, and the only host-device sync of a step. Knows nothing of sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.base import AttentionBatch
from engine.config import EngineConfig
from engine.grammar.masks import TokenMasks
from engine.logit_editor import LogitEditor, undo
from engine.messages import EngineInfo
from engine.model.loader import LoadedModel, load_model
from engine.row_logprobs import RowLogprobs
from engine.runner.batch_inputs import BatchInputs
from engine.runner.cuda_graphs import CudaCapture, GraphedSteps
from engine.runner.device_errors import device_errors
from engine.runner.logit_edits import EditRows, LogitEdits
from engine.runner.memory import choose_num_blocks, largest_step
from engine.runner.slots import SlotRows
from engine.runner.step_ahead import StepAhead, Taken
from engine.runner.step_budget import measure_step_tokens
from engine.runner.thread_governor import ThreadGovernor
from engine.runner.transfer import HostToDevice, start_reading
from engine.sampler import SamplingBatch, create_sampler
from engine.step_plan import BAD_LOGITS, SampledTokens
from engine.token_logprobs import TokenLogprobs

_NOTHING = np.zeros(0, np.int64)


@dataclass(slots=True, eq=False)
class _DeviceTokens:
    """A step's outcome, before it is waited for. Log-probabilities: the tokens'; the likeliest tokens; theirs."""

    token_ids: Tensor  # int64 [num_sampled]
    logprobs: tuple[Tensor, Tensor, Tensor] | None = None
    prompt_logprobs: tuple[Tensor, Tensor, Tensor] | None = None


class ModelRunner:
    """`Runner` on torch."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the model and allocate its cache. Raises `ModelLoadError` with the remedy."""
        self._model: LoadedModel = load_model(config)
        self._to_device = HostToDevice(self._model.device)
        self._sampler = create_sampler(self._model.device, self._model.cache_dir, uses_triton=self._model.uses_triton)
        self._sampling_rows: SlotRows | None = None
        self._sampling_tensors: list[Tensor] = []
        self._edit_rows: EditRows | None = None
        self._edit_tensors: list[Tensor] = []
        self._graphs = _graphed_steps(config, self._model)
        self._ahead = (
            StepAhead(lambda *step: self._forward(*step).token_ids, self._to_device) if self._runs_ahead() else None
        )
        measure = self._graphs.measure if self._graphs is not None else None
        num_blocks = choose_num_blocks(config, self._model, lambda: self._run_largest_step(config), measure)
        self._model.allocate_kv_cache(num_blocks)
        is_measured = self._ahead is not None and config.max_num_tokens is None
        step_tokens = measure_step_tokens(config, self._model, num_blocks, self._run_to_end) if is_measured else None
        self.info = self._describe(num_blocks, step_tokens)
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
            tokens = self._forward(inputs) if taken is None else self._complete(taken)
            reading = start_reading(tokens.token_ids)
            if self._ahead is not None:
                self._ahead.launch(inputs, tokens.token_ids)
            sampled = self._to_host(inputs, tokens, reading)
            if self._ahead is not None:
                self._ahead.expect(sampled.token_ids)
            return sampled

    def _complete(self, taken: Taken) -> "_DeviceTokens":
        """Compute what is left of a step whose first rows are computed already."""
        if taken.rest is None:
            return _DeviceTokens(taken.token_ids)
        return _DeviceTokens(torch.cat((taken.token_ids, self._forward(taken.rest).token_ids)))

    def _to_host(
        self, inputs: BatchInputs, tokens: "_DeviceTokens", reading: Callable[[], NDArray[np.int64]]
    ) -> SampledTokens:
        """The step's only host-device sync, but for the tokens that grammars judge."""
        token_ids = reading()
        logprobs = prompt_logprobs = None
        if tokens.logprobs is not None and inputs.sampling.logprob_rows is not None:
            logprobs = _token_logprobs(inputs.sampling.logprob_rows, *tokens.logprobs)
        if tokens.prompt_logprobs is not None and inputs.scored is not None:
            prompt_logprobs = _token_logprobs(inputs.scored.slots, *tokens.prompt_logprobs)
        return SampledTokens(token_ids, logprobs, prompt_logprobs)

    def _forward(self, inputs: BatchInputs, token_ids: Tensor | None = None) -> "_DeviceTokens":
        """token_ids: int64 on the device, in place of the inputs' first ones."""
        if self._graphs is not None and (graphed := self._graphs.run(inputs, token_ids)) is not None:
            logits, positions = graphed
            tokens = _DeviceTokens(positions[:0])
            if len(positions):
                self._sample(logits, inputs, positions, tokens)
            return tokens
        return self._forward_eagerly(inputs, token_ids)

    def _forward_eagerly(self, inputs: BatchInputs, token_ids: Tensor | None = None) -> "_DeviceTokens":
        scored = inputs.scored
        num_sampled = len(inputs.logits_indices)
        logits_indices = inputs.logits_indices
        if scored is not None:
            logits_indices = np.concatenate((logits_indices, scored.logits_indices))
        elif not num_sampled:  # a model gives at least one row of logits; nobody reads this one
            logits_indices = np.array([inputs.num_tokens - 1], np.int64)
        input_ids, position_ids, logits_rows, sampled_positions, scored_ids, *batch = self._to_device.send(
            inputs.input_ids,
            inputs.position_ids,
            logits_indices,
            inputs.sampled_positions,
            scored.token_ids if scored is not None else _NOTHING,
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
        logits = self._model.forward(input_ids, position_ids, logits_rows)  # [num_sampled + num_scored, vocab]
        tokens = _DeviceTokens(logits_rows[:0])
        if scored is not None:
            rows = torch.arange(num_sampled, len(logits), device=logits.device)
            wanted = self._sampler.logprobs(logits, rows, scored.num_top)
            tokens.prompt_logprobs = wanted.of(logits, scored_ids), wanted.top_ids, wanted.top_logprobs
        if num_sampled:
            self._sample(logits[:num_sampled], inputs, sampled_positions, tokens)
        return tokens

    def _sample(self, logits: Tensor, inputs: BatchInputs, positions: Tensor, tokens: "_DeviceTokens") -> None:
        """One token a row; `BAD_LOGITS` where a hidden state or the chosen logit was NaN or infinite.

        A bad hidden state spoils its whole row of logits, so that one column tells, without a pass over them all.
        """
        is_sound = logits[:, 0] < float("inf")
        batch = self._sampling_batch(inputs.sampling, positions)
        wanted = self._wanted_logprobs(logits, inputs.sampling)
        saved = self._logit_editor(inputs.edits).apply(logits) if inputs.edits is not None else []
        token_ids = self._draw(logits, batch, inputs.masks)
        is_sound &= logits.gather(1, token_ids[:, None])[:, 0].abs() < float("inf")  # nor is NaN
        if wanted is not None:
            undo(logits, saved)  # no mask hides a token that was drawn
            logprobs = wanted.of(logits, token_ids[wanted.rows])
            tokens.logprobs = logprobs, wanted.top_ids, wanted.top_logprobs
        tokens.token_ids = torch.where(is_sound, token_ids, BAD_LOGITS)

    def _draw(self, logits: Tensor, batch: SamplingBatch, masks: TokenMasks | None) -> Tensor:
        """A token a row, one that its grammar, if any, admits: the host reads them to find out. Mutates logits."""
        if masks is not None and (filtered := masks.before_sampling()) is not None:
            self._sampler.mask(logits, *self._to_device.send(filtered.rows, filtered.bits))
        token_ids = self._sampler.sample(logits, batch)
        if masks is not None and (refused := masks.after_sampling(start_reading(token_ids)())) is not None:
            rows, bits = self._to_device.send(refused.rows, refused.bits)
            left = logits[rows]  # [num_refused, vocab]
            self._sampler.mask(left, torch.arange(len(left), device=left.device), bits)
            token_ids[rows] = self._sampler.sample(left, batch.select(rows))
        return token_ids

    def _wanted_logprobs(self, logits: Tensor, rows: SlotRows) -> RowLogprobs | None:
        """The model's own distribution in the rows that report it: before anything changes the logits."""
        if rows.logprob_rows is None:
            return None
        return self._sampler.logprobs(logits, self._sampling_tensors[-1], rows.num_top)

    def _sampling_batch(self, rows: SlotRows, positions: Tensor) -> SamplingBatch:
        """The rows' parameters on the device; they stay there for as long as the same rows decode."""
        if rows is not self._sampling_rows:
            self._sampling_rows = rows
            self._sampling_tensors = self._to_device.send(
                rows.temperature,
                rows.top_p,
                rows.top_k,
                rows.min_p,
                rows.seed,
                rows.choice,
                rows.logprob_rows if rows.logprob_rows is not None else _NOTHING,
            )
        temperature, top_p, top_k, min_p, seed, choice, _ = self._sampling_tensors
        return SamplingBatch(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            choice=choice,
            position=positions,
        )

    def _logit_editor(self, edits: LogitEdits) -> LogitEditor:
        """The edits on the device; what is constant of them stays there for as long as the same rows decode."""
        rows = edits.rows
        if rows is not self._edit_rows:
            self._edit_rows = rows
            self._edit_tensors = self._to_device.send(
                rows.bias_rows,
                rows.bias_ids,
                rows.biases,
                rows.penalized_rows,
                rows.repetition,
                rows.frequency,
                rows.presence,
            )
        entries = self._to_device.send(edits.owners, edits.token_ids, edits.counts, edits.end_rows, edits.end_ids)
        return self._sampler.editor(*self._edit_tensors, *entries)

    @torch.inference_mode()
    def _run_largest_step(self, config: EngineConfig) -> None:
        """Prefill `max_num_tokens` tokens and sample `max_num_seqs`, all of it in the cache's first block."""
        self._forward_eagerly(largest_step(config, self._model.max_model_len))
        torch.cuda.synchronize(self._model.device)

    @torch.inference_mode()
    def _run_to_end(self, inputs: BatchInputs) -> None:
        with device_errors():
            start_reading(self._forward(inputs).token_ids)()

    def _describe(self, num_blocks: int, step_tokens: int | None) -> EngineInfo:
        model = self._model
        return EngineInfo(
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            attention=model.backend_name,
            max_model_len=min(model.max_model_len, num_blocks * model.block_size),
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            block_size=model.block_size,
            num_kv_blocks=num_blocks,
            fingerprint=model.fingerprint,
            model_dir=str(model.model_dir),
            is_batch_invariant=model.is_batch_invariant,
            runs_ahead=self._ahead is not None,
            step_tokens=step_tokens,
        )

    def _runs_ahead(self) -> bool:
        """Where launching is apart from computing, and nothing in a step waits for the device."""
        return self._model.device.type == "cuda" and self._model.uses_triton


def _graphed_steps(config: EngineConfig, model: LoadedModel) -> GraphedSteps | None:
    """None where kernels are launched one by one: the host's time counts on CUDA alone, and torch's attention waits."""
    if not config.cuda_graphs or model.device.type != "cuda" or not model.uses_triton:
        return None
    return GraphedSteps(model, max_num_seqs=config.max_num_seqs, make_capture=CudaCapture)


def _token_logprobs(rows: NDArray[np.int64], logprobs: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> TokenLogprobs:
    return TokenLogprobs(
        rows, logprobs.cpu().numpy(), top_ids.to(torch.int32).cpu().numpy(), top_logprobs.cpu().numpy()
    )


def _thread_governor(config: EngineConfig, device: torch.device) -> ThreadGovernor | None:
    """For the threads of a CPU's steps, unless their number is asked for, or they are somebody else's too."""
    num_threads = torch.get_num_threads()
    if device.type != "cpu" or config.num_threads is not None or config.in_process or num_threads == 1:
        return None
    return ThreadGovernor(num_threads, torch.set_num_threads)
