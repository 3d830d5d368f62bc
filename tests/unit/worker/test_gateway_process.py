"""The gateway's environment beside a worker: its files live as long as the Redis that knows them."""

from pathlib import Path

from worker.gateway_process import environment_for


def test_files_lie_beside_a_redis_that_is_ours_unless_a_variable_says_where() -> None:
    ours = environment_for({"PROMPTMILL_QUEUE": "q"}, 7, files=Path("/data/files"))
    assert ours["PROMPTMILL_FILES"] == "/data/files" and ours["PROMPTMILL_HTTP_FD"] == "7"
    given = environment_for({"PROMPTMILL_FILES": "s3://bucket/x"}, 7, files=Path("/data/files"))
    assert given["PROMPTMILL_FILES"] == "s3://bucket/x"
    assert "PROMPTMILL_FILES" not in environment_for({}, 7, files=None), "another's Redis: the gateway's own default"
