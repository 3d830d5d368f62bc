"""The engine's child killed again and again under 50 requests of every kind: each answer is the undisturbed one.

With the demo model's own weights. `tests/unit/engine/test_engine_process.py` has many more kills, without a model.
"""

import json
import os
import random
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from engine import GrammarSpec, InferenceEngine, RequestOutput, SamplingParams
from tests.fakes.echo_engines import child_pid, wait_for_restarts
from tests.fakes.output_recorder import OutputRecorder
from tests.fakes.waiting import wait_until

pytestmark = [pytest.mark.timeout(600), pytest.mark.model]

NUM_REQUESTS = 50
NUM_LATE = 10  # come while the child is away for the first time
KILLS = (0.0, 0.0, 0.7)
"""Shares of all tokens after which the child is killed; an equal one: at the next token after the restart.

What two kills in a row found without a token is tried alone after them, long before the third: whom a third one finds
so is rightly taken for poison.
"""

SHARED = (
    "You answer letters for a small mill by a river. You are brief and polite, you never promise a day of delivery, "
    "and you sign with the miller's name. The letter to answer is this one: "
)
LETTERS = ("Do you grind rye?", "My flour is damp.", "When do you open?", "The bag was torn.", "Thank you for all.")
COPY = (
    "Copy the line: the mill grinds rye and the mill grinds oats.\nthe mill grinds rye and the mill grinds oats.\nthe"
)
SCHEMA = {
    "type": "object",
    "properties": {"grain": {"enum": ["rye", "oats", "wheat"]}, "bags": {"type": "integer"}},
    "required": ["grain", "bags"],
    "additionalProperties": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.95, "top_k": 40},
    "choices": {"n": 3, "temperature": 1.0, "max_tokens": 6},
    "penalties": {
        "temperature": 0.7,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "min_tokens": 6,
        "logit_bias": ((28, 2.0), (30, -100.0)),
    },
    "schema": {"grammar": GrammarSpec("json_schema", json.dumps(SCHEMA)), "max_tokens": 16},
    "stop strings": {"temperature": 0.0, "stop": (" the", " a", ",", ".")},
    "copied": {"temperature": 0.0, "ignore_eos": True, "max_tokens": 16},
    "logprobs": {"temperature": 0.9, "logprobs": 2, "prompt_logprobs": 0, "max_tokens": 8},
    "choices of a form": {
        "n": 2,
        "temperature": 1.2,
        "grammar": GrammarSpec("regex", "(rye|oats|wheat)( and [a-z]+)*"),
    },
    "endless": {"temperature": 0.6, "seed": 1, "ignore_eos": True},
}
Answer = tuple[str, list[int], list[Any], Any, str | None]


class Run:
    """Some of the requests, and what their callbacks heard."""

    def __init__(self, engine: InferenceEngine) -> None:
        self.everything = OutputRecorder()
        self._engine = engine
        self._recorders: dict[int, OutputRecorder] = {}

    def submit(self, numbers: Iterable[int]) -> None:
        everything = requests(self._engine)
        for number in numbers:
            recorder = self._recorders[number] = OutputRecorder()

            def note(output: RequestOutput, recorder: OutputRecorder = recorder) -> None:
                recorder(output)
                self.everything(output)

            self._engine.submit(str(number), *everything[number], on_output=note)

    def answers(self) -> dict[tuple[int, int], Answer]:
        """Text, tokens, log-probabilities, the prompt's, and how it ended: by request and choice."""
        found: dict[tuple[int, int], Answer] = {}
        for number, recorder in self._recorders.items():
            recorder.wait_for_end()
            for index in sorted({output.index for output in recorder.outputs}):
                mine = [output for output in recorder.outputs if output.index == index]
                assert [output.error for output in mine if output.error] == []
                offsets = [output.token_offset + at for output in mine for at in range(len(output.token_ids))]
                assert offsets == list(range(len(offsets))), "a gap or a repeat"
                found[number, index] = (
                    "".join(output.text for output in mine),
                    [token_id for output in mine for token_id in output.token_ids],
                    [entry for output in mine for entry in output.logprobs or ()],
                    [output.prompt_logprobs for output in mine if output.prompt_logprobs],
                    mine[-1].finish_reason,
                )
        return found


def requests(engine: InferenceEngine) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(3)
    kinds = list(KINDS.items())
    found = []
    for number in range(NUM_REQUESTS):
        name, fields = kinds[number % len(kinds)]
        letter = rng.choice(LETTERS)
        prompt = COPY if name == "copied" else SHARED + letter if number % 3 else letter
        params = SamplingParams(**{"max_tokens": 10, "seed": number, **fields})
        found.append((engine.tokenizer.encode(prompt), params))
    return found


@pytest.fixture(scope="module")
def engine() -> Iterator[InferenceEngine]:
    """Few sequences at a time and few blocks: some wait and some are preempted. One guesses, beside few others."""
    sizes: dict[str, Any] = {"max_num_seqs": 8, "max_num_tokens": 64, "num_kv_blocks": 14, "max_model_len": 128}
    with InferenceEngine("smollm2-135m", device="cpu", **sizes) as engine:
        yield engine


def test_fifty_requests_survive_three_kills_with_the_answers_of_the_undisturbed_run(engine: InferenceEngine) -> None:
    assert engine.info.is_batch_invariant, "where the bits depend on the batch nothing is promised"
    quiet = Run(engine)
    quiet.submit(range(NUM_REQUESTS))
    undisturbed = quiet.answers()
    num_tokens = len(quiet.everything.token_ids)
    wanted = ("num_preemptions", "num_cached_tokens", "num_accepted_draft_tokens")
    wait_until(lambda: all(engine.get_stats()[name] for name in wanted), "all of these to be told of")
    assert {answer[-1] for answer in undisturbed.values()} == {"stop", "length"}

    run = Run(engine)
    run.submit(range(NUM_REQUESTS - NUM_LATE))
    num_seen = 0
    for number, share in enumerate(KILLS, 1):
        run.everything.wait_for_tokens(max(num_seen + 1, int(share * num_tokens)))
        os.kill(child_pid(engine), signal.SIGKILL)
        wait_for_restarts(engine, number)
        num_seen = len(run.everything.token_ids)  # the pipe of the killed one has been read to its end
        assert num_seen < num_tokens, "the kill was to find work under way"
        if number == 1:
            run.submit(range(NUM_REQUESTS - NUM_LATE, NUM_REQUESTS))
    assert run.answers() == undisturbed
    wait_until(lambda: engine.get_stats()["num_kv_blocks_used"] == 0, "all blocks to be free")
    stats = engine.get_stats()
    assert (stats["num_restarts"], stats["num_requests"]) == (len(KILLS), 0)
