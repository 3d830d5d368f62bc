"""HTTPS with a real certificate, and what a certificate that is none is told."""

import ssl
from pathlib import Path

import openai
import pytest
import trustme
from click.testing import CliRunner, Result

from producer import SettingsError
from producer.gateway.cli import gateway as gateway_command
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.gateways import StartGateway, open_client


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The settings that name a certificate for localhost and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate = authority.issue_cert("localhost")
    chain, key = folder / "chain.pem", folder / "key.pem"
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(chain, append=True)
    certificate.private_key_pem.write_to_path(key)
    return {"tls_certfile": str(chain), "tls_keyfile": str(key)}


def client_of(port: int, trusted: trustme.CA) -> openai.OpenAI:
    context = ssl.create_default_context()
    trusted.configure_trust(context)
    http = openai.DefaultHttpxClient(verify=context)
    return openai.OpenAI(base_url=f"https://localhost:{port}/v1", api_key="none", max_retries=0, http_client=http)


def test_the_official_client_is_answered_and_streamed_to_over_tls(
    start_gateway: StartGateway, echoing: FakeWorker, authority: trustme.CA, files: dict[str, str]
) -> None:
    gateway = start_gateway(**files, http_host="localhost")
    with client_of(gateway.port, authority) as client:
        assert client.completions.create(model="fake", prompt="one two").choices[0].text == "one two "
        stream = client.completions.create(model="fake", prompt="one two", stream=True)
        assert [chunk.choices[0].text for chunk in stream if chunk.choices[0].text] == ["one ", "two "]
    with client_of(gateway.port, trustme.CA()) as stranger, pytest.raises(openai.APIConnectionError) as refused:
        stranger.completions.create(model="fake", prompt="x")
    assert "CERTIFICATE_VERIFY_FAILED" in str(refused.value.__cause__)
    with open_client(gateway) as plain, pytest.raises(openai.APIConnectionError):
        plain.models.list()


def run(redis_url: str, *options: str) -> Result:
    return CliRunner().invoke(gateway_command, ["--redis-url", redis_url, *options])


def test_files_that_cannot_be_served_with_are_refused_at_the_start(
    redis_url: str, files: dict[str, str], tmp_path: Path
) -> None:
    chain, key = files["tls_certfile"], files["tls_keyfile"]
    other = tmp_path / "other.pem"
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(other)
    for options, reason in [
        (["--tls-keyfile", key], "--tls-keyfile is of no use alone"),
        (["--tls-certfile", "missing.pem", "--tls-keyfile", key], "--tls-certfile missing.pem"),
        (["--tls-certfile", key, "--tls-keyfile", key], "give a certificate and its own key"),
        (["--tls-certfile", chain, "--tls-keyfile", str(other)], "KEY_VALUES_MISMATCH"),
    ]:
        refused = run(redis_url, *options)
        assert isinstance(refused.exception, SettingsError) and reason in str(refused.exception)
