"""One request of a webhook to its receiver. Knows nothing of retries and of Redis."""

from email.message import Message
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from producer.deliveries import Answer, read_retry_after
from producer.job_webhooks import MAX_ATTEMPT_SECONDS, JobWebhook

MAX_PROBLEM_CHARS = 500


def send_webhook(webhook: JobWebhook, *, message_id: str) -> Answer:
    """Blocks for as long as the webhook says, at most. No redirect is followed: it could lead to what is not allowed.

    `message_id` goes into the header `webhook-id`: a receiver tells repetitions by it.
    """
    body = webhook.body.encode() if webhook.body is not None else None
    try:
        request = Request(webhook.url, data=body, headers=webhook.headers, method=webhook.method)
        request.add_header("webhook-id", message_id)
        with _opener.open(request, timeout=min(webhook.timeout_seconds, MAX_ATTEMPT_SECONDS)) as response:
            return Answer(response.status)
    except HTTPError as error:
        with error:
            return Answer(error.code, f"answered {error.code}", read_retry_after(error.headers.get("retry-after")))
    except Exception as error:  # of any type: no answer, none of HTTP, or nothing that can be asked at all
        return Answer(None, f"{type(error).__name__}: {error}"[:MAX_PROBLEM_CHARS])


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Request | None:
        return None


_opener: Any = build_opener(_NoRedirects)
