"""The worker's commands, as far as nothing has to run: options, one-line errors, exit codes, ports, the greeting."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from producer.errors import PortTakenError
from producer.settings import load_settings
from tests.fakes.ports import free_port
from worker import cli, gateway_process, serve
from worker.embedded_redis import EmbeddedRedis
from worker.errors import EmbeddedRedisError, StartRefusedError
from worker.serve import ServeSettings, _address, _choose_port, _embedded_redis, _greeting, _listen, _locked
from worker.settings import WorkerSettings
from worker.worker_process import environment_for


@pytest.mark.parametrize("command", [cli.worker, cli.serve, cli.demo])
def test_help_shows_a_flag_for_every_setting(command: Any) -> None:
    shown = CliRunner().invoke(command, ["--help"], terminal_width=200).output
    for name in WorkerSettings.model_fields:
        if not (command is cli.demo and name == "redis_url"):
            assert f"--{name.replace('_', '-')}" in shown


@pytest.mark.parametrize("command", [cli.worker, cli.serve, cli.demo])
def test_a_wrong_setting_is_one_line_and_exit_code_2(command: Any) -> None:
    done = CliRunner().invoke(command, ["--device", "abacus"])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "--device (PROMPTMILL_DEVICE)" in done.stderr and "abacus" in done.stderr


def test_a_port_that_is_taken_is_one_line_and_exit_code_3() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = CliRunner().invoke(cli.serve, ["--redis-port", str(port)])
    assert done.exit_code == 3
    assert done.stderr == f"Error: port {port} is taken: stop what listens there, or pass another --redis-port\n"


@pytest.mark.parametrize("flag", ["--redis-port", "--data-dir"])
def test_a_given_redis_is_not_given_what_a_redis_of_ones_own_needs(flag: str) -> None:
    done = CliRunner().invoke(cli.serve, [flag, "1"], env={"PROMPTMILL_REDIS_URL": "redis://localhost:1"})
    assert done.exit_code == 2
    assert done.stderr.startswith(f"Error: {flag} is for a Redis of its own")


def test_a_given_redis_that_is_away_is_told_before_anything_is_started() -> None:
    done = CliRunner().invoke(cli.serve, ["--redis-url", f"redis://localhost:{free_port()}"])
    assert (done.exit_code, done.stdout) == (3, "")
    assert "cannot be reached" in done.stderr


def test_a_free_port_is_taken_as_given() -> None:
    port = free_port()
    assert _choose_port(port) == port


def test_two_that_start_at_once_listen_on_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_process, "DEFAULT_PORT", free_port())
    with _listen(load_settings(ServeSettings)) as first, _listen(load_settings(ServeSettings)) as second:
        assert _address(first) == f"127.0.0.1:{gateway_process.DEFAULT_PORT}" != _address(second)
        taken = load_settings(ServeSettings, {"http_port": str(second.getsockname()[1])})
        with pytest.raises(PortTakenError, match=r"port \d+ is taken: .* another --http-port"):
            _listen(taken)


def test_a_gateways_port_that_is_taken_is_one_line_and_exit_code_3(redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(cli.serve, ["--http-port", str(port), "--redis-url", redis_url])
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr == f"Error: port {port} is taken: stop what listens there, or pass another --http-port\n"


def test_a_redis_port_that_is_lost_to_another_is_replaced_unless_it_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedRedis() as others:
        monkeypatch.setattr(serve, "_choose_port", lambda *args: others.port)  # it was free when it was chosen
        with _embedded_redis(load_settings(ServeSettings)) as server:
            assert server.port != others.port
        named = load_settings(ServeSettings, {"redis_port": str(others.port)})
        with pytest.raises(EmbeddedRedisError, match="in use"), _embedded_redis(named):
            pass


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1:"), ("0.0.0.0", "127.0.0.1:"), ("localhost", "127.0.0.1:")]
)
def test_the_greeting_has_an_address_that_reaches_the_gateway_from_here(host: str, address: str) -> None:
    settings = load_settings(ServeSettings, {"http_host": host, "http_port": str(free_port())})
    with _listen(settings) as listener:
        assert _address(listener) == f"{address}{settings.http_port}"


def test_a_data_dir_serves_one_server_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "LOCK_SECONDS", 0.0)
    with _locked(tmp_path), pytest.raises(StartRefusedError, match="in use by another"), _locked(tmp_path):
        pass
    with _locked(tmp_path):
        pass


def test_a_data_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StartRefusedError, match="cannot be used"), _locked(file):
        pass


def test_the_greeting_has_a_command_that_reaches_this_redis() -> None:
    default = _greeting(load_settings(ServeSettings), "redis://127.0.0.1:6379/0", "", None)
    assert 'promptmill submit "What is the capital of France?" --max-tokens 20 --stream\n' in default
    other = _greeting(
        load_settings(ServeSettings, {"queues": "mine"}), "redis://127.0.0.1:7000/0", "", "127.0.0.1:8000"
    )
    assert other.splitlines()[2].endswith("--redis-url redis://127.0.0.1:7000/0 --queue mine")
    elsewhere = _greeting(load_settings(ServeSettings), "rediss://user:p@ss@host:1/0", "", "127.0.0.1:8000")
    assert "rediss://user:***@host:1/0" in elsewhere and "p@ss" not in elsewhere, "what is shown ends up in logs"


def test_what_was_set_reaches_the_worker_process_whatever_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTMILL_MAX_NUM_SEQS", "8")
    settings = load_settings(ServeSettings, {"device": "cpu", "prefix_caching": "false", "data_dir": "/x"})
    for name, value in environment_for(settings, "redis://here").items():
        monkeypatch.setenv(name, value)
    received = load_settings(WorkerSettings)
    assert (received.redis_url, received.max_num_seqs) == ("redis://here", 8)
    assert (received.device, received.prefix_caching) == ("cpu", False)


def test_the_commands_import_nothing_heavy() -> None:
    code = "import sys, worker.cli; print([name for name in ('torch', 'transformers', 'boto3') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
