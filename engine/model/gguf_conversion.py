"""Dequantises a GGUF file, once, into a cached folder of safetensors, config.json and tokenizer.json.

Several processes may ask for the same file at once: one converts under a file lock, and the folder gets its final name
only when it is whole.
"""

import fcntl
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from hashlib import blake2b
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from engine.errors import ModelLoadError
from engine.model.registry import ARCHITECTURES, find_architecture

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 2  # of what is written: a newer one is converted again
_SAMPLE_BYTES = 4 << 20
_MAGIC = b"GGUF"


def convert_gguf(gguf_path: Path, models_dir: Path) -> Path:
    """Return the folder of this file's model under `models_dir`, converting it if no one has yet.

    Raises `ModelLoadError` if the file is damaged or of an untested architecture, or its folder cannot be written.
    """
    target = models_dir / f"{gguf_path.stem}-{_content_key(gguf_path)}"
    if target.exists():
        return target
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with _locked(models_dir / f".{target.name}.lock"):
            if not target.exists():
                logger.info("dequantising %s into %s (once; about 20 s for 135M weights)", gguf_path, target)
                _convert_into(gguf_path, target)
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(
            f"{gguf_path} cannot be converted into {models_dir} ({error}): make it writable, with room for 4 bytes a "
            "weight, or give the folder of a model that needs no conversion"
        ) from error
    return target


def _convert_into(gguf_path: Path, target: Path) -> None:
    """Needs the target's lock: what lies beside it half written is nobody's."""
    for left in target.parent.glob(f".{target.name}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write_model(gguf_path, staging)
        staging.chmod(0o755)
        for path in staging.iterdir():
            path.chmod(0o644)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_model(gguf_path: Path, folder: Path) -> None:
    """Write weights in float32 (a dequantised value is exact in it), config and tokenizer with its chat template."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    location = {"pretrained_model_name_or_path": str(gguf_path.parent), "gguf_file": gguf_path.name}
    try:
        config = AutoConfig.from_pretrained(**location)
        find_architecture(config.to_dict() | {"quantization_config": None}, source=str(gguf_path))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        with redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
            tensors = load_gguf_checkpoint(str(gguf_path), return_tensors=True, model_to_load=model)["tensors"]
        tokenizer = AutoTokenizer.from_pretrained(**location)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        raise ModelLoadError(
            f"{gguf_path} cannot be read as a GGUF model ({error}); fetch it again, "
            f"or use one of these architectures: {', '.join(sorted(ARCHITECTURES))}"
        ) from error
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [type(model).__name__]
    _write_config(config.to_diff_dict(), folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def _write_config(config: dict[str, Any], folder: Path) -> None:
    config = {name: value for name, value in config.items() if not name.startswith("_")} | {"dtype": "float32"}
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def _content_key(gguf_path: Path) -> str:
    """Names the file by its size, its head (all metadata of any usual file) and its tail."""
    size = gguf_path.stat().st_size
    digest = blake2b(f"{_FORMAT_VERSION} {size}".encode(), digest_size=8)
    with gguf_path.open("rb") as file:
        head = file.read(_SAMPLE_BYTES)
        if head[:4] != _MAGIC:
            raise ModelLoadError(f"{gguf_path} is no GGUF file (it does not begin with {_MAGIC!r}); fetch it again")
        digest.update(head)
        file.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(file.read())
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; it falls with the process that holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
