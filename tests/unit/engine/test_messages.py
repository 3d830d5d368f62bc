"""What crosses the pipe between the engine's halves arrives as it was."""

import pickle

import numpy as np

from engine.messages import FinishCode, StepOutput
from engine.token_logprobs import TokenLogprobs


def test_a_steps_output_arrives_with_all_that_it_holds() -> None:
    sent = StepOutput(
        sequence_ids=np.array([2**40, 3, 3]),
        token_ids=np.array([5, 49_151, 7], np.int32),
        finish_codes=np.array([FinishCode.NONE, FinishCode.NONE, FinishCode.STOP], np.int8),
        errors={4: "the reason"},
        cached_tokens={3: 16},
        logprobs=TokenLogprobs(
            rows=np.array([1]),
            logprobs=np.array([-0.5], np.float32),
            top_ids=np.array([[5, 6]], np.int32),
            top_logprobs=np.array([[-0.5, -1.5]], np.float32),
        ),
        grammar_errors={5: "another"},
        embeddings={6: np.array([0.25, -1.0], np.float32)},
    )
    came = pickle.loads(pickle.dumps(sent))
    for name in ("sequence_ids", "token_ids", "finish_codes"):
        there, here = getattr(sent, name), getattr(came, name)
        assert here.dtype == there.dtype and here.tolist() == there.tolist()
    assert (came.errors, came.cached_tokens, came.grammar_errors) == ({4: "the reason"}, {3: 16}, {5: "another"})
    assert came.logprobs.top(0, 2) == sent.logprobs.top(0, 2)  # type: ignore[union-attr]
    assert came.prompt_logprobs is None and came.embeddings[6].tolist() == [0.25, -1.0]


def test_arrays_of_another_width_arrive_with_the_same_numbers() -> None:
    sent = StepOutput(np.array([7], np.int32), np.array([5], np.int64), np.array([1], np.int64))
    came = pickle.loads(pickle.dumps(sent))
    assert (came.sequence_ids.tolist(), came.token_ids.tolist(), came.finish_codes.tolist()) == ([7], [5], [1])
