"""Constrained sequences in a core: whatever happens to them, they stay sentences of their grammars, the same ones."""

import json
import random
import re
import threading
from pathlib import Path

import pytest

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.pending import PendingGrammars, PreparedSequence
from engine.grammar_spec import GrammarSpec
from engine.messages import Begun, FinishCode
from tests.fakes.core_driver import CoreDriver
from tests.fakes.fake_runner import FakeRunner
from tests.fakes.fake_runner_ahead import FakeRunnerAhead
from tests.fakes.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,6}$"},
        "kind": {"enum": ["first", "second"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
SPECS = [
    GrammarSpec("json_schema", json.dumps(SCHEMA)),
    GrammarSpec("regex", r"(ab|cd){2,4}-[0-9]{3}"),
    GrammarSpec("choice", '["yes", "no", "yesterday", "n\\u00e9"]'),
    GrammarSpec("lark", 'start: "<call>" %json {"enum": [{"a": 1}, {"b": []}]} "</call>"'),
    GrammarSpec("json_schema", '{"const": {"a": [1, 2, "forced"]}}'),
]


def make_driver(
    tokenizer_dir: Path,
    *,
    num_blocks: int = 200,
    max_num_tokens: int = 64,
    max_num_seqs: int = 8,
    max_model_len: int = 200,
    runner_class: type[FakeRunner] = FakeRunner,
) -> CoreDriver:
    runner = runner_class(
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(EOS_TOKEN_ID,),
        model_dir=str(tokenizer_dir),
    )
    return CoreDriver(runner, max_num_seqs=max_num_seqs, max_num_tokens=max_num_tokens)


def output_of(tokenizer_dir: Path, spec: GrammarSpec, seed: int = 0, **fields: object) -> list[int]:
    driver = make_driver(tokenizer_dir)
    sequence_id = driver.add([1, 2, 3], max_tokens=150, seed=seed, grammar=spec, **fields)  # type: ignore[arg-type]
    driver.run()
    assert driver.errors == {}
    return driver.outputs[sequence_id]


def text_of(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token != EOS_TOKEN_ID).decode()


@pytest.mark.parametrize("seed", range(5))
def test_what_ends_by_itself_is_a_sentence_of_its_grammar(tokenizer_dir: Path, seed: int) -> None:
    texts = []
    for spec in SPECS:
        tokens = output_of(tokenizer_dir, spec, seed)
        assert tokens[-1] == EOS_TOKEN_ID
        texts.append(text_of(tokens))
    assert set(json.loads(texts[0])) == {"name", "kind", "sizes"}
    assert re.fullmatch(r"(ab|cd){2,4}-[0-9]{3}", texts[1])
    assert texts[2] in ("yes", "no", "yesterday", "né")
    assert json.loads(texts[3].removeprefix("<call>").removesuffix("</call>")) in [{"a": 1}, {"b": []}]
    assert texts[4] == '{"a": [1, 2, "forced"]}'


def test_forced_tokens_cost_no_forward(tokenizer_dir: Path) -> None:
    driver = make_driver(tokenizer_dir)
    whole = driver.add([1, 2, 3], max_tokens=150, grammar=SPECS[4])
    driver.run()
    assert len(driver.outputs[whole]) == 24 and driver.core.get_stats().num_steps == 0
    choice = driver.add([1, 2, 3], max_tokens=150, grammar=GrammarSpec("choice", '["left over", "right over"]'))
    driver.run()
    assert text_of(driver.outputs[choice]) in ("left over", "right over")
    assert driver.core.get_stats().num_steps == 1
    assert driver.finished == {whole: FinishCode.STOP, choice: FinishCode.STOP}


def test_a_choice_is_written_as_it_was_given_whatever_it_means_elsewhere(tokenizer_dir: Path) -> None:
    for text in (
        'say "yes"',
        "back\\slash",
        "\\u0041",
        "two\nlines\t",
        "\x00\x7f\u2028",
        "né 漢 😀",
        "/x/i",
        "a | b",
        "%json",
    ):
        spec = GrammarSpec("choice", json.dumps([text]))
        assert text_of(output_of(tokenizer_dir, spec)) == text


@pytest.mark.parametrize("spec", SPECS)
def test_an_output_cut_short_is_a_prefix_of_the_whole(tokenizer_dir: Path, spec: GrammarSpec) -> None:
    whole = output_of(tokenizer_dir, spec)
    for max_tokens in range(1, len(whole)):
        driver = make_driver(tokenizer_dir)
        sequence_id = driver.add([1, 2, 3], max_tokens=max_tokens, grammar=spec)
        driver.run()
        assert driver.outputs[sequence_id] == whole[:max_tokens]
        assert driver.finished[sequence_id] is FinishCode.LENGTH


@pytest.mark.parametrize("spec", SPECS)
def test_a_sequence_resumes_at_any_token_with_the_same_output(tokenizer_dir: Path, spec: GrammarSpec) -> None:
    whole = output_of(tokenizer_dir, spec)
    for num_stored in range(1, len(whole)):
        assert output_of(tokenizer_dir, spec, output=whole[:num_stored]) == whole


@pytest.mark.parametrize("runner_class", [FakeRunner, FakeRunnerAhead])
@pytest.mark.parametrize("seed", range(8))
def test_under_any_load_a_sequence_says_what_it_says_alone(
    tokenizer_dir: Path, seed: int, runner_class: type[FakeRunner]
) -> None:
    """Chunks, preemptions, aborts and resumptions, choices, and steps with hardly a token for what grammars force."""
    rng = random.Random(seed)
    max_num_seqs = rng.randint(2, 5)
    driver = make_driver(
        tokenizer_dir,
        num_blocks=rng.choice([13, 20, 60]),
        max_num_tokens=max_num_seqs + rng.choice([0, 1, 5, 40]),
        max_num_seqs=max_num_seqs,
        max_model_len=50,
        runner_class=runner_class,
    )
    expected: dict[int, list[int]] = {}
    while driver.num_added < 20 or driver.core.has_work():
        if driver.num_added < 20 and rng.random() < 0.4:
            prompt, spec = [rng.randrange(1, 60) for _ in range(rng.randint(1, 12))], rng.choice([*SPECS, None])
            group, n = driver.num_added, rng.choice([1, 1, 3])
            for choice in range(n):
                alone = make_driver(tokenizer_dir, max_model_len=50)
                alone.add(prompt, max_tokens=40, choice=choice, grammar=spec)
                alone.run()
                output = alone.outputs[0]
                resumed = output[: rng.randrange(len(output))] if rng.random() < 0.3 else []
                fields = {"output": resumed, "priority": rng.choice([0, 0, 1]), "group": group if n > 1 else None}
                expected[driver.add(prompt, max_tokens=40, choice=choice, grammar=spec, **fields)] = output  # type: ignore[arg-type]
        if rng.random() < 0.03 and (running := set(expected) - set(driver.finished)):
            driver.core.abort([victim := min(running)])
            expected[victim] = list(driver.outputs[victim])
        driver.step()
    assert driver.outputs == expected and not driver.errors


@pytest.mark.parametrize("spec", SPECS)
def test_tokens_are_the_same_when_somebody_wants_their_logprobs(tokenizer_dir: Path, spec: GrammarSpec) -> None:
    assert output_of(tokenizer_dir, spec, logprobs=0) == output_of(tokenizer_dir, spec)


def test_a_request_for_no_tokens_computes_its_prompt_and_has_no_use_for_a_grammar(tokenizer_dir: Path) -> None:
    driver = make_driver(tokenizer_dir)
    sequence_id = driver.add([1, 2, 3], max_tokens=0, grammar=SPECS[4])
    driver.run()
    assert driver.finished[sequence_id] is FinishCode.LENGTH and driver.core.get_stats().num_steps == 1


def test_an_ignored_end_of_sequence_still_ends_a_grammar(tokenizer_dir: Path) -> None:
    assert output_of(tokenizer_dir, SPECS[1], ignore_eos=True) == output_of(tokenizer_dir, SPECS[1])


def test_a_stop_token_among_forced_ones_ends_the_sequence(tokenizer_dir: Path) -> None:
    tokens = output_of(tokenizer_dir, SPECS[4], stop_token_ids=(ord("["),))
    assert text_of(tokens) == '{"a": ['


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (GrammarSpec("json_schema", '{"type": "objekt"}'), "Invalid type: objekt"),
        (GrammarSpec("json_schema", '{"not": {"type": "string"}}'), "Unimplemented keys"),
        (GrammarSpec("regex", "(a"), "unclosed group"),
        (GrammarSpec("regex", f"({'a' * 10_000}"), "unclosed group"),
        (GrammarSpec("regex", "(?=a)b"), "look-around"),
        (GrammarSpec("lark", "start: missing"), "unknown name"),
        (GrammarSpec("lark", 'start: "a" /[^\\s\\S]/'), "admits no token here"),
    ],
)
def test_a_grammar_that_cannot_be_had_fails_its_sequence_alone(
    tokenizer_dir: Path, spec: GrammarSpec, reason: str
) -> None:
    driver = make_driver(tokenizer_dir)
    failing = driver.add([1, 2, 3], grammar=spec)
    other = driver.add([1, 2, 3], grammar=SPECS[2])
    driver.run()
    assert reason in driver.errors[failing] and len(driver.errors[failing]) < 1100
    assert driver.finished[failing] is FinishCode.ERROR and driver.finished[other] is FinishCode.STOP
    assert driver.core.get_stats().num_kv_blocks_used == 0


def test_a_compilation_that_takes_long_holds_up_nobody_else(
    tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    build = GrammarCompiler._build

    def build_slowly(self: GrammarCompiler, spec: GrammarSpec) -> object:
        assert may_end.wait(30)
        return build(self, spec)

    monkeypatch.setattr(GrammarCompiler, "_build", build_slowly)
    driver = make_driver(tokenizer_dir)
    slow = driver.add([1, 2, 3], grammar=SPECS[2])
    free = driver.add([1, 2, 3], max_tokens=5)
    while free not in driver.finished:
        driver.step()
    assert slow not in driver.finished
    may_end.set()
    driver.run()
    assert driver.finished[slow] is FinishCode.STOP


def test_a_sequence_whose_grammar_is_ready_is_said_to_wait_until_it_runs(
    tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_done = PendingGrammars.take_done

    def take_all(self: PendingGrammars, *, waits: bool) -> list[PreparedSequence]:
        done = []
        while len(self):
            done += take_done(self, waits=True)
        return done

    monkeypatch.setattr(PendingGrammars, "take_done", take_all)
    driver = make_driver(tokenizer_dir, max_num_seqs=1)
    heard: list[Begun] = []
    driver.core.announce = heard.append
    free = driver.add([1, 2, 3], max_tokens=5)
    constrained = driver.add([1, 2, 3], grammar=SPECS[1])
    driver.run()
    assert heard == [Begun([constrained]), Begun([free], waiting=(constrained,)), Begun([constrained])]


def test_an_aborted_sequence_is_not_heard_of_when_its_grammar_is_ready(tokenizer_dir: Path) -> None:
    driver = make_driver(tokenizer_dir)
    aborted = driver.add([1, 2, 3], grammar=SPECS[2])
    driver.core.abort([aborted])
    assert not driver.core.has_work()


def test_an_ambiguous_grammar_fails_before_it_has_cost_the_others_much(tokenizer_dir: Path) -> None:
    """Each token is followed in all ways that lead to it: the hundredth takes a tenth of a second."""
    driver = make_driver(tokenizer_dir, max_model_len=400, num_blocks=400)
    ambiguous = GrammarSpec("lark", 'start: s "y"\ns: s s s | s s | /[^y]/')
    greedy = driver.add([1, 2, 3], max_tokens=390, grammar=ambiguous)
    free = driver.add([1, 2, 3], max_tokens=390, ignore_eos=True)
    driver.run()
    assert "takes too long to follow" in driver.errors[greedy]
    assert driver.finished[free] is FinishCode.LENGTH and len(driver.outputs[free]) == 390
    again = driver.add([1, 2, 3], max_tokens=390, grammar=ambiguous)
    driver.run()
    assert "takes too long to follow" in driver.errors[again]


def test_a_grammar_that_outgrows_its_limits_fails_instead_of_hanging(tokenizer_dir: Path) -> None:
    driver = make_driver(tokenizer_dir)
    greedy = driver.add([1, 2, 3], max_tokens=150, grammar=GrammarSpec("regex", "(.*a.*){40}(.*b.*){40}x"))
    driver.run()
    assert greedy in driver.finished
