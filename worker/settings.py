"""The worker's settings. Read once at the edge; nothing below reads the environment."""

import re
from dataclasses import fields
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator

from engine.config import EngineConfig
from producer.contract.keys import QUEUE_PATTERN, TENANT_PATTERN, class_queues
from producer.settings import S3_URL_PATTERN, ServerSettings, split_list
from worker.parsing.model_format import ReasoningParserName, ToolParserName

DEFAULT_MODEL = "smollm2-135m"


class WorkerSettings(ServerSettings):
    """A worker's settings; the engine's are `engine_config`. List settings are comma separated."""

    model: str = Field(
        default=DEFAULT_MODEL, min_length=1, description="Model: a folder, a hub id, a .gguf file or smollm2-135m."
    )
    model_names: str | None = Field(
        default=None, description="Model names that jobs may ask for, comma separated; default: the value of --model."
    )
    queues: str | None = Field(
        default=None,
        description="Queues to drain, comma separated, most urgent first; default: the classes of --queue.",
    )
    worker_name: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_.-]{1,128}$", description="This worker's name; default: host and pid."
    )
    results: str = Field(
        default="redis",
        pattern=f"^(redis|{S3_URL_PATTERN})$",
        description="Where full results go: redis, or s3://BUCKET/PREFIX.",
    )
    callbacks: str = Field(
        default="",
        description="RQ callbacks that jobs may name, as package.module.function, comma separated; others are refused.",
    )
    webhooks: str = Field(
        default="",
        description="URLs that jobs' RQ webhooks may call, and all below them, comma separated; others are refused.",
    )

    chat_template: str | None = Field(
        default=None, description="File with a chat template to use instead of the model's own."
    )
    tool_parser: ToolParserName = Field(
        default="auto",
        description="How the model writes tool calls: auto, hermes, llama, or none to leave them as text.",
    )
    reasoning_parser: ReasoningParserName = Field(
        default="auto", description="How the model marks its reasoning: auto, think, or none to leave it as text."
    )

    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="Device: auto, cpu, cuda or cuda:N."
    )
    tensor_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Number of GPUs to split the model over, beginning with --device; on a CPU, of processes.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Number format of weights, keys and values: auto, float32, bfloat16 or float16."
    )
    quantize: Literal["none", "int8"] = Field(
        default="none", description="On a CPU: 8-bit linear layers (int8), or none. Faster, but the tokens may differ."
    )
    kv_cache_dtype: Literal["auto", "int8"] = Field(
        default="auto",
        description="On a CPU: 8-bit keys and values (int8), or auto for those of --dtype. Twice as many tokens fit; "
        "engine/README.md says which models it does not suit.",
    )
    attention: str = Field(
        default="auto", min_length=1, description="Attention backend: auto, native, torch or triton."
    )
    deterministic: bool = Field(
        default=False,
        description="On a GPU: bit-identical output in any batch, but slower. On a CPU output always is.",
    )
    cuda_graphs: bool = Field(
        default=True, description="On a GPU: launch the kernels of a step together, as a CUDA graph."
    )
    num_threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads on a CPU; default: torch's choice, fewer while other processes use the cores.",
    )
    max_num_seqs: int = Field(default=256, ge=1, description="Maximum number of sequences in one step.")
    max_num_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of tokens in one step: decodes first, then chunks of prompts; at least "
        "--max-num-seqs; default: 512 on a CPU, fewer while few prompts wait; on a GPU measured at start.",
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="Maximum tokens of prompt and output together; default: the model's limit."
    )
    block_size: int = Field(default=16, ge=1, description="Tokens in one KV block.")
    num_kv_blocks: int | None = Field(
        default=None,
        ge=1,
        description="Number of KV blocks; a job's tokens must fit into them; default: from --kv-memory-fraction.",
    )
    kv_memory_fraction: float = Field(
        default=0.9, gt=0, le=1, description="Share of the free device memory for the KV cache."
    )
    max_cpu_kv_bytes: int = Field(default=1 << 30, ge=1, description="Maximum size of the KV cache on a CPU, in bytes.")
    prefix_caching: bool = Field(default=True, description="Share the KV blocks of prompts that begin alike.")
    prompt_lookup: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Prompt lookup decoding: on, off, or auto (only where it cannot change an answer).",
    )
    step_timeout_seconds: float = Field(
        default=120.0,
        gt=0,
        allow_inf_nan=False,
        description="A step that takes longer than this counts as a hung device.",
    )

    lease_seconds: float = Field(
        default=15.0, ge=2, le=3600, description="A worker that does not report for this long loses its jobs to others."
    )
    max_num_jobs: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of jobs held, waiting ones included; default: twice --max-num-seqs.",
    )
    max_running_per_tenant: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of one tenant's jobs that all workers together hold; default: no limit.",
    )
    tenant_limits: str = Field(
        default="",
        description="Limits of single tenants, as TENANT=N, comma separated; they override --max-running-per-tenant.",
    )
    drain: Literal["hand-over", "finish"] = Field(
        default="hand-over",
        description="On SIGTERM: hand-over returns running jobs to their queues, finish completes them.",
    )
    drain_seconds: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="With --drain finish: return jobs that still run after this long; default: no limit.",
    )

    @field_validator("queues")
    @classmethod
    def _queues_have_names(cls, value: str | None) -> str | None:
        for name in split_list(value):
            if not re.fullmatch(QUEUE_PATTERN, name):
                raise ValueError(f"{name!r} is not a queue name; use letters, digits and _ . : @ -")
        if value is not None and not split_list(value):
            raise ValueError("name at least one queue")
        return value

    @field_validator("callbacks")
    @classmethod
    def _callbacks_are_dotted_names(cls, value: str) -> str:
        for name in split_list(value):
            if not all(part.isidentifier() for part in name.split(".")):
                raise ValueError(f"{name!r} is not a dotted name such as package.module.function")
        return value

    @field_validator("webhooks")
    @classmethod
    def _webhooks_are_urls(cls, value: str) -> str:
        """Any other would let nothing through."""
        for url in split_list(value):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise ValueError(f"{url!r} is not a URL such as https://app.example/hooks")
        return value

    @field_validator("device", "attention", mode="before")
    @classmethod
    def _names_have_any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("tenant_limits")
    @classmethod
    def _limits_are_numbers(cls, value: str) -> str:
        for part in split_list(value):
            tenant, _, number = part.partition("=")
            if not re.fullmatch(TENANT_PATTERN, tenant) or not re.fullmatch(r"[1-9][0-9]{0,8}", number):
                raise ValueError(f"{part!r} is not a limit; write TENANT=N, with N at least 1")
        return value

    @field_validator("max_num_tokens")
    @classmethod
    def _step_fits_every_sequence(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < (max_num_seqs := info.data.get("max_num_seqs", 0)):
            raise ValueError(f"must be at least --max-num-seqs ({max_num_seqs})")
        return value

    @property
    def queue_names(self) -> list[str]:
        """The queues to drain, most urgent first."""
        return split_list(self.queues) or class_queues(self.queue)

    @property
    def limits_by_tenant(self) -> dict[str, int]:
        pairs = (part.partition("=") for part in split_list(self.tenant_limits))
        return {tenant: int(number) for tenant, _, number in pairs}

    @property
    def served_model_names(self) -> list[str]:
        return split_list(self.model_names) or [self.model]

    @property
    def allowed_callbacks(self) -> frozenset[str]:
        return frozenset(split_list(self.callbacks))

    @property
    def allowed_webhooks(self) -> list[str]:
        return split_list(self.webhooks)

    @property
    def engine_config(self) -> EngineConfig:
        """Its fields are the settings of the same names; what is no setting has its default."""
        names = {field.name for field in fields(EngineConfig)}
        return EngineConfig(model_path=self.model, **self.model_dump(include=names))
