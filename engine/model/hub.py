"""Fetches a model from the hub into the hub's own cache, and says how far that has come, as long as it gets on."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError
from engine.model.progress_lock import Progress, progress_lock

_FILES = ["*.json", "*.safetensors", "*.jinja"]
_fetched: dict[str, Path] = {}  # asked before torch is imported and again at loading; the hub shall be asked once


def fetch_model(hub_id: str, lock_dir: Path, report: Callable[[str], None], *, otherwise: str) -> Path:
    """Return the folder of a model, fetching what of it is not here yet.

    Of several processes one fetches; the others pass on what it says. Raises `ModelLoadError`, naming `otherwise`
    among the remedies where the hub cannot be reached.
    """
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if hub_id in _fetched:
        return _fetched[hub_id]
    try:
        folder = _fetched[hub_id] = _fetch(hub_id, lock_dir / f".{hub_id.replace('/', '--')}.lock", report)
        return folder
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelLoadError(
            f"model {hub_id} is neither a folder here nor on the hub; mind the spelling, "
            "and log in (hf auth login) if it is private or gated"
        ) from error
    except OSError as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ModelLoadError(
            f"model {hub_id} cannot be fetched from the hub ({reason}); check the network, or {otherwise}"
        ) from error


def _fetch(hub_id: str, lock: Path, report: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download

    with ExitStack() as turn:
        try:
            progress = turn.enter_context(progress_lock(lock, hub_id, report))
        except OSError:  # no place for it: the hub's own locks keep files whole, but tell nobody anything
            progress = Progress(hub_id, report)
        return Path(snapshot_download(hub_id, allow_patterns=_FILES, tqdm_class=_telling_bar(progress)))


def _telling_bar(progress: Progress) -> Any:
    """A class of progress bars that draw nothing and tell of the bytes that have come."""
    from huggingface_hub.utils.tqdm import tqdm

    class TellingBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]
            self._counts_bytes = kwargs.get("unit") == "B"

        def update(self, n: float | None = 1) -> None:
            """Called from every thread that fetches; a count lost to a race shows in the words alone."""
            self.n += n or 0
            if self._counts_bytes and n:
                progress.tell_at_times(f"{self.n / 1e6:,.0f} of {(self.total or 0) / 1e6:,.0f} MB fetched")

    return TellingBar
