"""Two engines in turns: who goes first, what is compared, and what is said of the ratios."""

import os
import time
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.paired_engines import PairedEngines, Slice, Work, describe, take_turns
from benchmarks.process_figures import cpu_seconds
from engine import SamplingParams

WORK = Work([[1, 2]], SamplingParams(max_tokens=2), num_counted=10)


class FixedEngine:
    """Takes so long, whatever it is to do."""

    def __init__(self, name: str, turns: list[str], seconds: float, token_ids: list[int]) -> None:
        self.engine: Any = SimpleNamespace(info=SimpleNamespace(is_batch_invariant=True))
        self._name, self._turns = name, turns
        self._slice = Slice(seconds, 2 * seconds, [token_ids])

    def measure(self, work: Work) -> Slice:
        self._turns.append(self._name)
        return self._slice


def pair(turns: list[str], *, tokens_off: list[int], tokens_on: list[int]) -> PairedEngines:
    off, on = FixedEngine("off", turns, 1.5, tokens_off), FixedEngine("on", turns, 1.0, tokens_on)
    return PairedEngines(off, on)  # type: ignore[arg-type]


def test_the_engines_take_turns_in_going_first_and_each_pair_has_its_ratio() -> None:
    turns: list[str] = []
    cells = pair(turns, tokens_off=[7], tokens_on=[7]).race([WORK] * 4, name="task")
    assert turns == ["on", "off", "off", "on"] * 2
    assert cells == ["7", "10", "1.500 ± 0.000 (1.500 to 1.500)", "1.500 ± 0.000 (1.500 to 1.500)"]


def test_each_of_three_has_every_place_and_is_told_in_its_own() -> None:
    turns: list[str] = []
    contenders = [FixedEngine(name, turns, seconds, []) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    groups = list(take_turns(contenders, [WORK] * 3))
    assert turns == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert [[slice_.seconds for slice_ in group] for group in groups] == [[1.0, 2.0, 3.0]] * 3


def test_an_output_that_the_setting_changes_ends_the_run() -> None:
    with pytest.raises(SystemExit, match="task: the setting changed an output"):
        pair([], tokens_off=[7], tokens_on=[8]).race([WORK], name="task")


def test_ratios_are_told_by_their_median_and_the_middle_half_or_all_if_there_are_few() -> None:
    assert describe([1.0, 2.0, 3.0, 4.0, 100.0]) == "3.000 ± 0.832 (2.000 to 4.000)"
    assert describe([2.0, 1.0]) == "1.500 (1.000 to 2.000)"


def test_cpu_seconds_are_those_of_the_process_to_more_than_a_hundredth() -> None:
    before, own = cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() - own < 0.005:
        pass
    assert 0.005 <= cpu_seconds(os.getpid()) - before < 0.1
