"""Steps padded to shapes and replayed: the host's half, with a graph that runs what it captured once more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from engine.attention.base import AttentionBatch, AttentionRules
from engine.attention.triton_backend import TritonAttention
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import AddSequence
from engine.runner import step_forwards, step_shapes
from engine.runner.batch_inputs import BatchInputs
from engine.runner.cuda_graphs import CudaCapture, GraphedSteps
from engine.runner.memory import largest_step
from engine.runner.model_runner import ModelRunner
from engine.runner.step_shapes import StepBuffers, StepShape, choose_shape, decode_bucket, largest_shapes
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


def inputs_of(query_lens: list[int], contexts: list[int], *, block_size: int = 16) -> BatchInputs:
    """A step whose every array tells its places apart."""
    num_tokens, num_seqs = sum(query_lens), len(contexts)
    inputs = largest_step(EngineConfig(model_path="", max_num_seqs=num_seqs, max_num_tokens=num_tokens), num_tokens)
    width = -(-max(contexts) // block_size)
    inputs.input_ids = np.arange(num_tokens) + 100
    inputs.position_ids = np.arange(num_tokens) + 200
    inputs.slot_mapping = np.arange(num_tokens) + 300
    inputs.query_start = np.cumsum([0, *query_lens]).astype(np.int32)
    inputs.context_lens = np.array(contexts, np.int32)
    inputs.block_tables = np.arange(num_seqs * width, dtype=np.int32).reshape(num_seqs, width)
    inputs.logits_indices = inputs.query_start[1:].astype(np.int64) - 1
    inputs.sampled_positions = np.array(contexts)
    inputs.max_query_len = max(query_lens)
    inputs.scored = None
    return inputs


@pytest.mark.parametrize(
    ("num_seqs", "bucket"), [(1, 2), (2, 2), (3, 4), (5, 8), (9, 16), (66, 80), (249, 256), (257, 288), (512, 512)]
)
def test_decodes_are_padded_to_few_numbers_of_sequences(num_seqs: int, bucket: int) -> None:
    assert decode_bucket(num_seqs) == bucket


def test_a_steps_shape_depends_on_what_a_graph_bakes_in_alone() -> None:
    limits = {"max_num_seqs": 8, "max_blocks": 100}
    decode = choose_shape(inputs_of([1] * 5, [3, 9, 300, 7, 1]), **limits)
    assert decode == StepShape.of_decodes(8, 32)
    assert choose_shape(inputs_of([1] * 7, [300] * 7), **limits) == decode
    assert choose_shape(inputs_of([1], [1600]), **limits) == StepShape.of_decodes(2, 100)
    assert choose_shape(inputs_of([1, 130], [3, 130]), **limits) == StepShape.mixed(256, 8, 16)
    assert choose_shape(inputs_of([3000], [3000]), **limits) == StepShape.mixed(3072, 8, 100)
    assert choose_shape(inputs_of([8193], [8193]), **limits) is None
    limits["max_num_seqs"] = 200
    wide = choose_shape(inputs_of([1] * 3, [3] * 3), **limits, row_step=64)
    assert wide == StepShape.of_decodes(64, 16)
    wide = choose_shape(inputs_of([1, 130], [3, 130]), **limits, row_step=64)
    assert wide == StepShape.mixed(256, 64, 16)
    assert choose_shape(inputs_of([1, 130], [3, 130]), **limits) == StepShape.mixed(256, 16, 16)
    assert choose_shape(inputs_of([1] * 99 + [2], [3] * 100), **limits) == StepShape.mixed(128, 208, 16)
    unsampled = inputs_of([100], [100])
    unsampled.logits_indices = unsampled.logits_indices[:0]
    assert choose_shape(unsampled, **limits) == StepShape.mixed(128, 16, 16)
    scoring = inputs_of([4], [4])
    scoring.scored = largest_step(EngineConfig(model_path="", max_num_seqs=1, max_num_tokens=4), 4).scored
    assert choose_shape(scoring, **limits) is None


@pytest.mark.parametrize(
    ("max_num_tokens", "num_tokens"), [(8, 128), (300, 384), (4200, 4608), (8192, 8192), (9000, 8192)]
)
def test_no_more_memory_is_kept_for_graphs_than_steps_may_have_tokens(max_num_tokens: int, num_tokens: int) -> None:
    largest = largest_shapes(8, max_num_tokens, 100, row_step=64)
    assert largest == [StepShape.of_decodes(64, 100), StepShape.mixed(num_tokens, 64, 100)]


def test_a_step_is_laid_out_anew_and_its_padding_has_no_keys_no_slots_and_no_queries() -> None:
    decode = StepShape.of_decodes(8, 16)
    mixed = StepShape.mixed(128, 8, 16)
    buffers = StepBuffers([decode, mixed], torch.device("cpu"))
    buffers.fill(decode, inputs_of([1] * 8, [9] * 8))
    buffers.fill(mixed, inputs_of([1, 20, 3], [40, 20, 90]))
    tensors = buffers.tensors(mixed)
    assert tensors.input_ids[:25].tolist() == [*range(100, 124), 0]
    assert tensors.position_ids[23] == 223 and tensors.slot_mapping[22:26].tolist() == [322, 323, -1, -1]
    assert tensors.query_start.tolist() == [0, 1, 21, 24, 24, 24, 24, 24, 24, 128], "the last one's are padding"
    assert tensors.context_lens.tolist() == [40, 20, 90, 0, 0, 0, 0, 0, 0]
    assert tensors.logits_indices.tolist() == [0, 20, 23, 0, 0, 0, 0, 0]
    assert tensors.block_tables[:4, :7].tolist() == [[*range(6), 0], [*range(6, 12), 0], [*range(12, 18), 0], [0] * 7]
    buffers.fill(decode, inputs_of([1] * 3, [40, 20, 90]))
    tensors = buffers.tensors(decode)
    assert tensors.slot_mapping.tolist() == [300, 301, 302, -1, -1, -1, -1, -1]
    assert tensors.query_start.tolist() == list(range(9)) and tensors.context_lens.tolist()[2:4] == [90, 0]
    assert not tensors.block_tables[3:].any(), "nothing is left of the step before"


@pytest.fixture
def graphed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_tiles: None) -> tuple[Path, list[GraphedSteps]]:
    """A tiny model's folder, and the graphs of the runners that are made meanwhile."""
    monkeypatch.setattr(step_shapes, "_MIXED_STEP", 8)
    monkeypatch.setattr(step_shapes, "_MIN_BLOCKS", 1)
    made: list[GraphedSteps] = []

    def make(config: EngineConfig, model: Any) -> GraphedSteps | None:
        limits = {"max_num_seqs": config.max_num_seqs, "max_num_tokens": config.step_tokens("cpu")}
        made.append(GraphedSteps(model, **limits, make_capture=lambda: ReplayedCall))
        return made[-1] if config.cuda_graphs else None

    monkeypatch.setattr(step_forwards, "_graphed_steps", make)
    return make_tiny_model("llama", tmp_path), made


def config_of(folder: Path, **overrides: Any) -> EngineConfig:
    options: dict[str, Any] = {"dtype": "float32", "attention": "triton", "device": "cpu", "block_size": 4} | overrides
    return EngineConfig(model_path=str(folder), max_num_seqs=3, max_num_tokens=12, num_kv_blocks=24, **options)


def generate(folder: Path, **overrides: Any) -> list[list[int]]:
    config = config_of(folder, **overrides)
    core = EngineCore(config, runner=ModelRunner(config))
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
def test_graphs_of_the_largest_steps_are_measured(graphed: tuple[Path, list[GraphedSteps]]) -> None:
    folder, made = graphed
    ModelRunner(config_of(folder))
    free = iter([1000, 700])
    captured: list[Callable[[], Any]] = []
    made[-1]._make_capture = lambda: lambda run: captured.append(run)  # type: ignore[assignment, return-value]
    assert made[-1].measure(lambda: next(free)) == 300 and len(captured) == 2
    batch = made[-1]._model.context.batch
    assert batch is not None and batch.num_tokens == 16, "of twelve tokens, the most that a step has"

    def wait_for_the_device(run: Callable[[], Any]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    made[-1]._make_capture = lambda: wait_for_the_device  # type: ignore[assignment, return-value]
    assert made[-1].measure(lambda: 1000) == 0 and not made[-1]._can_capture, "a start without graphs is one"


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
    assert "action=capture_failed" in caplog.text and made[-1]._can_capture != is_final


class _FakeGraph:
    def __init__(self, happened: list[str], fails: bool) -> None:
        self._happened = happened
        self._fails = fails

    def capture_begin(self, *, pool: int, capture_error_mode: str) -> None:
        self._happened.append(f"begin in pool {pool}, errors {capture_error_mode}")

    def capture_end(self) -> None:
        self._happened.append("end")
        if self._fails:
            raise torch.AcceleratorError("the capture is invalid")


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of a CUDA that is not there."""
    calls: list[str] = []

    class Stream:
        def __enter__(self) -> None:
            calls.append("enter")

        def __exit__(self, *exception: object) -> None:
            calls.append("leave")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 7)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "side")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Stream())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty cache"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: _FakeGraph(calls, fails=False))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda _, pool: calls.append(f"close {pool}"), False)
    return calls


def test_a_capture_is_on_a_stream_of_its_own(happened: list[str]) -> None:
    CudaCapture()(lambda: happened.append("run"))
    assert happened == ["wait", "enter", "begin in pool 7, errors global", "run", "end", "leave"]


def test_a_capture_that_fails_leaves_its_stream_and_its_pool(
    happened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait_for_the_device() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: _FakeGraph(happened, fails=True))
    with pytest.raises(torch.AcceleratorError):
        CudaCapture()(wait_for_the_device)
    assert happened == ["wait", "enter", "begin in pool 7, errors global", "end", "close 7", "leave"]


def test_a_capture_without_memory_is_tried_again_with_what_was_cached(happened: list[str]) -> None:
    def run() -> None:
        if "empty cache" not in happened:
            raise torch.OutOfMemoryError("CUDA out of memory")

    CudaCapture()(run)
    attempt = ["wait", "enter", "begin in pool 7, errors global", "end", "leave"]
    assert happened == [*attempt, "empty cache", *attempt]
