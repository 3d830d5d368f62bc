"""Steps that are padded and replayed: the host's half, with graphs that run what they captured once more."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from engine.attention.base import AttentionBatch, AttentionRules
from engine.attention.triton_backend import TritonAttention
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import AddSequence
from engine.runner import cuda_graphs, step_forwards, step_shapes
from engine.runner.cuda_graphs import GraphedSteps
from engine.runner.model_runner import ModelRunner
from engine.runner.step_forwards import StepForwards
from engine.runner.step_shapes import StepShape
from engine.sampling_params import SamplingParams
from tests.fakes.core_driver import run_to_end
from tests.fakes.fast_interpreter import speed_up_interpreter
from tests.fakes.kernel_device import poisoned_memory
from tests.fakes.tiny_models import make_tiny_model

speed_up_interpreter()
# NumPy warns where exponentials are infinite, as they are meant to be.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


class ReplayedCall:
    """A graph that calls what it captured."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.replay = run


class MeasuredCapture:
    """Captures such."""

    def __call__(self, run: Callable[[], Any]) -> ReplayedCall:
        return ReplayedCall(run)


@pytest.fixture
def graphed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_tiles: None) -> tuple[Path, list[GraphedSteps]]:
    """A tiny model's folder, and the graphs of the runners that are made meanwhile."""
    monkeypatch.setattr(step_shapes, "_MIXED_STEP", 8)
    monkeypatch.setattr(step_shapes, "_MIN_BLOCKS", 1)
    made: list[GraphedSteps] = []

    def make(config: EngineConfig, model: Any) -> GraphedSteps | None:
        limits: dict[str, Any] = {"max_num_seqs": config.max_num_seqs, "max_num_tokens": config.step_tokens("cpu")}
        made.append(GraphedSteps(model, **limits, make_capture=lambda: ReplayedCall))
        return made[-1] if config.cuda_graphs else None

    monkeypatch.setattr(step_forwards, "_graphed_steps", make)
    return make_tiny_model("llama", tmp_path, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1), made


def config_of(folder: Path, **overrides: Any) -> EngineConfig:
    options: dict[str, Any] = {"dtype": "float32", "attention": "triton", "device": "cpu", "block_size": 4} | overrides
    return EngineConfig(
        model_path=str(folder), max_num_seqs=3, max_num_tokens=12, num_kv_blocks=24, max_model_len=96, **options
    )


def generate(folder: Path, *, runner: ModelRunner | None = None, **overrides: Any) -> list[list[int]]:
    config = config_of(folder, **overrides)
    core = EngineCore(config, runner=runner or ModelRunner(config))
    prompts = [[20, 21, 22, 23, 24], [99], list(range(30, 41))]
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=4, temperature=0.0 if i else 0.9, seed=i, ignore_eos=True)
        core.add(AddSequence(sequence_id=i, prompt_token_ids=prompt, params=params))
    return run_to_end(core, len(prompts))


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
def test_padded_and_replayed_steps_give_the_tokens_of_plain_ones(graphed: tuple[Path, list[GraphedSteps]]) -> None:
    folder, made = graphed
    expected = generate(folder, attention="torch", cuda_graphs=False)
    assert generate(folder) == expected
    assert made[-1].num_graphs > 0


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
def test_no_row_of_a_padded_step_has_what_its_memory_held_before(
    graphed: tuple[Path, list[GraphedSteps]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = graphed
    attend, num_rows = TritonAttention.attend, []

    def check(self: TritonAttention, q: Tensor, pages: Tensor, batch: AttentionBatch, rules: AttentionRules) -> Tensor:
        output = attend(self, q, pages, batch, rules)
        assert not output.isnan().any(), "padding attends to nothing, which gives zeros"
        num_rows.append(len(output))
        return output

    monkeypatch.setattr(TritonAttention, "attend", check)
    with poisoned_memory():
        generate(folder)
    assert {4, 16} <= set(num_rows), "decodes of three, and prompts beside them"


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
def test_graphs_of_the_largest_steps_are_measured_and_one_more_says_how_many_are_kept(
    graphed: tuple[Path, list[GraphedSteps]],
) -> None:
    folder, made = graphed
    ModelRunner(config_of(folder))
    captures: list[weakref.ref[MeasuredCapture]] = []
    num_left: list[int] = []  # of them, whenever memory is asked for

    def make_capture() -> MeasuredCapture:
        capture = MeasuredCapture()
        captures.append(weakref.ref(capture))
        return capture

    def free_bytes() -> int:
        num_left.append(sum(capture() is not None for capture in captures))
        return next(free)

    made[-1]._make_capture = make_capture
    free = iter([10_000, 9_000, 8_000, 7_900, 10_000])
    assert made[-1].measure(free_bytes, 0.5) == 2_000
    assert num_left == [0, 1, 1, 1, 0], "its pool is gone before the rest is shared out"
    assert made[-1].max_graphs == 25, "half of the share, of 100 bytes each"
    batch = made[-1]._model.context.batch
    assert batch is not None and batch.num_tokens == 16, "of twelve tokens, the most that a step has"
    free = iter([10_000, 9_000, 8_000, 8_000, 10_000])
    assert made[-1].measure(free_bytes, 0.0) == 2_000 and made[-1].max_graphs == 16, "some in any case"

    def wait_for_the_device(run: Callable[[], Any]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    made[-1]._make_capture = lambda: wait_for_the_device  # type: ignore[assignment, return-value]
    assert made[-1].measure(lambda: 1000, 0.1) == 0, "a start without graphs is one"
    graphs = dict(made[-1]._graphs)
    made[-1].prepare()
    assert made[-1].max_graphs == 0 and made[-1]._graphs == graphs, "nor is a capture tried again"


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
def test_a_start_runs_every_kernel_of_later_steps_and_captures_the_largest_first(
    graphed: tuple[Path, list[GraphedSteps]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = graphed
    attend, kernels = TritonAttention.attend, set()

    def note(self: TritonAttention, q: Tensor, pages: Tensor, batch: AttentionBatch, rules: AttentionRules) -> Tensor:
        kernels.add(self.kernels_of(batch, pages))
        return attend(self, q, pages, batch, rules)

    monkeypatch.setattr(TritonAttention, "attend", note)
    runner = ModelRunner(config_of(folder))
    assert list(made[-1]._graphs) == made[-1]._largest
    at_start = set(kernels)
    kernels.clear()
    generate(folder, runner=runner)
    assert kernels and kernels <= at_start
    assert made[-1].num_graphs > 2


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
def test_a_start_without_memory_for_the_largest_step_is_one(
    graphed: tuple[Path, list[GraphedSteps]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: GraphedSteps, shape: StepShape) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    folder, made = graphed
    expected = generate(folder, attention="torch", cuda_graphs=False)
    monkeypatch.setattr(GraphedSteps, "_run_padding", fail)
    assert generate(folder) == expected
    assert "action=graphs_unprepared" in caplog.text and made[-1].num_graphs > 0
    forwards = ModelRunner(config_of(folder))._forwards
    assert isinstance(forwards, StepForwards)
    made[-1].has_ranks = True
    with pytest.raises(torch.OutOfMemoryError):  # the others wait for this one's part
        forwards.prepare(forwards.max_graphs)


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
@pytest.mark.parametrize(("num_steps", "takes_places"), [(0, True), (1000, False)])
def test_no_more_graphs_are_kept_than_there_is_room_for(
    num_steps: int,
    takes_places: bool,
    graphed: tuple[Path, list[GraphedSteps]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, made = graphed
    expected = generate(folder, attention="torch", cuda_graphs=False)
    monkeypatch.setattr(cuda_graphs, "_MAX_GRAPHS", 3)
    monkeypatch.setattr(cuda_graphs, "_LONG_UNUSED", num_steps)
    assert generate(folder) == expected
    assert made[-1].num_graphs == 3
    assert (made[-1]._largest[0] not in made[-1]._graphs) == takes_places, "it is the longest unused"


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
@pytest.mark.parametrize(
    ("error", "is_final"),
    [
        (RuntimeError("operation not permitted when stream is capturing"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_what_cannot_be_captured_runs_as_it_is_and_only_memory_may_be_there_later(
    error: RuntimeError,
    is_final: bool,
    graphed: tuple[Path, list[GraphedSteps]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(run: Callable[[], Any]) -> None:
        raise error

    folder, made = graphed
    expected = generate(folder, attention="torch", cuda_graphs=False)
    monkeypatch.setitem(globals(), "ReplayedCall", fail)
    assert generate(folder) == expected
    assert "action=capture_failed" in caplog.text and (made[-1].max_graphs == 0) == is_final


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
def test_a_graph_that_lacks_memory_when_it_is_replayed_is_given_up_for_good_and_its_step_is_computed(
    graphed: tuple[Path, list[GraphedSteps]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = graphed
    expected = generate(folder, attention="torch", cuda_graphs=False)
    failed: list[Callable[[], Any]] = []

    class Unreplayed:
        def __init__(self, run: Callable[[], Any]) -> None:
            self.run = run

        def replay(self) -> None:
            failed.append(self.run)
            raise torch.AcceleratorError("CUDA error: out of memory")

    runner = ModelRunner(config_of(folder))
    made[-1].capture = Unreplayed
    made[-1]._graphs.clear()
    outcomes: list[bool] = []
    execute = ModelRunner.execute

    def note(self: ModelRunner, *args: Any) -> Any:
        outcomes.append(False)
        result = execute(self, *args)
        outcomes[-1] = True
        return result

    monkeypatch.setattr(ModelRunner, "execute", note)
    for _ in range(2):
        assert generate(folder, runner=runner) == expected
    assert all(outcomes), "no step was halved"
    assert 0 < len(failed) == made[-1].num_graphs, "none is tried twice"
    made[-1].has_ranks = True
    made[-1]._graphs.clear()
    with pytest.raises(torch.AcceleratorError):  # the others replay theirs, and would wait
        made[-1]._compute(made[-1]._largest[0])


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
def test_a_rank_keeps_as_many_graphs_as_are_agreed_upon_and_ends_where_it_alone_cannot_capture_one(
    graphed: tuple[Path, list[GraphedSteps]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Callable[[], Any]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    folder, made = graphed
    forwards = ModelRunner(config_of(folder))._forwards
    assert isinstance(forwards, StepForwards) and forwards.max_graphs == 512
    forwards.prepare(2)
    assert made[-1].max_graphs == 2
    made[-1].has_ranks = True
    made[-1].capture = fail  # type: ignore[assignment]
    with pytest.raises(torch.OutOfMemoryError):  # NCCL: the others would replay what this one launches
        forwards.prepare(2)
