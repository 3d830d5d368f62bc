"""Streamed answers: the streams of a request's jobs as one response."""

from producer.gateway.acceptance import AcceptedRequest
from producer.gateway.chunk_bodies import ChunkRenderer
from producer.gateway.context import GatewayContext
from producer.gateway.event_stream import EventStream
from producer.gateway.job_stream import JobStream


def respond(context: GatewayContext, accepted: AcceptedRequest) -> EventStream:
    includes_usage = accepted.asked.includes_usage
    streams = [
        JobStream(
            job,
            ChunkRenderer(job.id, record, includes_usage=includes_usage),
            context.metrics.token_timer(accepted.model),
            includes_usage=includes_usage,
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
