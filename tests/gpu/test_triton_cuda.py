"""Compiled kernels, graphs and `deterministic` on a real device; the kernels' twin tests run there as well.

`pytest -m gpu tests/gpu` runs these; `pytest tests/unit/engine/test_triton_*.py` runs the twins on the GPU if there is
one, without Triton's interpreter.
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from benchmarks.gpu_first_run import compilations
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.kernels import triton as kernels
from engine.messages import AddSequence
from engine.model.loader import load_model
from engine.model.paged_modules import PagedLayer
from engine.runner import cuda_graphs
from engine.runner.cuda_graphs import CudaCapture
from engine.runner.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from tests.fakes.core_driver import run_to_end
from tests.fakes.packed_forward import BLOCK_SIZE, LENGTHS, prompts, run, steps_of
from tests.fakes.tiny_models import VOCAB_SIZE, make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def no_kernels() -> None:
    """As in a process that has launched none: each is compiled, or found on disk, once more."""
    for module in iter_modules(kernels.__path__, f"{kernels.__name__}."):
        for function in vars(import_module(module.name)).values():
            if isinstance(function, JITFunction):
                function.device_caches.clear()


@pytest.fixture
def tiny_qwen(tmp_path: Path) -> Iterator[Path]:
    yield make_tiny_model("qwen3", tmp_path)


def generate(folder: Path, **options: Any) -> tuple[list[list[int]], ModelRunner]:
    """Greedy and sampled tokens of sequences that come and go, so that steps of many shapes occur, and the runner."""
    config = config_of(folder, **options)
    runner = ModelRunner(config)
    return run_some(config, runner), runner


def config_of(folder: Path, **options: Any) -> EngineConfig:
    return EngineConfig(
        model_path=str(folder), max_num_seqs=8, max_num_tokens=64, num_kv_blocks=64, dtype="float32", **options
    )


def run_some(config: EngineConfig, runner: ModelRunner) -> list[list[int]]:
    core = EngineCore(config, runner=runner)
    for i in range(12):
        params = SamplingParams(max_tokens=6 + 3 * i, temperature=0.8 * (i % 2), seed=i, top_p=0.9, ignore_eos=True)
        core.add(AddSequence(sequence_id=i, prompt_token_ids=[20 + i] * (1 + 9 * i), params=params))
    return run_to_end(core, 12)


def test_graphs_are_captured_and_change_no_token(tiny_qwen: Path) -> None:
    expected, _ = generate(tiny_qwen, device="cpu")
    plain, without = generate(tiny_qwen, device="cuda", cuda_graphs=False)
    graphed, runner = generate(tiny_qwen, device="cuda")
    graphs = runner.graphs
    assert without.graphs is None and graphs is not None and graphs.num_graphs > 0
    assert plain == expected and graphed == expected


def test_a_capture_that_waits_for_the_device_fails_and_leaves_it_usable() -> None:
    capture, stream = CudaCapture(), torch.cuda.current_stream()
    x, y = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = capture(lambda: y.add_(x))
    assert not y.any(), "what is captured does not run"
    graph.replay()
    graph.replay()
    assert y.tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError):
        capture(lambda: float(x.sum()))
    assert torch.cuda.current_stream() == stream and float((x + y).sum()) == 9
    torch.cuda.empty_cache()  # torch refuses that while a capture's pool is open
    capture(lambda: y.add_(x)).replay()
    graph.replay()
    assert y.tolist() == [4, 4, 4]


def test_a_pool_takes_further_captures_when_one_lacked_memory_and_when_its_graphs_are_gone() -> None:
    capture, weight = CudaCapture(), torch.randn(512, 512, device="cuda")
    y, lacks = torch.zeros_like(weight), iter([True])

    def multiply() -> None:
        product = weight @ weight
        if next(lacks, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        y.copy_(product)

    for _ in range(2):
        y.zero_()
        capture(multiply).replay()
        assert torch.equal(y, weight @ weight)
        torch.cuda.empty_cache()


def test_graphs_are_measured_before_the_cache_takes_the_memory(tiny_qwen: Path) -> None:
    config = EngineConfig(
        model_path=str(tiny_qwen), device="cuda", dtype="bfloat16", max_num_seqs=8, kv_memory_fraction=0.02
    )
    runner = ModelRunner(config)
    graphs = runner.graphs
    assert graphs is not None and runner.info.step_tokens is not None

    def free_bytes() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    num_graphs = graphs.num_graphs  # of the largest steps, and those that were timed
    assert graphs.measure(free_bytes, 0.5) > 0 and graphs.num_graphs == num_graphs


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_started_engine_compiles_no_kernel_of_its_own_in_its_first_steps(cuda_graphs: bool, tiny_qwen: Path) -> None:
    with compilations() as at_start:
        config = config_of(tiny_qwen, device="cuda", cuda_graphs=cuda_graphs)
        runner = ModelRunner(config)
    assert at_start.num_compiled + at_start.num_found
    with compilations() as later:
        run_some(config, runner)
    assert (later.num_compiled, later.num_found) == (0, 0)


def test_few_graphs_take_each_others_place_and_change_no_token(
    tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = generate(tiny_qwen, device="cuda")
    monkeypatch.setattr(cuda_graphs, "_MAX_GRAPHS", 3)
    monkeypatch.setattr(cuda_graphs, "_LONG_UNUSED", 0)
    tokens, runner = generate(tiny_qwen, device="cuda")
    assert tokens == expected
    assert runner.graphs is not None and runner.graphs.num_graphs == 3


def test_the_modules_are_fused_on_a_gpu_too(tiny_qwen: Path) -> None:
    model = load_model(EngineConfig(model_path=str(tiny_qwen), device="cuda", dtype="bfloat16"))
    assert model.backend_name == "triton"
    assert sum(isinstance(module, PagedLayer) for module in model.model.modules()) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_deterministic_models_logits_do_not_depend_on_chunks_or_batch_mates(tiny_qwen: Path, dtype: str) -> None:
    config = EngineConfig(
        model_path=str(tiny_qwen), device="cuda", dtype=dtype, block_size=BLOCK_SIZE, deterministic=True
    )
    model = load_model(config)
    sequences = prompts(VOCAB_SIZE)
    together = run(model, sequences, steps_of(1000))
    for size in (13, 1):
        for output, same in zip(run(model, sequences, steps_of(size)), together, strict=True):
            assert torch.equal(output, same), f"in chunks of {size}"
    for i, same in enumerate(together):
        assert torch.equal(run(model, [sequences[i]], [[(0, 0, LENGTHS[i])]])[0], same), f"sequence {i} alone"
