"""Drives an `EngineCore` by hand: adds sequences, steps, and keeps what came out of each."""

import random

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.grammar_spec import GrammarSpec
from engine.messages import AddSequence, FinishCode, StepOutput
from engine.runner.base import Runner
from engine.sampling_params import SamplingParams


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(50) for _ in range(length)]


def run_to_end(core: EngineCore, num_sequences: int) -> list[list[int]]:
    """The tokens that sequences 0, 1, 2, … are given until nothing is left to do; none of them may fail."""
    outputs: list[list[int]] = [[] for _ in range(num_sequences)]
    while core.has_work():
        step = core.step()
        core.check_integrity()
        assert not step.errors
        for sequence_id, token_id in zip(step.sequence_ids.tolist(), step.token_ids.tolist(), strict=True):
            outputs[sequence_id].append(token_id)
    return outputs


class CoreDriver:
    """Checks integrity after each step."""

    def __init__(
        self,
        runner: Runner,
        *,
        max_num_seqs: int = 8,
        max_num_tokens: int = 16,
        prefix_caching: bool = True,
        prompt_lookup: str = "auto",
    ) -> None:
        config = EngineConfig(
            model_path="fake",
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            block_size=runner.info.block_size,
            num_kv_blocks=runner.info.num_kv_blocks,
            prefix_caching=prefix_caching,
            prompt_lookup=prompt_lookup,
        )
        self.core = EngineCore(config, runner=runner, tries_grammars_apart=False)
        self.outputs: dict[int, list[int]] = {}  # resumed tokens included
        self.finished: dict[int, FinishCode] = {}
        self.errors: dict[int, str] = {}
        self.cached_tokens: dict[int, int] = {}
        self._next_id = 0
        self._num_tokens = 0

    @property
    def num_added(self) -> int:
        """Which is the id of the next sequence."""
        return self._next_id

    def add(
        self,
        prompt: list[int],
        *,
        max_tokens: int | None = 8,
        priority: int = 0,
        deadline: float | None = None,
        group: int | None = None,
        cache_key: str = "",
        seed: int = 0,
        choice: int = 0,
        output: list[int] | None = None,
        stop_token_ids: tuple[int, ...] = (),
        ignore_eos: bool = False,
        grammar: GrammarSpec | None = None,
        logprobs: int | None = None,
    ) -> int:
        sequence_id = self._next_id
        self._next_id += 1
        self.core.add(
            AddSequence(
                sequence_id=sequence_id,
                prompt_token_ids=prompt,
                params=SamplingParams(
                    max_tokens=max_tokens,
                    seed=seed,
                    stop_token_ids=stop_token_ids,
                    ignore_eos=ignore_eos,
                    grammar=grammar,
                    logprobs=logprobs,
                ),
                choice_index=choice,
                output_token_ids=list(output or []),
                priority=priority,
                deadline=deadline,
                group_id=group,
                cache_key=cache_key,
            )
        )
        self.outputs[sequence_id] = list(output or [])
        return sequence_id

    def step(self) -> StepOutput:
        step = self.core.step()
        self.core.check_integrity()
        for sequence_id, token_id, code in zip(step.sequence_ids, step.token_ids, step.finish_codes, strict=True):
            assert int(sequence_id) not in self.finished, "a token after the end"
            self.outputs[int(sequence_id)].append(int(token_id))
            if code != FinishCode.NONE:
                self.finished[int(sequence_id)] = FinishCode(int(code))
        self.finished.update(dict.fromkeys(step.errors, FinishCode.ERROR))
        self.finished.update(dict.fromkeys(step.grammar_errors, FinishCode.ERROR))
        self.errors.update(step.errors | step.grammar_errors)
        self.cached_tokens.update(step.cached_tokens)
        self._num_tokens += len(step.token_ids)
        assert self.core.get_stats().num_generated_tokens == self._num_tokens
        return step

    def run(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if not self.core.has_work():
                return
            self.step()
        raise AssertionError(f"not done after {max_steps} steps: {self.core.get_stats()}")
