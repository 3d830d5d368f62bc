"""Batch lines, and runs of them, for tests."""

import json
from pathlib import Path
from typing import Any

from producer.batch.protocol import BatchOptions
from producer.batch.run import BatchProgress, BatchRun
from producer.settings import ProducerSettings


def chat(custom_id: str, text: str, **fields: Any) -> str:
    body = {"messages": [{"role": "user", "content": text}], **fields}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body})


def completion(custom_id: str, text: str, **fields: Any) -> str:
    return json.dumps({"custom_id": custom_id, "url": "/v1/completions", "body": {"prompt": text, **fields}})


def run(redis_url: str, files: tuple[Path, Path], **options: Any) -> BatchProgress:
    return batch(redis_url, files, **options).run()


def batch(redis_url: str, files: tuple[Path, Path], **options: Any) -> BatchRun:
    on_progress = options.pop("on_progress", lambda progress: None)
    retries_failed = options.pop("retries_failed", False)
    return BatchRun.of_files(
        ProducerSettings(redis_url=redis_url),
        *files,
        BatchOptions(**options),
        on_progress,
        retries_failed=retries_failed,
    )


def answers(target: Path) -> list[Any]:
    return [json.loads(line) for line in target.read_bytes().splitlines()]


def by_id(target: Path) -> dict[str, Any]:
    return {answer["custom_id"]: answer for answer in answers(target)}
