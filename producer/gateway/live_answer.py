"""Streamed answers: the streams of a request's jobs as one response."""

from producer.gateway.acceptance import AcceptedRequest
from producer.gateway.chunk_bodies import ChunkRenderer
from producer.gateway.context import GatewayContext
from producer.gateway.event_stream import EventStream
from producer.gateway.job_records import JobRecord
from producer.gateway.job_stream import JobStream
from producer.gateway.renderer import Renderer
from producer.gateway.response_events import ResponseRenderer


def respond(context: GatewayContext, accepted: AcceptedRequest) -> EventStream:
    streams = [
        JobStream(
            job,
            _renderer(accepted, job.id, record),
            context.metrics.token_timer(accepted.model),
            callers_names=record.callers_names,
            finds_same_job=accepted.is_keyed,
        )
        for job, record in zip(accepted.jobs, accepted.records, strict=True)
    ]
    return EventStream(
        streams,
        context,
        cancels=[] if accepted.is_detached else accepted.jobs,
        headers=accepted.headers,
        on_usage=lambda usage: accepted.settle(context, usage),
    )


def _renderer(accepted: AcceptedRequest, job_id: str, record: JobRecord) -> Renderer:
    if accepted.asked.response is not None:
        frame = accepted.frame
        return ResponseRenderer(frame, starts_at_once=frame.asked.background)
    return ChunkRenderer(job_id, record, includes_usage=accepted.asked.includes_usage)
