"""transformers imported without what a child never uses: each in a process of its own, as a child is."""

import subprocess
import sys
from pathlib import Path

from engine import InferenceEngine, SamplingParams
from tests.fakes.tiny_models import make_tiny_model

LIGHT = "from engine.model.light_transformers import import_transformers; import_transformers(); import sys, torch; "


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_tested_architecture_is_imported_without_the_compiler_which_works_once_it_is_asked_for() -> None:
    output = run(
        LIGHT + "from importlib import import_module; from engine.model.registry import ARCHITECTURES; "
        "[import_module(a.module_name) for a in ARCHITECTURES.values()]; import engine.runner.model_runner; "
        "print([name for name in ('torch._dynamo', 'sympy', 'torch.distributed.tensor') if name in sys.modules]); "
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())"
    )
    assert output.splitlines() == ["[]", "2.0"]


def test_a_model_imported_lightly_computes_what_it_does_otherwise(tmp_path: Path) -> None:
    import transformers  # noqa: F401  (all of it, before anybody imports it lightly here)

    folder, outputs = make_tiny_model("llama", tmp_path), []
    for is_whole in (False, True):  # a child, and a thread of this process
        with InferenceEngine(str(folder), dtype="float32", in_process=is_whole) as engine:
            outputs += engine.generate_batch([[5, 6, 7]], SamplingParams(max_tokens=9, temperature=0.0))
    assert outputs[0].token_ids == outputs[1].token_ids


def test_an_import_that_fails_lightly_is_done_wholly() -> None:
    output = run(
        "import engine.model.light_transformers as light, sys; light._STAND_INS[light._BATCHING].clear(); "
        "light.import_transformers(); import transformers.generation.utils as utils; "
        "print(utils.ContinuousMixin.__module__, 'torch._dynamo' in sys.modules)"
    )
    assert output.split() == ["transformers.generation.continuous_batching.continuous_api", "True"]


def test_a_process_that_has_transformers_keeps_it_as_it_is() -> None:
    output = run(
        "import transformers; " + LIGHT + "import transformers.generation.utils as utils; "
        "print(utils.ContinuousMixin.__module__)"
    )
    assert output.strip().startswith("transformers.generation.continuous_batching")
