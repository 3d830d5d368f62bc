"""From a step's logits to its tokens and log-probabilities, all on the device, and from there to the host.

Owns what of the rows' parameters lies on the device already, and the host-device syncs of a step. Knows nothing of
models.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.grammar.masks import TokenMasks
from engine.grammar.matcher import WORD_BITS
from engine.logit_editor import LogitEditor, undo
from engine.row_logprobs import RowLogprobs
from engine.runner.batch_inputs import BatchInputs
from engine.runner.graphed_draws import GraphedDraws
from engine.runner.logit_edits import EditRows, LogitEdits
from engine.runner.slots import SlotRows
from engine.runner.transfer import HostToDevice, start_reading
from engine.sampler import Sampler, SamplingBatch
from engine.step_plan import HiddenStates, SampledTokens
from engine.token_logprobs import TokenLogprobs

_NOTHING = np.zeros(0, np.int64)


@dataclass(slots=True, eq=False)
class StepLogits:
    """What a forward gives. The next one may write into the same memory."""

    logits: Tensor  # [num_sampled + num_scored, vocab_size]: float32, or the dtype of a model on Triton's kernels
    positions: Tensor  # int64 [num_sampled], of the tokens to come
    scored_ids: Tensor | None = None  # int64 [num_scored]
    hidden_states: Tensor | None = None  # float32 [num_pooled, hidden_size]
    num_buffer_rows: int | None = None  # of the graphs' buffer, whose first rows the logits are; None: they are not


@dataclass(slots=True, eq=False)
class DeviceTokens:
    """A step's outcome, before it is waited for. Log-probabilities: the tokens'; the likeliest tokens; theirs."""

    token_ids: Tensor  # int64 [num_sampled]; the next step's may be written into the same memory
    logprobs: tuple[Tensor, Tensor, Tensor] | None = None
    prompt_logprobs: tuple[Tensor, Tensor, Tensor] | None = None
    hidden_states: Tensor | None = None

    def start_reading(self, inputs: BatchInputs) -> Callable[[], SampledTokens]:
        """Call the result to wait for the step, and for nothing that is launched after this call."""
        token_ids = start_reading(self.token_ids)
        scored = inputs.scored
        logprobs = _start_reading(inputs.sampling.logprob_rows, self.logprobs)
        prompt_logprobs = _start_reading(None if scored is None else scored.slots, self.prompt_logprobs)
        if inputs.pooled is None or self.hidden_states is None:
            return lambda: SampledTokens(token_ids(), logprobs(), prompt_logprobs())
        slots, values = inputs.pooled.slots, start_reading(self.hidden_states)
        return lambda: SampledTokens(token_ids(), logprobs(), prompt_logprobs(), HiddenStates(slots, values()))


class StepSampler:
    """One batched draw a step."""

    def __init__(self, sampler: Sampler, to_device: HostToDevice, draws: GraphedDraws | None = None) -> None:
        """draws: of the buffer that a step's logits may lie in."""
        self._sampler = sampler
        self._draws = draws
        self._to_device = to_device
        self._sampling_rows: SlotRows | None = None
        self._sampling_tensors: list[Tensor] = []
        self._may_draw = self._may_cut = True
        self._edit_rows: EditRows | None = None
        self._edit_tensors: list[Tensor] = []

    def prepare(self, logits: Tensor) -> None:
        """Draw in every way and change logits in every way, so that no kernel is compiled later, beside sequences.

        logits: as a forward gives them, `[num_rows, vocab_size]`, of any values. Mutates them.
        """
        num_rows, vocab_size = logits.shape
        no_tokens = np.zeros((num_rows, -(-vocab_size // WORD_BITS)), np.int32)
        rows, ones, bits = self._to_device.send(np.arange(num_rows), np.ones(num_rows, np.float32), no_tokens)
        widened = logits.float()  # as those of rows that ask for more than a token
        for some in (logits, widened):
            for may_draw, may_cut in ((False, False), (True, False), (True, True)):
                batch = SamplingBatch(ones, ones / 2, rows, ones / 2, rows, rows, rows, may_draw, may_cut)
                self._sampler.settle(some, self._sampler.sample(some, batch))
        self._sampler.mask(widened, rows, bits)
        self._sampler.editor(rows, rows, ones, rows, ones, ones, ones, rows, rows, ones, rows, rows).apply(widened)

    def sample(self, inputs: BatchInputs, step: StepLogits) -> DeviceTokens:
        """The tokens of a step whose forward gave these logits. Mutates logits."""
        logits, num_sampled = step.logits, len(step.positions)
        tokens = DeviceTokens(step.positions[:0], hidden_states=step.hidden_states)
        if inputs.scored is not None and step.scored_ids is not None:
            logits = logits.float()
            rows = torch.arange(num_sampled, len(logits), device=logits.device)
            wanted = self._sampler.logprobs(logits, rows, inputs.scored.num_top)
            tokens.prompt_logprobs = wanted.of(logits, step.scored_ids), wanted.top_ids, wanted.top_logprobs
        num_rows = step.num_buffer_rows
        if num_sampled and num_rows is not None and self._draws is not None and inputs.sampling.is_plain:
            tokens.token_ids = self._draws.draw(self._sampling_batch(inputs.sampling, step.positions), num_rows)
        elif num_sampled:
            self._sample(logits[:num_sampled], inputs, step.positions, tokens)
        return tokens

    def _sample(self, logits: Tensor, inputs: BatchInputs, positions: Tensor, tokens: DeviceTokens) -> None:
        """One token a row; `BAD_LOGITS` where a hidden state or the chosen logit was NaN or infinite."""
        batch = self._sampling_batch(inputs.sampling, positions)
        if not inputs.sampling.is_plain:
            logits = logits.float()  # a draw alone reads them as they are
        wanted = self._wanted_logprobs(logits, inputs.sampling)
        saved = self._logit_editor(inputs.edits).apply(logits) if inputs.edits is not None else []
        token_ids = self._draw(logits, batch, inputs.masks)
        self._sampler.settle(logits, token_ids)
        if wanted is not None:
            undo(logits, saved)  # no mask hides a token that was drawn
            logprobs = wanted.of(logits, token_ids[wanted.rows])
            tokens.logprobs = logprobs, wanted.top_ids, wanted.top_logprobs
        tokens.token_ids = token_ids

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
            self._sampling_tensors = self._to_device.send(
                rows.temperature,
                rows.top_p,
                rows.top_k,
                rows.min_p,
                rows.seed,
                rows.choice,
                rows.logprob_rows if rows.logprob_rows is not None else _NOTHING,
            )
            self._may_draw = bool((rows.temperature > 0).any())
            self._may_cut = bool(((rows.temperature > 0) & ((rows.top_p < 1) | (rows.top_k > 0))).any())
            self._sampling_rows = rows  # last: without memory for its parameters a step is run again
        temperature, top_p, top_k, min_p, seed, choice, _ = self._sampling_tensors
        return SamplingBatch(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            choice=choice,
            position=positions,
            may_draw=self._may_draw,
            may_cut=self._may_cut,
        )

    def _logit_editor(self, edits: LogitEdits) -> LogitEditor:
        """The edits on the device; what is constant of them stays there for as long as the same rows decode."""
        rows = edits.rows
        if rows is not self._edit_rows:
            self._edit_tensors = self._to_device.send(
                rows.bias_rows,
                rows.bias_ids,
                rows.biases,
                rows.penalized_rows,
                rows.repetition,
                rows.frequency,
                rows.presence,
            )
            self._edit_rows = rows
        entries = self._to_device.send(edits.owners, edits.token_ids, edits.counts, edits.end_rows, edits.end_ids)
        return self._sampler.editor(*self._edit_tensors, *entries)


def _start_reading(
    rows: NDArray[np.int64] | None, tensors: tuple[Tensor, Tensor, Tensor] | None
) -> Callable[[], TokenLogprobs | None]:
    if rows is None or tensors is None:
        return lambda: None
    logprobs, top_ids, top_logprobs = map(start_reading, (tensors[0], tensors[1].to(torch.int32), tensors[2]))
    return lambda: TokenLogprobs(rows, logprobs(), top_ids(), top_logprobs())
