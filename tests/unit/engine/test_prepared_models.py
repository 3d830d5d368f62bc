"""Models kept as loading left them: the same bits from the file, and a plain load wherever the file does not serve."""

import errno
import fcntl
import os
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engine.config import EngineConfig
from engine.model import loader, preparation
from engine.model.loader import LoadedModel, load_model
from engine.model.prepared_models import PreparedModels
from engine.model.registry import ARCHITECTURES
from tests.fakes.packed_forward import BLOCK_SIZE, prompts, run, steps_of
from tests.fakes.tiny_models import VOCAB_SIZE, make_tiny_model


@pytest.fixture(autouse=True)
def keeps_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "PreparedModels", partial(PreparedModels, min_bytes=0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model("llama", tmp_path / "model")


def load(folder: Path, cache_dir: Path, **options: object) -> LoadedModel:
    """Waits for what is kept of it."""
    config = EngineConfig(
        model_path=str(folder),
        cache_dir=str(cache_dir),
        block_size=BLOCK_SIZE,
        **({"dtype": "float32"} | options),  # type: ignore[arg-type]
    )
    model = load_model(config)
    for thread in threading.enumerate():
        if thread.name == "keep-model":
            thread.join()
    return model


def logits(model: LoadedModel) -> list[torch.Tensor]:
    return run(model, prompts(VOCAB_SIZE), steps_of(9))


def kept(cache_dir: Path) -> list[Path]:
    return sorted((cache_dir / "prepared").iterdir())


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_weights(*args: object) -> None:
        raise AssertionError("the weights are loaded again")

    monkeypatch.setattr(preparation, "_load_weights", load_weights)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *((name, {}) for name in sorted(ARCHITECTURES)),
        ("llama", {"quantize": "int8"}),
        ("qwen2", {"quantize": "int8"}),
        ("llama", {"dtype": "bfloat16"}),
        ("llama", {"dtype": "float16"}),
        ("llama", {"attention": "torch"}),
    ],
)
def test_a_model_from_its_file_computes_to_the_bit_what_it_did_when_it_was_loaded(
    architecture: str, options: dict[str, object], tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model(architecture, tmp_path / "model")
    first = load(folder, cache_dir, **options)
    refuse_to_load(monkeypatch)
    again = load(folder, cache_dir, **options)
    assert (again.fingerprint, again.vocab_size, again.num_layers) == (first.fingerprint, VOCAB_SIZE, first.num_layers)
    for ours, expected in zip(logits(again), logits(first), strict=True):
        assert torch.equal(ours, expected)


def test_writing_to_a_mapped_weight_leaves_the_file_as_it_was(folder: Path, cache_dir: Path) -> None:
    expected = logits(load(folder, cache_dir))
    model = load(folder, cache_dir)
    embedding = model.model.get_input_embeddings().weight  # type: ignore[operator]
    embedding.detach().zero_()
    assert not torch.equal(logits(model)[0], expected[0])
    assert torch.equal(logits(load(folder, cache_dir))[0], expected[0])


def test_weights_dtype_and_quantisation_each_have_a_file_of_their_own(folder: Path, cache_dir: Path) -> None:
    load(folder, cache_dir)
    load(folder, cache_dir, dtype="bfloat16")
    load(folder, cache_dir, quantize="int8")
    assert len(kept(cache_dir)) == 3
    first = logits(load(folder, cache_dir))[0]
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert not torch.equal(logits(load(folder, cache_dir))[0], first)
    assert len(kept(cache_dir)) == 4


def test_weights_that_were_written_anew_are_loaded_anew_even_where_samples_of_them_agree(
    folder: Path, cache_dir: Path
) -> None:
    load(folder, cache_dir)
    path = folder / "model.safetensors"
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    load(folder, cache_dir)
    assert len(kept(cache_dir)) == 2


@pytest.mark.parametrize("place", [0, 9, 60, None], ids=["magic", "size", "modules", "end"])
def test_a_damaged_file_is_passed_over_and_written_anew(place: int | None, folder: Path, cache_dir: Path) -> None:
    expected = logits(load(folder, cache_dir))
    (path,) = kept(cache_dir)
    whole = path.read_bytes()
    damaged = whole[:-1] if place is None else whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    path.write_bytes(damaged)
    assert torch.equal(logits(load(folder, cache_dir))[0], expected[0])
    assert path.read_bytes() == whole


def test_a_model_that_no_file_can_hold_is_loaded_every_time(tmp_path: Path) -> None:
    store = PreparedModels(tmp_path / "prepared", min_bytes=0)
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *args: None)
    assert store.keep("hooked", layer, {}) is None
    assert store.keep("strided", torch.zeros(4, 4).t()[:, :2], {}) is None
    assert store.load("hooked", {}) is None


def test_a_folder_that_cannot_be_written_hinders_no_start(folder: Path, cache_dir: Path) -> None:
    (cache_dir / "prepared").write_text("a file in the folder's place")
    assert load(folder, cache_dir).num_layers == 2
    assert load(folder, cache_dir).num_layers == 2


def test_a_folder_that_is_mounted_read_only_serves_all_the_same(
    folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder, cache_dir)

    def refuse(*args: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("utime", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    refuse_to_load(monkeypatch)
    assert load(folder, cache_dir).num_layers == 2


def test_small_models_and_those_beyond_half_the_room_are_not_kept(tmp_path: Path) -> None:
    store = PreparedModels(tmp_path, min_bytes=100_000, max_bytes=1_000_000)
    assert store.keep("small", torch.zeros(1000), {}) is None
    assert store.keep("large", torch.zeros(200_000), {}) is None
    thread = store.keep("middle", torch.zeros(50_000), {})
    assert thread is not None
    thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["middle.model"]
    assert (tmp_path / "middle.model").stat().st_mode & 0o777 == 0o644  # one user may fill a cache that others use


def test_the_models_used_the_longest_ago_make_room(tmp_path: Path) -> None:
    store = PreparedModels(tmp_path, min_bytes=0, max_bytes=1_000_000)
    for age, name in enumerate(["a", "b", "c"]):
        thread = store.keep(name, torch.full((75_000,), float(age)), {})  # 300 kB each
        assert thread is not None
        thread.join()
        os.utime(tmp_path / f"{name}.model", (age + 1, age + 1))
    assert store.load("a", {})[0] == 0  # used now
    thread = store.keep("d", torch.zeros(75_000), {})
    assert thread is not None
    thread.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "c.model", "d.model"]


def test_what_a_dead_writer_left_is_removed_and_a_living_ones_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "dead.partial").write_bytes(b"x" * 100)
    with (tmp_path / "living.partial").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = PreparedModels(tmp_path, min_bytes=0).keep("a", torch.zeros(10), {})
        assert thread is not None
        thread.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "living.partial"]
