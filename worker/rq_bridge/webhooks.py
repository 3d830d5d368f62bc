"""RQ's webhooks as requests that can be sent later: RQ's body, and the allow-list entry that permits it."""

import json

from rq.job import Job
from rq.webhook import Webhook

from producer.contract.keys import JOB_FUNCTION
from producer.job_webhooks import JobWebhook


def build_webhook(job: Job, hook: Webhook, exc_string: str | None, *, allowed: str | None) -> JobWebhook:
    """`job` has ended at its `ended_at`. Raises pydantic.ValidationError for an invalid webhook."""
    headers = {str(name): str(value) for name, value in (hook.headers or {}).items()}
    body = None
    if hook.method == "POST":
        body = json.dumps(_payload(job, hook, exc_string))
        headers = {"Content-Type": "application/json", **headers}
    return JobWebhook(
        job_id=job.id,
        url=hook.url,
        method=hook.method,
        headers=headers,
        timeout_seconds=hook.timeout,
        body=body,
        allowed=allowed,
        written_at=job.ended_at.timestamp(),
    )


def _payload(job: Job, hook: Webhook, exc_string: str | None) -> object:
    try:
        return hook.get_payload(job, exc_string=exc_string)
    except Exception:  # of any type: its data may not be a call, which is why it failed
        job.func_name = JOB_FUNCTION
        return hook.get_payload(job, exc_string=exc_string)
