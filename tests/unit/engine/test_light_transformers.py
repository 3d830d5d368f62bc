"""transformers imported without what a child never uses: each in a process of its own, as a child is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import EngineConfig
from engine.model.import_structure import Structure, _kept
from engine.model.light_transformers import import_transformers
from engine.model.registry import ARCHITECTURES
from tests.fakes.packed_forward import BLOCK_SIZE, prompts, run, steps_of
from tests.fakes.tiny_models import VOCAB_SIZE, make_tiny_model

LIGHT = (
    "from engine.config import EngineConfig; from engine.model.light_transformers import import_transformers; "
    "import_transformers(EngineConfig(model_path='x', cache_dir={!r})); import sys, torch; "
)
LOGITS = (
    "from tests.unit.engine.test_light_transformers import logits; open(sys.argv[1], 'wb').write(logits(sys.argv[2:]))"
)


KEPT = (
    "import sys; from pathlib import Path; from engine.model.import_structure import keep_import_structure; "
    "keep_import_structure(Path(sys.argv[1])); import transformers; print(len(dir(transformers)))"
)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def light(cache_dir: Path) -> str:
    return LIGHT.format(str(cache_dir))


def output_of(code: str, *arguments: str, path: str = "") -> str:
    """path: of further packages."""
    command, env = [sys.executable, "-c", code, *arguments], os.environ | {"PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


def logits(folders: list[str]) -> bytes:
    """What some models compute in this process, on one thread."""
    from engine.kernels.threads import one_thread
    from engine.model.loader import load_model

    rows = []
    with one_thread():
        for folder in folders:
            model = load_model(EngineConfig(model_path=folder, dtype="float32", block_size=BLOCK_SIZE))
            rows += run(model, prompts(VOCAB_SIZE), steps_of(1000))
    return b"".join(row.numpy().tobytes() for row in rows)


def test_models_of_all_architectures_compute_to_the_bit_what_they_do_after_a_plain_import_and_without_the_compiler(
    light: str, cache_dir: Path, tmp_path: Path
) -> None:
    import transformers  # noqa: F401  (all of it, before anybody imports it lightly here)

    folders = [str(make_tiny_model(name, tmp_path / name)) for name in sorted(ARCHITECTURES)]
    output = output_of(
        light + "from importlib import import_module; from engine.model.registry import ARCHITECTURES; "
        "[import_module(a.module_name) for a in ARCHITECTURES.values()]; import engine.runner.model_runner; "
        "print([name for name in ('torch._dynamo', 'sympy', 'torch.distributed.tensor') if name in sys.modules]); "
        + LOGITS
        + "; print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())",
        str(tmp_path / "light"),
        *folders,
    )
    assert output.splitlines() == ["[]", "2.0"], "the compiler works once it is asked for"
    assert len(list((cache_dir / "transformers").iterdir())) == 1  # the import structure
    assert (tmp_path / "light").read_bytes() == logits(folders)


def test_an_import_that_fails_lightly_is_done_wholly(light: str) -> None:
    output = output_of(
        "import engine.model.light_transformers as light, sys; light._STAND_INS[light._BATCHING].clear(); "
        + light
        + "import transformers.generation.utils as utils; "
        "print(utils.ContinuousMixin.__module__, 'torch._dynamo' in sys.modules)"
    )
    assert output.split() == ["transformers.generation.continuous_batching.continuous_api", "True"]


def test_torchvision_is_not_imported_where_it_is_installed(light: str, tmp_path: Path) -> None:
    stand_ins = {  # transformers wants the second one to look for the first
        "torchvision/__init__.py": "import torch._dynamo.utils",
        "PIL/__init__.py": "",
        "PIL/Image.py": "Image = Resampling = object",
        "PIL/ImageOps.py": "",
    }
    for name, text in stand_ins.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    check = "import transformers.generation.utils; print('torchvision' in sys.modules, 'torch._dynamo' in sys.modules)"
    assert output_of(light + check, path=str(tmp_path)).split() == ["False", "False"]


def test_a_process_that_has_transformers_keeps_it_as_it_is(tmp_path: Path) -> None:
    import transformers.generation.utils as utils

    before = utils.ContinuousMixin
    import_transformers(EngineConfig(model_path="x", cache_dir=str(tmp_path)))
    assert sys.modules["transformers.generation.utils"] is utils and utils.ContinuousMixin is before
    assert before.__module__.startswith("transformers.generation.continuous_batching")
    assert not list(tmp_path.iterdir())


def test_the_import_structure_is_taken_from_its_file(cache_dir: Path, tmp_path: Path) -> None:
    folder = cache_dir / "transformers"
    num_names = output_of(KEPT, str(folder))
    (file,) = folder.iterdir()
    entries = json.loads(file.read_text())
    del entries[0][1][next(iter(entries[0][1]))]
    (tmp_path / file.name).write_text(json.dumps(entries))
    assert output_of(KEPT, str(tmp_path)) != num_names


MODELS = Path("transformers/models")
STRUCTURE: Structure = {
    frozenset({"torch"}): {"llama": {"Llama", "LlamaLayer"}, "gpt2": {"GPT2"}},
    frozenset(): {"gguf": {"read"}},
}


class Definition:
    """In place of transformers' own, which reads a thousand files."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, path: Path, prefix: str | None = None) -> Structure:
        self.num_calls += 1
        return STRUCTURE if path == MODELS else {frozenset(): {f"{prefix} in {path}": set()}}


def test_a_damaged_import_structure_is_made_anew_and_kept(tmp_path: Path) -> None:
    file, define = tmp_path / "kept.json", Definition()
    for num_calls in (1, 1):  # made, and read
        assert _kept(define, MODELS, file)(MODELS) == STRUCTURE
        assert define.num_calls == num_calls
    whole = file.read_text()
    file.write_text(whole[:20])
    assert _kept(define, MODELS, file)(MODELS) == STRUCTURE
    assert file.read_text() == whole and define.num_calls == 2
    kept = _kept(define, MODELS, file)
    assert kept(MODELS / "__init__.py", prefix="models") == {
        frozenset({"torch"}): {"models.llama": {"Llama", "LlamaLayer"}, "models.gpt2": {"GPT2"}},
        frozenset(): {"models.gguf": {"read"}},
    }
    assert kept(MODELS / "llama", prefix="x") == {frozenset(): {"x in transformers/models/llama": set()}}


def test_a_cache_that_cannot_be_written_hinders_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "transformers").write_text("a file in the folder's place")
    define = Definition()
    kept = _kept(define, MODELS, tmp_path / "transformers" / "kept.json")
    assert kept(MODELS) == kept(MODELS) == STRUCTURE
    assert define.num_calls == 1, "it is made once all the same"
    assert len(caplog.messages) == 1
    assert "import_structure_not_kept" in caplog.text and "set HOME" in caplog.text
