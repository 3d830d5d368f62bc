"""Dequantises a GGUF file, once, into a cached folder of safetensors, config.json and tokenizer.json.

Several processes may ask for the same file at once: one converts under a file lock, and the folder gets its final name
only when it is whole.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from engine.errors import ModelLoadError
from engine.model.progress_lock import Progress, progress_lock
from engine.model.registry import ARCHITECTURES, find_architecture

_FORMAT_VERSION = 2  # of what is written: a newer one is converted again
_SAMPLE_BYTES = 4 << 20
_MAGIC = b"GGUF"
_MAX_SHARD_BYTES = 2 << 30  # of a file of weights: another copy of it in memory while it is written


def convert_gguf(gguf_path: Path, models_dir: Path, report: Callable[[str], None]) -> Path:
    """Return the folder of this file's model under `models_dir`, converting it if no one has yet.

    `report` is told how far it has come, as long as it gets on. Raises `ModelLoadError` if the file is damaged or of an
    untested architecture, or its folder cannot be written.
    """
    target = models_dir / f"{gguf_path.stem}-{_content_key(gguf_path)}"
    if target.exists():
        return target
    try:
        with progress_lock(models_dir / f".{target.name}.lock", gguf_path.name, report) as progress:
            if not target.exists():
                _convert_into(gguf_path, target, progress)
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(
            f"{gguf_path} cannot be converted into {models_dir} ({error}): make it writable, with room for 4 bytes a "
            "weight, or give the folder of a model that needs no conversion"
        ) from error
    return target


def _convert_into(gguf_path: Path, target: Path, progress: Progress) -> None:
    """Needs the target's lock: what lies beside it half written is nobody's."""
    for left in target.parent.glob(f".{target.name}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write_model(gguf_path, staging, progress)
        staging.chmod(0o755)
        for path in staging.iterdir():
            path.chmod(0o644)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_model(gguf_path: Path, folder: Path, progress: Progress) -> None:
    """Write weights in float32 (a dequantised value is exact in it), config and tokenizer with its chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    location = {"pretrained_model_name_or_path": str(gguf_path.parent), "gguf_file": gguf_path.name}
    try:
        config = AutoConfig.from_pretrained(**location)
        find_architecture(config.to_dict() | {"quantization_config": None}, source=str(gguf_path))
        tokenizer = AutoTokenizer.from_pretrained(**location)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        with _counted_by(progress):
            tensors = load_gguf_checkpoint(str(gguf_path), return_tensors=True, model_to_load=model)["tensors"]
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        raise ModelLoadError(
            f"{gguf_path} cannot be read as a GGUF model ({error}); fetch it again, "
            f"or use one of these architectures: {', '.join(sorted(ARCHITECTURES))}"
        ) from error
    _write_weights(tensors, folder, progress)
    config.architectures = [type(model).__name__]
    _write_config(config.to_diff_dict(), folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)


@contextmanager
def _counted_by(progress: Progress) -> Iterator[None]:
    """In place of transformers' progress bar, which cannot be turned off."""
    from transformers import modeling_gguf_pytorch_utils as module

    def count(tensors: Sequence[Any], **_: Any) -> Iterator[Any]:
        """A GGUF file's tensors, as transformers walks through them behind the bar."""
        num_weights, num_done = sum(int(tensor.n_elements) for tensor in tensors), 0
        for at, tensor in enumerate(tensors):
            done = f"{100 * num_done // num_weights}% of {num_weights:,} weights dequantised"
            progress.tell_at_times(f"{done}, {at} of {len(tensors)} tensors")
            yield tensor
            num_done += int(tensor.n_elements)

    bar, module.tqdm = module.tqdm, count
    try:
        yield
    finally:
        module.tqdm = bar


def _write_weights(tensors: dict[str, Any], folder: Path, progress: Progress) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=_MAX_SHARD_BYTES)
    for at, (name, members) in enumerate(split.filename_to_tensors.items(), start=1):
        progress.tell(f"writing file {at} of {len(split.filename_to_tensors)}")
        save_file({member: tensors.pop(member) for member in members}, folder / name, metadata={"format": "pt"})
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())  # the folder's name says that it is whole
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


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
            raise ModelLoadError(f"{gguf_path} is not a GGUF file (it does not begin with {_MAGIC!r}); fetch it again")
        digest.update(head)
        file.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(file.read())
    return digest.hexdigest()
