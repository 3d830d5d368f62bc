"""Embeddings of texts, however many: which jobs they make, and their vectors in the order of the texts.

Knows how a list is shared out between jobs; neither connections nor models.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from producer.cancel import cancel
from producer.contract import ErrorCode, ErrorInfo, Result
from producer.errors import InvalidJobError, JobFailedError, PromptmillError, RedisUnavailableError
from producer.operations import Protocol
from producer.results import ResultCollector, result_of

Input = str | list[int]  # a text or token ids
INPUTS_A_JOB = 64  # enough that a job costs little beside them, few enough that several workers share a list


def is_list_of_inputs(value: object) -> bool:
    """Whether it is a list of texts or of token ids, and not one of them."""
    return isinstance(value, list | tuple) and any(isinstance(part, str | list | tuple) for part in value)


def share_out(inputs: Sequence[Any], fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The jobs for these inputs, as fields of `JobRequest`; `fields`: what they have in common."""
    key = fields.get("idempotency_key")
    requests = []
    for at, first in enumerate(range(0, len(inputs), INPUTS_A_JOB)):
        own_key = {"idempotency_key": f"{at}:{key}"} if key is not None and at else {}
        some = [list(part) if isinstance(part, tuple) else part for part in inputs[first : first + INPUTS_A_JOB]]
        requests.append({**fields, "task": "embed", "inputs": some, **own_key})
    return requests


def requests_for(inputs: Any, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of what a caller gives: one input, or a list of them. Raises InvalidJobError."""
    if isinstance(inputs, list | tuple) and not inputs:
        raise InvalidJobError("inputs: is empty; give a text, token ids, or a list of either", param="inputs")
    return share_out(inputs if is_list_of_inputs(inputs) else [inputs], fields)


def wait_for_vectors(jobs: Mapping[str, str | None], timeout: float | None) -> Protocol[list[list[float]]]:
    """Of jobs by id, with their queues: the vectors of the first, then of the second, …

    Raises JobFailedError for the first that fails or is cancelled, JobNotFoundError, ResultTimeoutError (seconds).
    """
    collector = ResultCollector(jobs, timeout)
    vectors: dict[str, list[list[float]]] = {}
    while collector.num_pending:
        for outcome in (yield from collector.next_ended()):
            result = _finished(result_of(outcome.job_id, outcome))
            vectors[result.job_id] = result.vectors
    return [vector for job_id in jobs for vector in vectors[job_id]]


def cancel_all(job_ids: Sequence[str]) -> Protocol[None]:
    """Jobs that nobody waits for any more, those that have ended left as they are. Raises nothing of ours."""
    for job_id in job_ids:
        try:
            yield from cancel(job_id)
        except RedisUnavailableError:
            return
        except PromptmillError:
            continue


def _finished(result: Result) -> Result:
    if result.status != "finished":
        error = ErrorInfo(code=ErrorCode.CANCELLED, message=f"it was {result.status} before its end")
        raise JobFailedError(result.job_id, error, result)
    return result
