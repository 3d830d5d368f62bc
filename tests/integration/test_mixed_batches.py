"""Requests of every kind in one batch: each answer, with its log-probabilities, is to the bit the one it gets alone."""

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine import EngineConfig, GrammarSpec, InferenceEngine, RequestOutput, SamplingParams
from tests.acceptance.chaos.commands import REPEATS_ITSELF
from tests.fakes.child_thread import ChildThread
from tests.fakes.tiny_models import make_tiny_model

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "size": {"type": "integer"}},
        "required": ["name", "size"],
        "additionalProperties": False,
    }
)
CALL = 'start: TEXT? (open "\\n" call)*\nTEXT: /[a-z]{1,9}/\nopen[lazy]: TEXT? "<call>"\ncall: %json ' + SCHEMA
PENALTIES: dict[str, Any] = {"presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.2}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0.0},
    "sampled": {"temperature": 0.9, "top_p": 0.9},
    "guessed": {"temperature": 0.0, "ignore_eos": True},  # the prompt repeats itself
    "schema": {"grammar": GrammarSpec("json_schema", SCHEMA)},
    "schema with logprobs": {"grammar": GrammarSpec("json_schema", SCHEMA), "logprobs": 2},
    "calls under penalties": {"grammar": GrammarSpec("lark", CALL), **PENALTIES},
    "penalties": {**PENALTIES, "logit_bias": ((50, 3.0), (60, -100.0)), "min_tokens": 6, "temperature": 0.7},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 1, "temperature": 0.7},
    "choices": {"n": 3, "temperature": 1.2, "logprobs": 0, **PENALTIES},
    "choices of a form": {"n": 2, "temperature": 1.2, "grammar": GrammarSpec("regex", "(ab|cd|[x-z]){3,30}")},
}
PARAMS = {
    name: SamplingParams(**{"max_tokens": 40, "seed": seed, **fields})
    for seed, (name, fields) in enumerate(KINDS.items())
}
PROMPTS = {
    name: list(b"the mill, " * 5) if name == "guessed" else [1 + at, *b"a shared beginning of prompts", *range(3 * at)]
    for at, name in enumerate(KINDS)
}


@dataclass
class Answer:
    """What the choices of one request were given, replays apart."""

    choices: dict[int, list[Any]] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    prompt_logprobs: Any = None

    def take(self, output: RequestOutput) -> None:
        assert output.error is None, output.error
        self.token_ids.setdefault(output.index, []).extend(output.token_ids)
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        if not output.is_replay:
            self.choices.setdefault(output.index, []).extend(output.logprobs or output.token_ids)
        if output.finish_reason:
            self.choices.setdefault(output.index, []).append(output.finish_reason)


def run(engine: InferenceEngine, resumed: dict[str, list[list[int]]] | None = None) -> dict[str, Answer]:
    """Everything at once; `resumed`: what the choices come with, by kind."""
    answers = {name: Answer() for name in KINDS}
    ends = {name: threading.Event() for name in KINDS}

    def note(output: RequestOutput) -> None:
        answers[output.request_id].take(output)
        if output.finished:
            ends[output.request_id].set()

    for name, params in PARAMS.items():
        stored = resumed[name] if resumed else ()
        engine.submit(name, PROMPTS[name], params, output_token_ids=stored, on_output=note)
    assert all(end.wait(120) for end in ends.values())
    return answers


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"), **REPEATS_ITSELF)


def engine_of(folder: Path, dtype: str, **fields: Any) -> InferenceEngine:
    defaults: dict[str, Any] = {"num_threads": 1, "num_kv_blocks": 512}
    return InferenceEngine(
        config=EngineConfig(model_path=str(folder), dtype=dtype, **(defaults | fields)), _start_child=ChildThread
    )


@pytest.fixture(scope="module")
def alone(folder: Path, dtype: str) -> dict[str, Answer]:
    """Each request with nobody beside it, its prompt computed in one go."""
    answers: dict[str, Answer] = {}
    with engine_of(folder, dtype, prefix_caching=False, prompt_lookup="off") as engine:
        if not engine.info.is_batch_invariant:
            pytest.skip(f"{dtype} is not batch-invariant on this CPU")
        for name, params in PARAMS.items():
            answers[name], end = Answer(), threading.Event()
            answer = answers[name]

            def note(output: RequestOutput, answer: Answer = answer, end: threading.Event = end) -> None:
                answer.take(output)
                if output.finished:
                    end.set()

            engine.submit(name, PROMPTS[name], params, on_output=note)
            assert end.wait(60)
    return answers


def test_together_and_again_over_cached_prefixes(folder: Path, dtype: str, alone: dict[str, Answer]) -> None:
    with engine_of(folder, dtype) as engine:
        assert run(engine) == alone
        assert run(engine) == alone
        assert engine.get_stats()["num_cached_tokens"] > 0


def test_few_at_a_time_in_chunks_preempted_and_guessed(folder: Path, dtype: str, alone: dict[str, Answer]) -> None:
    tight = {"num_kv_blocks": 16, "max_model_len": 200, "max_num_tokens": 11, "max_num_seqs": 6}
    with engine_of(folder, dtype, **tight) as engine:
        assert run(engine) == alone
        stats = engine.get_stats()
    assert stats["num_preemptions"] > 0 and stats["num_accepted_draft_tokens"] > 0


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_resumed(folder: Path, dtype: str, alone: dict[str, Answer], cut: int) -> None:
    stored = {
        name: [answer.token_ids[index][: cut + index] for index in range(PARAMS[name].n)]
        for name, answer in alone.items()
    }
    with engine_of(folder, dtype) as engine:
        resumed = run(engine, stored)
    for name, answer in resumed.items():
        assert answer.token_ids == alone[name].token_ids, name
        for index, outcome in answer.choices.items():
            assert outcome == alone[name].choices[index][len(stored[name][index]) :], name
