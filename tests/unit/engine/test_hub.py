"""A model that is fetched from the hub: its start has as long as the download gets on, and says how far that is."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import InferenceEngine, SamplingParams
from tests.fakes.model_hub import HUB_ID, ModelHub, serving
from tests.fakes.tiny_models import make_tiny_model

FETCH = (
    "import sys\nfrom pathlib import Path\nfrom engine.model.hub import fetch_model\n"
    "print(fetch_model(sys.argv[1], Path(sys.argv[2]), lambda said: print(said, flush=True), otherwise='-'))"
)


class Heard(logging.Handler):
    """What the engine says while it starts."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.has_heard = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "action=starting" in record.getMessage():
            self.messages.append(record.getMessage())
            self.has_heard.set()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """One whose model has a file of more than the 10 MB that make a piece of a download, and children that ask it."""
    folder = make_tiny_model("llama", tmp_path / "model")
    (folder / "notes.json").write_text(json.dumps(" " * 11_000_000))
    hub = ModelHub(folder)
    with serving(hub) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield hub


def test_an_engine_that_fetches_its_model_says_how_far_it_has_come(hub: ModelHub, cache_dir: Path) -> None:
    heard, log = Heard(), logging.getLogger("engine.kept_child")
    log.addHandler(heard)
    level = log.level
    log.setLevel(logging.INFO)
    engine = InferenceEngine(HUB_ID, device="cpu", num_kv_blocks=8, cache_dir=str(cache_dir))
    try:
        engine.launch()
        assert heard.has_heard.wait(120), "it tells while the download goes on"
        hub.may_end.set()
        engine.start()
        assert len(engine.generate_batch([[5, 6]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
    finally:
        hub.may_end.set()
        engine.stop()
        log.removeHandler(heard)
        log.setLevel(level)
    assert f"{HUB_ID}: 1" in heard.messages[0] and "of 1" in heard.messages[0] and "MB fetched" in heard.messages[0]


def fetch_elsewhere(locks: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", FETCH, HUB_ID, str(locks)], stdout=subprocess.PIPE, text=True)


def test_of_two_workers_that_start_at_once_one_fetches_and_the_other_hears_of_it(hub: ModelHub, tmp_path: Path) -> None:
    with fetch_elsewhere(tmp_path / "locks") as first:
        assert first.stdout is not None
        said = first.stdout.readline().strip()
        with fetch_elsewhere(tmp_path / "locks") as second:
            assert second.stdout is not None
            heard = second.stdout.readline().strip()
            hub.may_end.set()
            folders = {process.communicate()[0].splitlines()[-1] for process in (first, second)}
    assert "MB fetched" in said and heard == f"another process is at it: {said}"
    assert len(folders) == 1 and hub.num_downloads == len(hub.files)


def test_a_model_is_fetched_where_there_is_no_place_for_a_lock(hub: ModelHub, tmp_path: Path) -> None:
    hub.may_end.set()
    (tmp_path / "locks").write_text("a file in the folder's place")
    with fetch_elsewhere(tmp_path / "locks") as alone:
        folder = Path(alone.communicate()[0].splitlines()[-1])
    assert (folder / "model.safetensors").is_file() and alone.returncode == 0
