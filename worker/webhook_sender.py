"""One request of a webhook to its receiver. Knows nothing of retries and of Redis."""

import asyncio
import ssl
from functools import cache

import httpx2

from producer.deliveries import Answer
from producer.job_webhooks import MAX_ATTEMPT_SECONDS, JobWebhook

MAX_PROBLEM_CHARS = 500


def send_webhook(webhook: JobWebhook, *, message_id: str) -> Answer:
    """Blocks for as long as the webhook says, at most, and for what the system takes to find the host's addresses. No
    redirect is followed: it could lead to what is not allowed.

    `message_id` goes into the header `webhook-id`: a receiver tells repetitions by it.
    """
    seconds = min(webhook.timeout_seconds, MAX_ATTEMPT_SECONDS)
    try:
        return asyncio.run(_send(webhook, message_id, seconds))
    except TimeoutError:
        return Answer(None, f"TimeoutError: no response within {seconds:g} s")
    except Exception as error:  # of any type: no answer, none of HTTP, or nothing that can be asked at all
        return Answer(None, f"{type(error).__name__}: {error}"[:MAX_PROBLEM_CHARS])


async def _send(webhook: JobWebhook, message_id: str, seconds: float) -> Answer:
    """On a loop of its own, whose timeout is for all of it together: a client's is for each step and each read."""
    async with asyncio.timeout(seconds), httpx2.AsyncClient(verify=_ssl_context(), timeout=None) as client:
        headers = {**webhook.headers, "webhook-id": message_id}
        request = client.build_request(webhook.method, webhook.url, content=webhook.body, headers=headers)
        response = await client.send(request, stream=True)
        await response.aclose()  # the answer's body says nothing to us, however long it is
    return Answer.of(response.status_code, response.headers.get("retry-after"))


@cache
def _ssl_context() -> ssl.SSLContext:
    """Once: to read the world's authorities takes longer than most requests. SSL_CERT_FILE names others."""
    return httpx2.create_ssl_context()
