"""One request to one receiver, signed by the Standard Webhooks rules. Knows nothing of retries and of Redis.

The request goes to an address that was checked, with the host's name in the Host header and in the certificate check.
No redirect is followed, no proxy is used, and no connection outlives its request.
"""

import asyncio
import base64
import hmac
import time
from collections.abc import Sequence
from importlib.metadata import version

import httpx2

from producer.deliveries import Answer
from producer.gateway.webhooks.endpoints import SECRET_PREFIX
from producer.gateway.webhooks.targets import Target, TargetError, TargetRules

ATTEMPT_SECONDS = 20.0  # in all, resolving and every address included
CONNECT_SECONDS = 5.0


class WebhookSender:
    def __init__(self, rules: TargetRules) -> None:
        self._rules = rules
        self._ssl_context = httpx2.create_ssl_context()  # SSL_CERT_FILE names a CA of one's own
        self._user_agent = f"promptmill/{version('promptmill')}"

    async def send(self, url: str, *, message_id: str, body: str, secrets: Sequence[str]) -> Answer:
        try:
            async with asyncio.timeout(ATTEMPT_SECONDS):
                target = await self._rules.check(url)
                return await self._post(target, body, self._headers(target, message_id, body, secrets))
        except TargetError as error:
            return Answer(None, str(error))
        except TimeoutError:
            return Answer(None, f"no response within {ATTEMPT_SECONDS:.0f} s")
        except httpx2.HTTPError as error:
            return Answer(None, f"{type(error).__name__}: {error}"[:500])

    async def _post(self, target: Target, body: str, headers: dict[str, str]) -> Answer:
        """At the first of the host's addresses that takes the connection."""
        *others, last = target.addresses
        for address in others:
            try:
                return await self._post_to(address, target, body, headers)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                continue
        return await self._post_to(last, target, body, headers)

    async def _post_to(self, address: str, target: Target, body: str, headers: dict[str, str]) -> Answer:
        timeout = httpx2.Timeout(ATTEMPT_SECONDS, connect=CONNECT_SECONDS)
        # A client of its own: a connection that was made for one host's certificate never serves another's.
        async with httpx2.AsyncClient(verify=self._ssl_context, trust_env=False, timeout=timeout) as client:
            request = client.build_request(
                "POST",
                target.url.copy_with(host=address),
                content=body.encode(),
                headers=headers,
                extensions={"sni_hostname": target.url.raw_host.decode("ascii")},
            )
            response = await client.send(request, stream=True)
            await response.aclose()  # the answer's body says nothing to us, however long it is
        return Answer.of(response.status_code, response.headers.get("retry-after"))

    def _headers(self, target: Target, message_id: str, body: str, secrets: Sequence[str]) -> dict[str, str]:
        timestamp = str(int(time.time()))
        signatures = [_sign(secret, f"{message_id}.{timestamp}.{body}") for secret in secrets]
        return {
            "host": target.url.netloc.decode("ascii"),
            "content-type": "application/json",
            "user-agent": self._user_agent,
            "webhook-id": message_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": " ".join(signatures),
        }


def _sign(secret: str, text: str) -> str:
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    return "v1," + base64.b64encode(hmac.digest(key, text.encode(), "sha256")).decode()
