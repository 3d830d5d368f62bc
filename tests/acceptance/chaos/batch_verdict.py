"""What must hold of batches once all is healed: each line answered once, the counts true, each job run once, and when
their files are deleted nothing left of them."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import httpx2 as httpx
import redis

from producer.batch.protocol import batch_job_id
from producer.gateway.batches.batch_keys import ENDED_KEY, OPEN_KEY
from producer.gateway.files.file_keys import UNRECORDED_KEY
from tests.acceptance.chaos.asking import answer_text
from tests.acceptance.chaos.batch_owner import ENDED, Line, Owner
from tests.acceptance.chaos.mixture_verdict import left_behind
from tests.acceptance.chaos.run import wait_for
from tests.fakes.file_stores import PlaceOfFiles
from tests.fakes.redis_reads import sorted_set_names

CLEAN_SECONDS = 60.0
Body = dict[str, Any]


class BatchVerdict:
    """By the API of one gateway that nothing happens to."""

    def __init__(
        self, client: httpx.Client, connection: redis.Redis, owners: Mapping[str, Owner], *, keeps_all: bool
    ) -> None:
        """`owners`: by their batch's name. Without `keeps_all` Redis may have lost which parts lie in the store."""
        self._keeps_all = keeps_all
        self._client = client
        self._connection = connection
        self._owners = owners

    def batches(self) -> list[Body]:
        page = self._client.get("/v1/batches", params={"limit": 100}).raise_for_status().json()
        assert not page["has_more"]
        return list(page["data"])

    def have_ended(self) -> bool:
        """Also those whose maker never learned that they were made."""
        return not self._connection.zcard(OPEN_KEY)

    def find_problems(self, place: PlaceOfFiles, runs: Counter[str]) -> list[str]:
        """`runs`: how often each job ended."""
        batches = self.batches()
        made = {batch["metadata"]["name"] for batch in batches}
        found = [f"{name}: no batch" for name in self._owners if name not in made]
        for batch in batches:
            plan = self._owners[batch["metadata"]["name"]].plan
            problems = self._status_problems(batch) or self._line_problems(batch, plan.lines, runs)
            found += [f"{plan.name} {batch['id']} {batch['status']}: {problem}" for problem in problems]
        ended = {
            name.decode(): int(number)
            for name, number in cast(dict[bytes, bytes], self._connection.hgetall(ENDED_KEY)).items()
        }
        if ended != Counter(batch["status"] for batch in batches):
            found.append(f"ended by status: {ended}")
        found += [f"left behind: {key}" for key in left_behind(self._connection)]
        found += [f"left behind: {key!r}" for key in self._connection.scan_iter("promptmill:batch:*:answered")]
        return [*found, *self._file_problems(place)]

    def _status_problems(self, batch: Body) -> list[str]:
        plan, status = self._owners[batch["metadata"]["name"]].plan, batch["status"]
        possible = {"failed" if plan.is_invalid else "completed"}
        possible |= {"cancelled"} if plan.cancel_after is not None else set()
        possible |= {"expired"} if plan.expire_after is not None else set()
        if status not in possible:
            return [f"may only be {possible}: {batch}"]
        others = [name for name in ENDED if name != status and batch[f"{name}_at"]]
        return [f"has ended as {others} as well"] if others or not batch[f"{status}_at"] else []

    def _line_problems(self, batch: Body, lines: Mapping[str, Line], runs: Counter[str]) -> list[str]:
        output, errors = self._read(batch["output_file_id"]), self._read(batch["error_file_id"])
        counts = batch["request_counts"]
        if (counts["completed"], counts["failed"]) != (len(output), len(errors)):
            return [f"{counts}, with {len(output)} lines of output and {len(errors)} of errors"]
        if not counts["total"] and batch["status"] != "completed":  # it ended before it had begun
            return [f"{len(output) + len(errors)} lines of none"] if output or errors else []
        found = []
        answered = Counter(entry["custom_id"] for entry in [*output, *errors])
        once = Counter(list(lines))
        if answered != once or counts["total"] != len(lines):
            found.append(f"missing: {once - answered}; too many: {answered - once}; {counts}")
        found += [f"its answer is {entry}" for entry in output if not _is_answer(entry, lines)]
        found += [f"its error is {entry}" for entry in errors if not _is_right(entry, lines, batch["status"])]
        twice = {name: runs[job] for name in lines if runs[job := batch_job_id(batch["id"], name)] > 1}
        found += [f"run again: {twice}"] if twice else []
        tokens = sum(entry["response"]["body"]["usage"]["completion_tokens"] for entry in output)
        if batch["usage"]["output_tokens"] != tokens:
            found.append(f"usage {batch['usage']}, of {tokens} tokens")
        return found

    def _read(self, file_id: str | None) -> list[Body]:
        if file_id is None:
            return []
        text = self._client.get(f"/v1/files/{file_id}/content").raise_for_status().content
        return [json.loads(row) for row in text.splitlines()]

    def _file_problems(self, place: PlaceOfFiles) -> list[str]:
        """Nobody writes any more: what belongs to no file is due, and so is what is deleted."""
        for part in self._unrecorded():
            self._connection.zadd(UNRECORDED_KEY, {part: 0})
        listed = self._client.get("/v1/files").raise_for_status().json()["data"]
        gone = [self._client.delete(f"/v1/files/{file['id']}").status_code for file in listed]
        found = [f"{gone.count(409)} files cannot be deleted"] if any(code != 200 for code in gone) else []
        if not wait_for(lambda: not ((self._keeps_all and place.names()) or self._unrecorded()), CLEAN_SECONDS):
            found.append(f"left in the store: {place.names()}; to be deleted: {self._unrecorded()}")
        return found

    def _unrecorded(self) -> list[str]:
        return sorted_set_names(self._connection, UNRECORDED_KEY)


def _is_answer(entry: Body, lines: Mapping[str, Line]) -> bool:
    [choice] = entry["response"]["body"]["choices"]
    return bool(choice["text"] == answer_text(lines[entry["custom_id"]].body))


def _is_right(entry: Body, lines: Mapping[str, Line], status: str) -> bool:
    if entry["response"] is not None:
        return lines[entry["custom_id"]].is_refused and entry["response"]["body"]["error"]["param"] == "temperature"
    return status in ("cancelled", "expired") and entry["error"]["code"] == f"batch_{status}"
