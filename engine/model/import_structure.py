"""transformers' import structure, kept in a file: which module defines which name.

At every import transformers reads some thousand files to find that out, which takes longer than everything else of it
that the engine needs. The file is named by transformers' version and by when its folder of models last changed; without
a file that can be read it is made anew.
"""

import json
import logging
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

from engine.staged_file import staged_file

logger = logging.getLogger(__name__)

_REMEDY = "every start is slower by what making it takes: set HOME, or cache_dir, to a folder that can be written"

Structure: TypeAlias = dict[frozenset[str], dict[str, set[str]]]
"""Names by module, by the packages that they need; as transformers' `define_import_structure` has it."""


def keep_import_structure(cache_dir: Path) -> None:
    """Have transformers, which must not be imported yet, take its import structure from a file under `cache_dir`."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return
    models = Path(spec.submodule_search_locations[0]) / "models"
    file = cache_dir / f"{version('transformers')}-{models.stat().st_mtime_ns}.json"
    package = module_from_spec(spec)  # what makes the structure is a module of the package that wants it
    package.__dict__["__version__"] = version("transformers")
    sys.modules["transformers"] = package
    try:
        import_utils: ModuleType = import_module("transformers.utils.import_utils")
    finally:
        del sys.modules["transformers"]
    import_utils.__dict__["define_import_structure"] = _kept(import_utils.define_import_structure, models, file)


def _kept(define: Callable[..., Structure], models: Path, file: Path) -> Callable[..., Structure]:
    """`define`, which takes the structure of `models` from `file`, or makes both."""

    @cache  # transformers asks three times: where no file can be kept, it is made once all the same
    def structure() -> Structure:
        found = _read(file)
        if found is None:
            found = define(models)
            _write(file, found)
        return found

    def define_import_structure(module_path: str | Path, prefix: str | None = None) -> Structure:
        path = Path(module_path)
        if path != models and path != models / "__init__.py":
            return define(module_path, prefix)
        parent = "" if prefix is None else f"{prefix}."
        return {needs: {parent + name: found for name, found in by.items()} for needs, by in structure().items()}

    return define_import_structure


def _read(file: Path) -> Structure | None:
    try:
        entries = json.loads(file.read_bytes())
        return {frozenset(needs): {name: set(found) for name, found in by.items()} for needs, by in entries}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _write(file: Path, structure: Structure) -> None:
    entries = [[sorted(needs), {name: sorted(found) for name, found in by.items()}] for needs, by in structure.items()]
    try:
        for old in file.parent.glob("*.json"):
            old.unlink(missing_ok=True)
        with staged_file(file) as staging:
            staging.write_text(json.dumps(entries))
    except OSError as error:
        logger.warning("action=import_structure_not_kept reason=%r remedy=%r", str(error), _REMEDY)
