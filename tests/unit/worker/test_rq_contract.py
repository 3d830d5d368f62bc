"""What the bridge relies on inside RQ: fails with the first RQ release that moves one of these."""

import pytest
import redis
from rq.executions import WORKER_EXECUTIONS_KEY_TEMPLATE, Execution, ExecutionRegistry
from rq.job import Job
from rq.queue import Queue
from rq.registry import CanceledJobRegistry, ReadyJobRegistry, StartedJobRegistry
from rq.scheduler import RQScheduler
from rq.suspension import WORKERS_SUSPENDED
from rq.worker import BaseWorker

from producer import rq_names
from producer.rq_names import RQ_PREFIX


def test_rq_names_its_keys_as_the_scripts_do() -> None:
    execution = Execution("ex", "job", redis.Redis(), worker_name="w")
    assert Job.key_for("job") == f"{RQ_PREFIX}:job:job"
    assert Queue("q", connection=redis.Redis()).key == f"{RQ_PREFIX}:queue:q"
    assert StartedJobRegistry.key_template.format("q") == f"{RQ_PREFIX}:wip:q"
    assert execution.key == f"{RQ_PREFIX}:execution:job:ex" and execution.composite_key == "job:ex"
    assert ExecutionRegistry.key_template.format("job") == f"{RQ_PREFIX}:executions:job"
    assert execution.worker_executions_key == f"{RQ_PREFIX}:worker:w:executions"
    assert WORKER_EXECUTIONS_KEY_TEMPLATE.format("w") == execution.worker_executions_key
    assert BaseWorker.redis_worker_namespace_prefix == f"{RQ_PREFIX}:worker:"
    assert CanceledJobRegistry.key_template.format("q") == f"{RQ_PREFIX}:canceled:q"
    assert f"{RQ_PREFIX}:suspended" == WORKERS_SUSPENDED
    assert set(execution.serialize()) == {"id", "job_id", "created_at", "last_heartbeat", "worker_name"}


PRIVATE_PARTS = {
    BaseWorker: (
        "_set_connection register_birth register_death heartbeat set_state serialize clean_registries queues "
        "handle_job_success handle_job_failure pubsub_channel_name key"
    ),
    Job: (
        "restore cleanup should_retry has_rate_limit should_enqueue_at_front get_result_ttl key_for "
        "dependents_key_for set_status send_webhooks dependencies_key origin"
    ),
    RQScheduler: (
        "acquire_locks acquired_locks release_locks heartbeat enqueue_scheduled_jobs register_birth stop "
        "get_locking_key"
    ),
    Queue: (
        "acquire_maintenance_lock release_maintenance_lock enqueue_dependents ready_job_registry "
        "enqueue_ready_jobs_by_queue move_dependents_to_ready finished_job_registry started_job_registry "
        "_enqueue_job _enqueue_rate_limited_job"
    ),
}


@pytest.mark.parametrize("kind", PRIVATE_PARTS)
def test_rq_still_has_the_parts_the_bridge_relies_on(kind: type) -> None:
    instance = {BaseWorker: ["queues"], Job: ["origin"]}.get(kind, [])
    missing = [name for name in PRIVATE_PARTS[kind].split() if not hasattr(kind, name) and name not in instance]
    assert missing == []


def test_an_rq_job_still_has_the_fields_the_bridge_reads_and_writes() -> None:
    job = Job("job", connection=redis.Redis())
    for name in [
        "_success_callback_name",
        "_failure_callback_name",
        "_stopped_callback_name",
        "webhooks",
        "repeats_left",
        "failure_ttl",
        "worker_name",
        "started_at",
        "ended_at",
        "timeout",
        "_status",
        "_dependency_ids",
        "_result",
        "retries_left",
        "origin",
    ]:
        assert hasattr(job, name), name


def test_the_clients_names_are_rqs() -> None:
    assert rq_names.dependencies_key("job") == Job("job", connection=redis.Redis()).dependencies_key
    assert rq_names.dependents_key("job") == Job.dependents_key_for("job")
    assert rq_names.ready_key("queue") == ReadyJobRegistry.key_template.format("queue")
