"""What the gateway's settings refuse before anything is started, and what it starts without."""

import signal
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from producer.cli import main
from producer.errors import SettingsError
from producer.gateway.server import GatewayServer, run_gateway
from producer.gateway.settings import GatewaySettings
from producer.settings import load_settings


@pytest.mark.parametrize("origins", ["app.example", "https://app.example/", "https://a.example, *.example", "https://"])
def test_an_origin_that_no_browser_sends_is_refused(origins: str) -> None:
    with pytest.raises(SettingsError, match=r"--cors-origins .* an origin is a scheme and a host"):
        load_settings(GatewaySettings, {"cors_origins": origins})


def test_whole_origins_are_taken() -> None:
    settings = load_settings(GatewaySettings, {"cors_origins": "https://a.example:8443, http://localhost:3000,, *"})
    assert settings.allowed_origins == ["https://a.example:8443", "http://localhost:3000", "*"]


@pytest.mark.parametrize("files", ["s3://", "s3:bucket", "s3://my bucket/x"])
def test_a_bucket_without_a_name_is_refused_before_anybody_asks_for_it(files: str) -> None:
    with pytest.raises(SettingsError, match=r"--files .* a bucket is given as s3://BUCKET/PREFIX"):
        load_settings(GatewaySettings, {"files": files})


def test_a_port_that_is_taken_is_said_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["gateway", "--http-port", str(port), "--redis-url", "redis://127.0.0.1:1"])
    assert result.exit_code == 3
    assert result.stderr == f"Error: port {port} is taken: stop what listens there, or pass another --http-port\n"


def test_a_system_that_knows_no_hangup_serves_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[GatewayServer] = []

    async def serve(server: GatewayServer, sockets: list[socket.socket]) -> None:
        served.append(server)

    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(GatewayServer, "serve", serve)
    run_gateway(GatewaySettings(redis_url="redis://127.0.0.1:1", http_port=0, files=str(tmp_path)))
    assert served
