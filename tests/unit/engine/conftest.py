"""One thread of arithmetic for every test of the engine: with more, threads wait for each other on a busy machine.

And what several files ask: an engine, a request table, compiled kernels, attention backends."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine import InferenceEngine
from engine.model.locate import default_cache_dir
from tests.fakes.echo_engines import echo_engine
from tests.fakes.request_tables import Table

if TYPE_CHECKING:  # torch is for the tests that need it
    from engine.attention.base import AttentionBackend
    from engine.attention.native import NativeAttention

# Where there is no Triton (it is for Linux alone) there is nothing of it to test.
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_triton_*.py", "test_cuda_graphs.py", "test_model_ahead.py"]
# Triton's kernels are compiled where there is a GPU, else run by its interpreter: read when they are first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch = sys.modules.get("torch")  # a test that needs no torch shall not wait for its import
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that a test asks for are those of now, however busy the machine is."""
    monkeypatch.setattr("engine.supervisor._STATS_SECONDS", 30.0)


@pytest.fixture(scope="session")
def kernels_dir() -> Path:
    """Where engines keep compiled kernels: each is compiled once, whoever needs it first."""
    return default_cache_dir() / "kernels"


@pytest.fixture
def cache_dir(kernels_dir: Path, tmp_path: Path) -> Path:
    """An engine's cache that is the test's own, but for kernels: those are compiled once for all."""
    folder = tmp_path / "cache"
    folder.mkdir()
    kernels_dir.mkdir(parents=True, exist_ok=True)
    (folder / "kernels").symlink_to(kernels_dir)
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with nothing in it but a tokenizer of bytes."""
    from tests.fakes.tiny_models import write_byte_tokenizer

    folder = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture
def native(kernels_dir: Path) -> "NativeAttention":
    from engine.attention.native import NativeAttention
    from engine.kernels.build import KernelBuildError

    try:
        return NativeAttention(kernels_dir)
    except KernelBuildError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["torch", "native"])
def backend(request: pytest.FixtureRequest) -> "AttentionBackend":
    """Each that computes on a CPU."""
    from engine.attention.torch_backend import TorchAttention

    if request.param == "torch":
        return TorchAttention()
    native: NativeAttention = request.getfixturevalue("native")
    return native


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """See there."""
    from tests.fakes.small_tiles import set_small_tiles

    set_small_tiles(monkeypatch.setattr)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[InferenceEngine]:
    """With an echoing core on a thread of this process."""
    with echo_engine(tmp_path, max_model_len=5000, step_seconds=0.0005) as engine:
        yield engine


@pytest.fixture
def table() -> Table:
    return Table()
