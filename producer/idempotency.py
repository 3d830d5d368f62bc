"""Idempotency keys: a key, within its tenant, names one job for as long as that job is kept.

The job's id follows from tenant and key, so that whoever submits again, from whichever process, finds the same job. The
fingerprint of the body is kept beside it, so that a key that is used for something else is refused.
"""

import hashlib
import json

from producer.contract import ErrorCode, JobRequest
from producer.errors import InvalidJobError

NOT_THE_BODY = frozenset({"idempotency_key", "tenant", "deadline"})  # a deadline says when; asking again moves it


def id_from_key(tenant: str | None, key: str) -> str:
    identity = json.dumps([tenant, key])
    return f"key-{hashlib.sha256(identity.encode()).hexdigest()[:40]}"


def fingerprint(request: JobRequest) -> str:
    body = request.model_dump(mode="json", exclude_defaults=True, exclude=set(NOT_THE_BODY))
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def conflict(key: str | None, job_id: str) -> InvalidJobError:
    return InvalidJobError(
        f"idempotency_key: {key!r} was used for another request (job {job_id}); send the same one, or use a new key",
        param="idempotency_key",
        code=ErrorCode.IDEMPOTENCY_CONFLICT,
    )
