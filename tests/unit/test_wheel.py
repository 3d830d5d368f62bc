"""The wheel: everything that runs, nothing else, and a client that is light."""

import email
import os
import re
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("engine", "producer", "worker")
LIGHT = {"click", "pydantic", "pydantic-settings", "redis", "rich", "rq"}

# What reads files that are no modules does so from the wheel, with nothing of the repository beside it.
READS_ITS_FILES = """
import importlib.metadata, pathlib, sys
import engine, producer, worker
from engine.kernels import build
from producer.gateway.console import page_files
from worker import scripts
for module in (engine, producer, worker, build, page_files, scripts):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
assert (build._SOURCE_DIR / "attention.c").is_file()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    [path] = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture
def metadata(wheel: zipfile.ZipFile) -> Message:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_it_holds_every_file_of_the_three_packages_and_no_other(wheel: zipfile.ZipFile) -> None:
    files = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    ours = {path.as_posix() for path in files if "__pycache__" not in path.parts and path.suffix != ".so"}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == ours
    assert {f"{package}/py.typed" for package in PACKAGES} < held
    assert {".c", ".h", ".lua", ".html", ".js", ".css"} <= {Path(name).suffix for name in held}


def test_what_is_installed_finds_its_own_files(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    command = [sys.executable, "-c", READS_ITS_FILES, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_an_extra_it_needs_the_light_clients_packages_alone(metadata: Message) -> None:
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.match(r"[\w.-]+", line)[0] for line in needed} == LIGHT  # type: ignore[index]
    extras = {"worker", "gateway", "embedded", "s3", "tables"}
    assert extras <= set(metadata.get_all("Provides-Extra", []))


def test_its_licence_is_inside_and_named(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    [name] = [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def test_its_description_links_to_nothing_that_is_not_at_hand_there(metadata: Message) -> None:
    text = metadata.get_payload()
    assert isinstance(text, str) and text.startswith("# promptmill")
    assert metadata["Description-Content-Type"] == "text/markdown"
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets and all(target.startswith("https://") for target in targets), targets
    assert "docs/console" not in text and "## How it compares" in text and "## From a file" in text
