"""Edits of logits against transformers' processors, the formulas of OpenAI, and what the logits were before."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from engine.logit_editor import LogitEditor, undo
from engine.messages import AddSequence
from engine.runner.slots import SequenceSlots
from engine.sampler import Sampler
from engine.sampling_params import SamplingParams
from engine.sequence import SequenceLimits, create_sequence
from tests.fakes.chi_square import chi_square_tail
from tests.fakes.sampling_batches import batch_of

VOCAB_SIZE = 300
EOS = 7
LIMITS = SequenceLimits(vocab_size=VOCAB_SIZE, max_len=64, eos_token_ids=(EOS,), described="")
PROMPT, OUTPUT = [3, 9, 9, 250, 14], [9, 14, 14, 14, 200]

PLAIN = SamplingParams()
EDITED = [
    SamplingParams(logit_bias=((9, 2.5), (EOS, -100.0), (299, 100.0))),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(repetition_penalty=0.6, logit_bias=((14, -3.0), (3, 5.0))),
    SamplingParams(presence_penalty=1.5),
    SamplingParams(frequency_penalty=-0.75),
    SamplingParams(frequency_penalty=0.5, presence_penalty=-1.0, repetition_penalty=1.2),
    SamplingParams(min_tokens=6, stop_token_ids=(9, 11)),
    SamplingParams(min_tokens=5, stop_token_ids=(9, 11)),
    SamplingParams(min_tokens=1 << 80),
    SamplingParams(min_tokens=6, repetition_penalty=1.1, logit_bias=((EOS, 50.0),), frequency_penalty=0.3),
]


def editor_for(*params: SamplingParams, output: list[int] = OUTPUT) -> LogitEditor:
    """The edits of a step that samples the next token of one sequence for each of params, through the real books."""
    slots = SequenceSlots(max_num_seqs=len(params), max_len=64, block_size=4)
    for number, wishes in enumerate(params):
        message = AddSequence(
            sequence_id=number, prompt_token_ids=PROMPT, output_token_ids=list(output), params=wishes
        )  # fmt: skip
        slots.acquire(create_sequence(message, LIMITS))
    rows = slots.rows(np.arange(len(params)))
    assert rows.edits is not None
    edits = slots.edits.edits(rows.edits, slots.num_tokens[rows.slots])
    constant = ["bias_rows", "bias_ids", "biases", "penalized_rows", "repetition", "frequency", "presence"]
    arrays = [getattr(edits.rows, name) for name in constant]
    arrays += [edits.owners, edits.token_ids, edits.counts, edits.end_rows, edits.end_ids]
    return LogitEditor(*(torch.from_numpy(array) for array in arrays))


def reference(logits: Tensor, params: SamplingParams) -> Tensor:
    """One row by transformers' processors in transformers' order, and OpenAI's formula where it has none."""
    ids, scores = torch.tensor([PROMPT + OUTPUT]), logits[None].clone()
    if params.logit_bias:
        scores = SequenceBiasLogitsProcessor({(token_id,): bias for token_id, bias in params.logit_bias})(ids, scores)
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token_id, count in Counter(OUTPUT).items():
        scores[0, token_id] -= count * params.frequency_penalty
        scores[0, token_id] -= params.presence_penalty
    if params.min_tokens:
        ends = [EOS, *params.stop_token_ids]
        scores = MinNewTokensLengthLogitsProcessor(len(PROMPT), params.min_tokens, ends)(ids, scores)
    return scores[0]


def logits_for(num_rows: int) -> Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize("params", EDITED, ids=str)
def test_edits_equal_transformers_processors(params: SamplingParams) -> None:
    logits = logits_for(1)
    expected = reference(logits[0], params)
    editor_for(params).apply(logits)
    torch.testing.assert_close(logits[0], expected, atol=1e-6, rtol=1e-6)  # one rounding may differ


def test_a_row_is_edited_the_same_alone_and_among_others_and_every_row_gets_back_what_it_was() -> None:
    params = [EDITED[5], PLAIN, *EDITED, PLAIN]
    logits = logits_for(len(params))
    before = logits.clone()
    saved = editor_for(*params).apply(logits)
    for row, wishes in enumerate(params):
        alone = before[row : row + 1].clone()
        if wishes is not PLAIN:
            editor_for(wishes).apply(alone)
        assert torch.equal(alone[0], logits[row])
    undo(logits, saved)
    assert torch.equal(logits, before)


def test_a_slot_that_was_freed_asks_for_nothing_more() -> None:
    slots = SequenceSlots(max_num_seqs=1, max_len=64, block_size=4)
    for params, is_edited in ((EDITED[8], True), (PLAIN, False)):
        message = AddSequence(sequence_id=0, prompt_token_ids=PROMPT, params=params)
        slot = slots.acquire(create_sequence(message, LIMITS))
        assert (slots.rows(np.array([slot])).edits is not None) is is_edited
        slots.release(slot)


def test_frequencies_under_penalties_and_bias_match_the_exact_distribution() -> None:
    params = SamplingParams(
        temperature=0.9,
        repetition_penalty=1.3,
        frequency_penalty=0.4,
        presence_penalty=0.6,
        logit_bias=((14, 4.0), (100, 3.0), (250, -2.0)),
        min_tokens=20,
    )
    logits = logits_for(1)
    expected = (reference(logits[0], params).double() / params.temperature).softmax(-1)
    editor_for(params).apply(logits)
    num_draws = 20_000
    tokens = Sampler().sample(logits.expand(num_draws, -1), batch_of(num_draws, temperature=params.temperature))
    counts = torch.bincount(tokens, minlength=VOCAB_SIZE)
    assert counts[EOS] == 0
    assert chi_square_tail(counts, expected * num_draws) > 1e-4
