"""Every Redis name that producers and workers share, and the lifetimes of what is kept under them.

A queue's name is `NAME[:CLASS][@TENANT]`: `promptmill`, `promptmill:high`, `promptmill@acme`, `promptmill:low@acme`.
Each is an RQ queue of its own. A worker is told names without tenants, most urgent first; the tenants of each it finds
itself, and their queues take turns with the queue itself.
"""

DEFAULT_QUEUE = "promptmill"
PRIORITY_CLASSES = ("high", "", "low")  # claimed in this order; the empty class is the queue itself

JOB_FUNCTION = "promptmill.generate"  # a label on the worker's allow-list; it is never imported

RESULT_TTL_SECONDS = 24 * 3600
FAILURE_TTL_SECONDS = 24 * 3600
STREAM_TTL_SECONDS = 3600  # counted from the stream's `done` entry; before it a stream has no TTL
WAITING_STREAM_TTL_SECONDS = 30 * 24 * 3600  # of a job put back onto its queue, where it may be deleted: until it runs
MODEL_TTL_SECONDS = 7 * 24 * 3600  # how long a model is known, after its last worker
RESULTS_STREAM_MAX_ENTRIES = 100_000  # approximate cap of a queue's results stream

MARKER_FIELD = "m"
DATA_FIELD = "d"

WORKERS_KEY = "promptmill:workers"  # ZSET of worker names, scored by the epoch second their entry expires
MODELS_KEY = "promptmill:models"  # ZSET, scored by the epoch second when a worker last served, or began to load, one
CANCEL_CHANNEL = "promptmill:cancel"  # pub/sub: the payload is a job id
QUEUE_PATTERN = r"[A-Za-z0-9_.:@-]{1,128}"
TENANT_PATTERN = r"[A-Za-z0-9_.-]{1,64}"


def stream_key(job_id: str) -> str:
    """The job's stream (its write-ahead log) and the pub/sub channel of the same name."""
    return f"promptmill:stream:{{{job_id}}}"


def result_key(job_id: str) -> str:
    return f"promptmill:result:{job_id}"


def results_channel(queue: str) -> str:
    """Pub/sub channel, and capped stream of the same name, with one line for every job of `queue` that ended."""
    return f"promptmill:results:{queue}"


def leases_key(queue: str) -> str:
    """ZSET of the job ids of `queue` that a worker holds, scored by the lease's end (Redis TIME, epoch seconds)."""
    return f"promptmill:leases:{queue}"


def freed_channel(queue: str) -> str:
    """Pub/sub: a job of one of `queue`'s tenants has left its worker. The payload is the tenant's queue."""
    return f"promptmill:freed:{queue}"


def fence_key(job_id: str) -> str:
    """`ATTEMPT:EXECUTION_ID` of whoever may write the job's outcome; changed by claim, sweep and hand-over alone."""
    return f"promptmill:fence:{job_id}"


def attempt_key(job_id: str) -> str:
    return f"promptmill:attempt:{job_id}"


def worker_key(worker_name: str) -> str:
    """JSON of a `WorkerInfo`: what a live worker serves."""
    return f"promptmill:worker:{worker_name}"


def turns_key(queue: str) -> str:
    """ZSET of `queue` and its tenants' queues that have jobs waiting, by whose turn it is: lowest score first."""
    return f"promptmill:turns:{queue}"


def leased_key(queue: str) -> str:
    """SET of the queues of `queue`'s tenants whose jobs a worker holds."""
    return f"promptmill:leased:{queue}"


def class_queue(queue: str, priority_class: str) -> str:
    """The queue of one priority class of `queue`."""
    base, tenant = split_tenant(queue)
    return tenant_queue(f"{base}:{priority_class}", tenant) if priority_class else queue


def class_queues(queue: str) -> list[str]:
    """The queue names of `queue`'s priority classes, most urgent first: `NAME:high`, `NAME`, `NAME:low`."""
    return [class_queue(queue, name) for name in PRIORITY_CLASSES]


def tenant_queue(queue: str, tenant: str | None) -> str:
    """The queue of one tenant of `queue`; without a tenant, `queue` itself."""
    return f"{queue}@{tenant}" if tenant is not None else queue


def split_tenant(queue: str) -> tuple[str, str | None]:
    """The queue a tenant's queue belongs to, and the tenant; None for a queue that is nobody's."""
    base, at, tenant = queue.rpartition("@")
    return (base, tenant) if at else (queue, None)
