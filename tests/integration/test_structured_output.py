"""Structured output, judged by others: `jsonschema` and `re`, over models that know nothing of either."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from engine import EngineConfig, GrammarSpec, InferenceEngine, InvalidRequestError, SamplingParams
from engine.grammar.matcher import GrammarMatcher
from engine.runner.slots import SlotRows
from tests.fakes.child_thread import ChildThread
from tests.fakes.random_schemas import random_schema
from tests.fakes.tiny_models import make_tiny_model

NUM_SCHEMAS = 200
REGEXES = [
    r"[a-f]{3,8}",
    r"(GET|POST) /[a-z]{1,9}(\?q=[0-9]{1,3})?",
    r"\d{4}-\d{2}-\d{2}",
    r"(é|ü|漢){2,4}",
    r"[^a]{2,5}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


def make_engine(folder: Path, **fields: Any) -> InferenceEngine:
    defaults: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "num_kv_blocks": 2048}
    return InferenceEngine(config=EngineConfig(model_path=str(folder), **(defaults | fields)), _start_child=ChildThread)


def sampling(spec: GrammarSpec, seed: int, **fields: Any) -> SamplingParams:
    defaults: dict[str, Any] = {
        "max_tokens": 400,
        "temperature": (0.0, 0.7, 1.5)[seed % 3],
        "top_p": (1.0, 0.9)[seed % 2],
    }
    return SamplingParams(grammar=spec, seed=seed, **(defaults | fields))


def test_every_finished_answer_to_200_random_schemas_validates(folder: Path) -> None:
    schemas = [random_schema(seed) for seed in range(NUM_SCHEMAS)]
    params = [sampling(GrammarSpec("json_schema", json.dumps(schema)), seed) for seed, schema in enumerate(schemas)]
    with make_engine(folder) as engine:
        outputs = engine.generate_batch([[1, 2, 3]] * NUM_SCHEMAS, params)
        stats = engine.get_stats()
    finished = 0
    for schema, output in zip(schemas, outputs, strict=True):
        assert output.finish_reason in ("stop", "length"), (schema, output.error)
        if output.finish_reason == "stop":
            finished += 1
            jsonschema.validate(
                json.loads(output.text), schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
            )
    assert finished > 0.9 * NUM_SCHEMAS
    assert stats["num_kv_blocks_used"] == 0


@pytest.mark.parametrize("regex", REGEXES)
def test_every_finished_answer_matches_the_whole_expression(folder: Path, regex: str) -> None:
    with make_engine(folder) as engine:
        outputs = engine.generate_batch(
            [[1, 2]] * 8, [sampling(GrammarSpec("regex", regex), seed) for seed in range(8)]
        )
    for output in outputs:
        assert output.finish_reason == "stop" and re.fullmatch(regex, output.text), output


@pytest.mark.parametrize(
    "extras", [{}, {"logprobs": 2}, {"frequency_penalty": 0.5, "logit_bias": ((97, 2.0),)}], ids=str
)
def test_tokens_that_are_judged_first_are_those_of_a_mask_that_comes_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, extras: dict[str, Any]
) -> None:
    specs = [GrammarSpec("json_schema", json.dumps(random_schema(seed))) for seed in range(20)]
    specs += [GrammarSpec("regex", regex) for regex in REGEXES]
    params = [sampling(spec, seed, max_tokens=60, top_p=1.0, **extras) for seed, spec in enumerate(specs)]
    with make_engine(folder) as engine:
        judged = engine.generate_batch([[1, 2, 3]] * len(params), params)
        monkeypatch.setattr(SlotRows, "has_filter", property(lambda rows: np.ones(len(rows), np.bool_)))
        monkeypatch.setattr(GrammarMatcher, "admits", None)  # nobody asks
        masked = engine.generate_batch([[1, 2, 3]] * len(params), params)
    assert [(output.token_ids, output.logprobs) for output in judged] == [
        (output.token_ids, output.logprobs) for output in masked
    ]
    assert sum(len(output.token_ids) for output in judged) > 500


def test_the_engine_refuses_a_grammar_by_its_parameter_and_serves_the_rest(folder: Path) -> None:
    with make_engine(folder) as engine:
        bad, good = engine.generate_batch(
            [[1, 2]] * 2, [sampling(GrammarSpec("regex", "(a"), 0), sampling(GrammarSpec("regex", "b{2,3}"), 0)]
        )
        assert (bad.finish_reason, bad.error_kind) == ("error", "grammar") and "unclosed group" in (bad.error or "")
        assert good.text in ("bb", "bbb")
        with pytest.raises(InvalidRequestError, match="unclosed group"):
            engine.generate([1, 2], sampling(GrammarSpec("regex", "(a"), 0))


def test_a_grammar_that_would_end_the_engines_process_ends_its_own_request_alone(folder: Path) -> None:
    """The compiler recurses through rules, without an end of its own: 9,000 of them overflow a thread's stack."""
    chain = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(9000)) + '\nr9000: "a"'
    with make_engine(folder) as engine:
        bad, good = engine.generate_batch(
            [[1, 2]] * 2, [sampling(GrammarSpec("lark", chain), 0), sampling(GrammarSpec("regex", "b{2,3}"), 0)]
        )
        assert bad.error_kind == "grammar" and "nested too deeply" in (bad.error or "")
        assert good.text in ("bb", "bbb") and engine.get_stats()["num_restarts"] == 0


def test_constrained_answers_are_the_same_alone_among_others_in_chunks_and_preempted(folder: Path) -> None:
    params = [
        sampling(GrammarSpec("json_schema", json.dumps(random_schema(seed))), seed, max_tokens=120)
        for seed in range(24)
    ]
    prompts = [[1 + seed] * (5 + 7 * seed % 40) for seed in range(24)]
    with make_engine(folder) as engine:
        together = engine.generate_batch(prompts, params)
        alone = [engine.generate_batch([prompt], p)[0] for prompt, p in zip(prompts, params, strict=True)]
    with make_engine(folder, num_kv_blocks=24, max_model_len=200, max_num_seqs=16, max_num_tokens=19) as engine:
        engine.generate_batch(prompts, [replace(p, max_tokens=1) for p in params])  # grammars that wait come one by one
        squeezed = engine.generate_batch(prompts, params)
        assert engine.get_stats()["num_preemptions"] > 0
    for one, two, three in zip(together, alone, squeezed, strict=True):
        assert one.token_ids == two.token_ids == three.token_ids
        assert one.finish_reason == two.finish_reason == three.finish_reason
