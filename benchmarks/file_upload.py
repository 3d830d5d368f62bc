"""What a 200 MB file costs a gateway: seconds, memory, bytes written; in a folder, in a bucket, and in the usual way.

    python -m benchmarks.file_upload [--num-bytes 200000000] [--runs 3]

One file is sent with the official client to a gateway process that keeps it in a folder, then to one that keeps it in a
bucket (moto's server, which holds it in its own memory), then to the usual way of taking an upload: a route with an
UploadFile that copies it to its place (`upload_file_peer.py`). Shown: seconds of the upload and of reading it back,
the process's peak memory above what it took before, and the bytes it wrote to disk.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import openai

from benchmarks.gateway_fixture import gateway_process, served, wait_until_it_answers
from benchmarks.process_figures import memory_bytes
from benchmarks.report import print_and_keep
from worker.embedded_redis import EmbeddedRedis, free_port

S3_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
NO_DRAIN = ("--http-drain-seconds", "0")
PIECE = b'{"custom_id": "request-0", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}\n' * 10_000

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-bytes", type=int, default=200_000_000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    os.environ.update(S3_ENVIRONMENT)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name, EmbeddedRedis() as folders, EmbeddedRedis() as buckets:
        folder = Path(name)  # not in /tmp, which may be memory
        source = folder / "source.jsonl"
        _write_source(source, options.num_bytes)
        rows = []
        with gateway_process(folders.url, *NO_DRAIN, "--files", str(folder / "files")) as (url, process):
            rows.append(
                _row("gateway, folder", _measure_all(url, process.pid, source, options.runs), options.num_bytes)
            )
        with (
            _moto() as endpoint,
            gateway_process(buckets.url, *NO_DRAIN, "--files", "s3://files/x", "--s3-endpoint-url", endpoint) as (
                url,
                process,
            ),
        ):
            rows.append(
                _row("gateway, bucket", _measure_all(url, process.pid, source, options.runs), options.num_bytes)
            )
        with served("-m", "benchmarks.upload_file_peer", str(port := free_port()), str(folder / "peer")) as process:
            url = wait_until_it_answers(process, f"http://127.0.0.1:{port}", "/health/live")
            rows.append(
                _row("UploadFile, copied", _measure_all(url, process.pid, source, options.runs), options.num_bytes)
            )
    print_and_keep(
        "file_upload",
        ["kept by", "upload", "MB a second", "peak memory above idle", "written to disk", "read back"],
        rows,
        [
            f"{options.num_bytes / 1e6:g} MB with the official client from the same machine, medians of {options.runs}",
            "idle: the process after a first small upload; peak: its resident set while the large one came in",
            "the client, Redis, the process and moto's server share the cores",
        ],
    )


def _row(name: str, runs: list[Figures], num_bytes: int) -> list[str]:
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return [
        name,
        f"{middle['upload_seconds']:.2f} s",
        f"{num_bytes / 1e6 / middle['upload_seconds']:.0f}",
        f"{middle['peak_bytes'] / 2**20:.0f} MiB",
        f"{middle['written_bytes'] / 1e6:.0f} MB",
        f"{middle['read_seconds']:.2f} s",
    ]


def _measure_all(url: str, pid: int, source: Path, num_runs: int) -> list[Figures]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        client.files.create(file=("small", PIECE), purpose="batch")
        return [_measure(client, pid, source) for _ in range(num_runs)]


def _measure(client: openai.OpenAI, pid: int, source: Path) -> Figures:
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is counted from now on
    idle_bytes, written_before = memory_bytes(pid, "VmRSS"), _written_bytes(pid)
    started = time.perf_counter()
    with source.open("rb") as file:
        kept = client.files.create(file=file, purpose="batch")
    upload_seconds = time.perf_counter() - started
    peak_bytes, written_bytes = memory_bytes(pid, "VmHWM") - idle_bytes, _written_bytes(pid) - written_before
    started, num_read = time.perf_counter(), 0
    with client.files.with_streaming_response.content(kept.id) as response:
        for chunk in response.iter_bytes(1 << 20):
            num_read += len(chunk)
    assert num_read == kept.bytes == source.stat().st_size
    read_seconds = time.perf_counter() - started
    client.files.delete(kept.id)
    return {
        "upload_seconds": upload_seconds,
        "peak_bytes": peak_bytes,
        "written_bytes": written_bytes,
        "read_seconds": read_seconds,
    }


def _written_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes:"))


def _write_source(path: Path, num_bytes: int) -> None:
    with path.open("wb") as file:
        while (left := num_bytes - file.tell()) > 0:
            file.write(PIECE[:left])


@contextmanager
def _moto() -> Iterator[str]:
    port = free_port()
    with served("-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)) as process:
        endpoint = wait_until_it_answers(process, f"http://127.0.0.1:{port}", "/moto-api/")
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="files")
        yield endpoint


if __name__ == "__main__":
    main()
