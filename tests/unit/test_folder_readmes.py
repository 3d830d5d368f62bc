"""Every top-level folder has a README that lists its files."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["engine", "producer", "worker", "benchmarks", "deploy", "tests/fakes"])
def test_the_folders_readme_lists_every_file(folder: str) -> None:
    readme = (ROOT / folder.partition("/")[0] / "README.md").read_text()
    for path in sorted((ROOT / folder).rglob("*.*")):
        name = path.relative_to(ROOT / folder).as_posix()
        if (
            path.suffix not in (".py", ".c", ".h", ".lua", ".js", ".css", ".html", ".svg")
            or path.name == "__init__.py"
            or name.startswith("contract/")
        ):
            continue
        assert f"`{name}`" in readme or f".{path.stem}`" in readme or f"`{path.name}`" in readme, name
