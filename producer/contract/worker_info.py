"""What a live worker publishes about itself, from which a producer resolves a model to its queue."""

from pydantic import BaseModel, ConfigDict

from producer.contract.version import CONTRACT_VERSION, ContractVersion


class WorkerInfo(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    v: ContractVersion = CONTRACT_VERSION
    name: str
    queues: list[str]
    models: list[str]
    context_length: int  # tokens, prompt and output together
    max_request_bytes: int | None = None  # of RQ's `data`: a larger one, but for embeddings, is refused
    device: str
    hostname: str
    pid: int
    started_at: float  # epoch seconds
    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_free: int = 0
    tokens_per_second: float = 0.0  # of output: embeddings have none
    beat_at: float | None = None  # epoch seconds of this entry; None: of a worker that does not say
