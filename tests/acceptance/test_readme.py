"""Every snippet of the README and of docs/ runs as it stands, against a worker with the real model.

Only the addresses are other ones: Redis and the gateway listen on free ports here.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from producer import Client
from tests.acceptance.system import System, system_with_tools

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    text = "\n".join(page.read_text() for page in PAGES)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def here(snippet: str, system: System) -> str:
    return snippet.replace("http://localhost:8000", system.gateway_url).replace("redis://localhost:6379", system.url)


@pytest.fixture(scope="module")
def documented_tool_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    (template,) = blocks("jinja")
    with system_with_tools(tmp_path_factory.mktemp("tools"), "hermes", template) as system:
        yield system


@pytest.mark.parametrize("snippet", blocks("python"), ids=lambda snippet: snippet.splitlines()[0])
def test_python_snippet_runs(request: pytest.FixtureRequest, snippet: str, tmp_path: Path) -> None:
    system: System = request.getfixturevalue("documented_tool_system" if "tools=" in snippet else "running_system")
    script = tmp_path / "snippet.py"
    script.write_text(here(snippet, system))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env=system.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_redis_commands_run_a_job_that_is_read_back_as_described(running_system: System, client: Client) -> None:
    (commands,) = blocks("redis")
    with redis.Redis.from_url(running_system.url, single_connection_client=True) as connection:
        for line in commands.strip().splitlines():
            connection.execute_command(*shlex.split(line))
        result = client.job("my-job-1").result(timeout=60)
        assert "Paris" in result.text
        assert connection.get("promptmill:result:my-job-1")
        entries = connection.xrange("promptmill:stream:{my-job-1}", "-", "+")
    assert entries[0][0] == b"1-0" and b'"done":true' in entries[-1][1][b"d"]


def test_the_shell_commands_shown_for_clients_run(running_system: System) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("promptmill submit")]
    assert commands
    for command in commands:
        done = running_system.run(*shlex.split(command)[1:])
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout


def test_the_curl_commands_are_answered(running_system: System) -> None:
    commands = [block for block in blocks("sh") if block.startswith("curl")]
    assert commands
    for command in commands:
        script = here(command, running_system)
        done = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout and "[DONE]" in done.stdout


def test_the_commands_that_answer_files_run(running_system: System, tmp_path: Path) -> None:
    commands = [block for block in blocks("sh") if "promptmill run" in block]
    assert len(commands) == 2
    environment = running_system.environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    shown = ""
    for command in commands:
        arguments = ["sh", "-ec", command]
        done = subprocess.run(
            arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        shown += done.stdout
    assert "Paris" in shown and "Nairobi" in shown
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_folder_and_file_that_a_page_links_to_exists(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
        assert (page.parent / target).exists(), target
