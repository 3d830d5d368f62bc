"""Draws in graphs give the sampler's tokens while rows and their parameters change; what cannot be captured runs."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.runner.cuda_graphs import Graph
from engine.runner.graphed_draws import GraphedDraws
from engine.sampler import Sampler, SamplingBatch
from engine.step_plan import BAD_LOGITS
from tests.fakes.sampling_batches import batch_of, random_batch


class Captures:
    """Graphs that call what they captured, counted."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, run: Callable[[], Any]) -> Graph:
        self.num_captured += 1

        def replay() -> None:
            self.num_replayed += 1
            run()

        return SimpleNamespace(replay=replay)


def check_draw(draws: GraphedDraws, logits: Tensor, batch: SamplingBatch, num_rows: int, *, seed: int) -> None:
    """New logits in the buffer's first rows; those behind hold what no row of a step may see."""
    count = len(batch.position)
    logits.copy_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)))
    logits[count:] = float("nan")
    assert draws.draw(batch, num_rows).tolist() == Sampler().sample(logits[:count].clone(), batch).tolist()


def test_tokens_are_the_samplers_while_rows_come_and_go() -> None:
    logits, captures = torch.empty(8, 300), Captures()
    draws = GraphedDraws(Sampler(), logits, captures)
    for step in range(12):
        batch = random_batch(8 - step % 4, seed=step // 2)
        batch.position = torch.arange(len(batch.position)) + step
        check_draw(draws, logits, batch, 8, seed=step)
    assert (captures.num_captured, captures.num_replayed) == (1, 11), "the first of a kind runs as it is"
    check_draw(draws, logits, batch_of(8, temperature=0.0), 8, seed=12)
    greedy = batch_of(3, temperature=0.0)
    greedy.may_draw = greedy.may_cut = False
    for step in (13, 14):
        check_draw(draws, logits, greedy, 4, seed=step)
    assert captures.num_captured == 2, "greedy rows are a kind of their own"


def test_a_row_whose_logits_are_no_numbers_is_settled() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    logits[2] = float("nan")
    batch = batch_of(4, temperature=0.0)
    batch.may_draw = batch.may_cut = False
    draws = GraphedDraws(Sampler(), logits, Captures())
    for _ in range(2):
        assert [token == BAD_LOGITS for token in draws.draw(batch, 4).tolist()] == [False, False, True, False]


@pytest.mark.parametrize("when", ["captured", "replayed"])
def test_what_there_is_no_memory_to_capture_or_to_replay_runs_as_it_is(
    when: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def refuse(run: Callable[[], Any]) -> Graph:
        return SimpleNamespace(replay=fail) if when == "replayed" else fail()  # type: ignore[return-value]

    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    draws = GraphedDraws(Sampler(), logits, refuse)
    for step in range(3):
        batch = random_batch(4, seed=step)
        assert draws.draw(batch, 4).tolist() == Sampler().sample(logits.clone(), batch).tolist()
    assert caplog.text.count("action=draw_capture_failed") == 1
