"""Webhooks over TLS: the certificate is checked against the host's name, though the request goes to an address."""

import ssl
from pathlib import Path

import pytest
import trustme

from producer.deliveries import Answer
from producer.gateway.webhooks.endpoints import WebhookEndpoint
from producer.gateway.webhooks.sender import WebhookSender
from producer.gateway.webhooks.targets import TargetRules
from tests.fakes.webhook_receiver import WebhookReceiver, receiving

SECRET = WebhookEndpoint.create(name="x", url="x", key_id=None).secret


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def _trusted(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))


async def here(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


def server_of(authority: trustme.CA, host: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(host).configure_cert(context)
    return context


async def send(receiver: WebhookReceiver, host: str) -> Answer:
    sender = WebhookSender(TargetRules(allows_private=True, resolve=here))
    url = f"https://{host}:{receiver.port}/hook"
    return await sender.send(url, message_id="evt_1", body="{}", secrets=[SECRET])


@pytest.mark.usefixtures("_trusted")
async def test_the_name_in_the_certificate_is_the_hosts(authority: trustme.CA) -> None:
    with receiving(tls=server_of(authority, "receiver.invalid")) as receiver:
        answer = await send(receiver, "receiver.invalid")
        assert answer.is_delivered
        assert receiver.next().headers["host"] == f"receiver.invalid:{receiver.port}"


@pytest.mark.usefixtures("_trusted")
async def test_another_hosts_certificate_is_refused(authority: trustme.CA) -> None:
    with receiving(tls=server_of(authority, "other.invalid")) as receiver:
        answer = await send(receiver, "receiver.invalid")
    assert answer.status is None and "CERTIFICATE_VERIFY_FAILED" in answer.problem
    assert receiver.num_received == 0


async def test_a_certificate_of_nobody_we_trust_is_refused(authority: trustme.CA) -> None:
    with receiving(tls=server_of(authority, "receiver.invalid")) as receiver:
        answer = await send(receiver, "receiver.invalid")
    assert answer.status is None and "CERTIFICATE_VERIFY_FAILED" in answer.problem
