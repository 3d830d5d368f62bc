"""The worker of `durability_cost` that only publishes: no stream is written, so nothing can be resumed or reread."""

import worker.service
from producer.contract.keys import DATA_FIELD, stream_key
from worker.cli import worker as worker_command
from worker.outlet.job_stream import JobStream
from worker.outlet.stream import StreamOutlet


class PublishOnlyOutlet(StreamOutlet):
    def _append(self, batch: list[JobStream], given_up: list[str]) -> list[JobStream]:
        with self._client.pipeline(transaction=False) as pipe:
            for stream in batch:
                stream.encode_pending()
                _, entries, _ = stream.unsent()
                for entry_id, field, data in zip(entries[::3], entries[1::3], entries[2::3], strict=True):
                    if field == DATA_FIELD:
                        pipe.publish(stream_key(stream.job_id), f"{entry_id} {data}")
                stream.acknowledge_sent()
            pipe.execute()
        return []


if __name__ == "__main__":
    worker.service.StreamOutlet = PublishOnlyOutlet  # type: ignore[attr-defined]
    worker_command()
