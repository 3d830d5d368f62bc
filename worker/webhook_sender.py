"""Sends one request of a webhook to its receiver. Knows nothing about retries or Redis."""

import asyncio
import ssl
from functools import cache

import httpx2

from producer.deliveries import Answer
from producer.job_webhooks import MAX_ATTEMPT_SECONDS, JobWebhook

MAX_PROBLEM_CHARS = 500


def send_webhook(webhook: JobWebhook, *, message_id: str) -> Answer:
    """Blocks for at most the webhook's timeout, plus the time of the DNS lookup. Follows no redirects: they could lead
    to a URL that is not allowed.

    `message_id` is sent in the header `webhook-id`, by which a receiver detects repetitions.
    """
    seconds = min(webhook.timeout_seconds, MAX_ATTEMPT_SECONDS)
    try:
        return asyncio.run(_send(webhook, message_id, seconds))
    except TimeoutError:
        return Answer(None, f"TimeoutError: no response within {seconds:g} s")
    except Exception as error:  # of any type: no answer, not HTTP, or an invalid URL
        return Answer(None, f"{type(error).__name__}: {error}"[:MAX_PROBLEM_CHARS])


async def _send(webhook: JobWebhook, message_id: str, seconds: float) -> Answer:
    """Run in an event loop, whose timeout covers the whole exchange: an HTTP client's is for each step and each
    read."""
    async with asyncio.timeout(seconds), httpx2.AsyncClient(verify=_ssl_context(), timeout=None) as client:
        headers = {**webhook.headers, "webhook-id": message_id}
        request = client.build_request(webhook.method, webhook.url, content=webhook.body, headers=headers)
        response = await client.send(request, stream=True)
        await response.aclose()  # the answer's body is not read
    return Answer.of(response.status_code, response.headers.get("retry-after"))


@cache
def _ssl_context() -> ssl.SSLContext:
    """Made once: loading the CA certificates takes longer than most requests. SSL_CERT_FILE replaces them."""
    return httpx2.create_ssl_context()
