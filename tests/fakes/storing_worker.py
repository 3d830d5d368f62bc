"""A fake worker's behaviour whose results go by way of a store of S3's protocol."""

import boto3

from tests.fakes.fake_worker import Behaviour
from tests.fakes.flaky_s3 import BUCKET
from tests.fakes.held_job import HeldJob


def storing(endpoint: str) -> Behaviour:
    """The prompt, or a chat's last message, back; the result is the object `jobs/JOB_ID.json`."""
    objects = boto3.client("s3", endpoint_url=endpoint)

    def end(held: HeldJob) -> None:
        held.begin()
        text = held.arguments.get("prompt") or held.arguments["messages"][-1]["content"]
        held.write(str(text), finish_reason="stop")
        key = f"jobs/{held.job_id}.json"
        objects.put_object(Bucket=BUCKET, Key=key, Body=held.result("finished").to_wire().encode())
        held.end(stored=f"s3://{BUCKET}/{key}")

    return end
