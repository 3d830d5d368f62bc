"""The light client stays light: what `import producer` and the command line load, and what they do without."""

import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Unpack, get_type_hints

import pytest
from click.testing import CliRunner

import producer
from producer import cli
from producer.request_fields import RequestFields

HEAVY = ("torch", "transformers", "tokenizers", "numpy", "boto3", "botocore", "engine", "worker", "rich", "pyarrow")


@pytest.mark.parametrize("module", ["producer", "producer.cli"])
def test_importing_the_client_loads_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_everything_public_is_there() -> None:
    assert all(hasattr(producer, name) for name in producer.__all__)


@pytest.mark.parametrize("submit", [producer.Client.submit, producer.AsyncClient.submit])
def test_a_type_checker_knows_every_field_that_submit_takes(submit: Callable[..., Any]) -> None:
    assert get_type_hints(submit)["fields"] == Unpack[RequestFields]
    assert RequestFields.__annotations__.keys() == producer.JobRequest.model_fields.keys() - {"v", "messages"}


def test_a_command_whose_packages_are_missing_is_listed_and_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_point = importlib.metadata.EntryPoint("fly", "gateway_that_is_not_there.cli:fly", cli.COMMANDS_GROUP)
    monkeypatch.setattr(cli, "_registered", lambda: {"fly": entry_point})
    listed = CliRunner().invoke(cli.main, ["--help"])
    assert listed.exit_code == 0
    assert "fly" in listed.stdout and "pip install 'promptmill[gateway_that_is_not_there]'" in listed.stdout
    for arguments in (["--high", "now"], ["--help"]):
        used = CliRunner().invoke(cli.main, ["fly", *arguments])
        assert used.exit_code == 2
        assert "`promptmill fly` needs: pip install 'promptmill[gateway_that_is_not_there]'" in used.stderr


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("uvicorn", ["gateway"]), ("httpx2", ["webhooks", "add", "https://example.com/hook"])],
)
def test_a_command_that_finds_out_while_it_runs_what_is_missing_names_the_remedy(
    missing: str, arguments: list[str]
) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; from producer.cli import main; main({arguments!r})"
    used = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (used.returncode, used.stdout) == (2, "")
    assert f"`promptmill {arguments[0]}` needs: pip install 'promptmill[gateway]' (" in used.stderr
    assert missing in used.stderr and "Traceback" not in used.stderr


def test_ctrl_c_while_the_client_is_imported_is_told_in_a_word() -> None:
    program = """
import sys
class Interrupted:
    def find_spec(self, name, *place):
        if name == "pydantic":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from producer.cli import main
main(["status"])
"""
    used = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (used.returncode, used.stdout, used.stderr) == (130, "", "interrupted\n")


def test_a_module_of_ours_that_is_missing_is_no_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "producer.gateway.server", None)
    used = CliRunner().invoke(cli.main, ["gateway"])
    assert isinstance(used.exception, ModuleNotFoundError)


@pytest.mark.parametrize("name", sorted(cli._registered()))
def test_every_command_of_another_package_names_an_extra_that_there_is(name: str) -> None:
    extras = importlib.metadata.metadata("promptmill").get_all("Provides-Extra") or []
    command = cli._missing(name, cli._registered()[name], ImportError("fastapi"))
    named = re.search(r"promptmill\[(\w+)\]", command.short_help or "")
    assert named is not None and named[1] in extras


@pytest.mark.parametrize("package", ["engine", "producer", "worker"])
def test_type_checkers_of_others_are_told_that_a_package_is_typed(package: str) -> None:
    assert importlib.resources.files(package).joinpath("py.typed").is_file()


def test_the_version_is_the_distributions() -> None:
    shown = CliRunner().invoke(cli.main, ["--version"])
    assert importlib.metadata.version("promptmill") in shown.stdout
