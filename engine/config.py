"""The engine's configuration: values only, read once and never edited."""

from dataclasses import dataclass
from math import inf

from engine.field_types import check_field_types, require


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to run one model. Raises `InvalidRequestError` naming the field."""

    model_path: str
    """A local folder, a hub id, a `.gguf` file or `smollm2-135m`."""
    device: str = "auto"
    """`auto` (`cuda` if there is a GPU), `cpu`, `cuda`, `cuda:N`."""
    tensor_parallel_size: int = 1
    """Processes that share the model, each with a part of every layer: one for each GPU from `device` on, if the model
    is too large for one. On a CPU all of them compute on it."""
    dtype: str = "auto"
    """`auto` (on CUDA the checkpoint's; on CPU bfloat16 where the CPU computes it natively, else float32),
    `float32`, `bfloat16`, `float16`: of weights, keys and values. A CPU that does not multiply in it computes in
    float32 from them."""
    quantize: str = "none"
    """`none`, or on a CPU `int8`: linear layers with 8-bit weights and activations, the output layer included."""
    kv_cache_dtype: str = "auto"
    """`auto` (`dtype`; on a CPU float16 under `quantize` with float32), or on a CPU `int8`: 8 bits, with a scale
    for each key and each value of a KV head."""
    max_num_seqs: int = 256
    """Sequences in one step, at most."""
    max_num_tokens: int | None = None
    """Tokens in one step, at most: decodes first, then prefill chunks. None: 512 on a CPU, as many on a GPU as it needs
    to compute prompts about as fast as with 8192, and no fewer than `max_num_seqs`."""
    max_model_len: int | None = None
    """Tokens of prompt and output together; None: the model's own."""
    block_size: int = 16
    """Tokens in one KV block."""
    num_kv_blocks: int | None = None
    """KV blocks in all; None: from `kv_memory_fraction`."""
    kv_memory_fraction: float = 0.9
    """Share of the device's memory that is free once the weights are loaded (on CPU: capped at `max_cpu_kv_bytes`)."""
    max_cpu_kv_bytes: int = 1 << 30
    """On a CPU the KV cache takes no more than this, however much memory is free."""
    prefix_caching: bool = True
    """Share the KV blocks of equal prefixes and keep unreferenced ones until their room is needed."""
    prompt_lookup: str = "auto"
    """Guess tokens from the sequence so far, and compute several at once: the same tokens, sooner. `on`, `off`, or
    `auto`: on where a row's arithmetic does not depend on what is computed beside it."""
    attention: str = "auto"
    """`auto`, or a backend of `engine.attention.select`."""
    deterministic: bool = False
    """On a GPU: the same bits whatever the batch, by one tile and one order of additions for any number of rows, at a
    cost in speed. On a CPU that is always so. An engine that cannot keep it does not start."""
    cuda_graphs: bool = True
    """On a GPU: steps of the same shape are launched at once, as a CUDA graph."""
    num_threads: int | None = None
    """Threads of a CPU step; None: torch's own choice, and fewer while others hold cores and fewer are faster."""
    step_timeout_seconds: float = 120.0
    """A step that takes longer is a hung device: the child is killed and started again."""
    start_timeout_seconds: float = 600.0
    """Loading the model and allocating its cache may take this long. A download from the hub and the conversion of a
    GGUF file do not count, as long as they make progress."""
    cache_dir: str | None = None
    """Where converted and prepared models and compiled kernels are kept; None: `~/.cache/promptmill`."""

    def __post_init__(self) -> None:
        check_field_types(self)
        for name in COUNTS:
            value = getattr(self, name)
            require(value is None or value >= 1, name, "must be at least 1", value)
        require(
            self.max_num_tokens is None or self.max_num_tokens >= self.max_num_seqs,
            "max_num_tokens",
            f"must be at least max_num_seqs ({self.max_num_seqs})",
            self.max_num_tokens,
        )
        require(0 < self.kv_memory_fraction <= 1, "kv_memory_fraction", "must lie in (0, 1]", self.kv_memory_fraction)
        for name in ("step_timeout_seconds", "start_timeout_seconds"):
            require(0 < getattr(self, name) < inf, name, "must be a positive number of seconds", getattr(self, name))
        for name, options in OPTIONS.items():
            value = getattr(self, name)
            require(value in options, name, f"must be one of {', '.join(options)}", value)

    def step_tokens(self, device: str) -> int:
        """`max_num_tokens` of an engine on this device, such as `cpu` or `cuda:0`."""
        if self.max_num_tokens is not None:
            return self.max_num_tokens
        return max(self.max_num_seqs, _GPU_STEP_TOKENS if device.startswith("cuda") else _CPU_STEP_TOKENS)


# A CPU computes 512 tokens at a time no slower a token than 8192, and nobody waits for the long step: 64 prompts on two
# AVX2 cores took 20 to 24 s with 256, 512, 1024 and 8192.
_CPU_STEP_TOKENS = 512
_GPU_STEP_TOKENS = 8192
COUNTS = (
    "tensor_parallel_size",
    "max_num_seqs",
    "max_model_len",
    "block_size",
    "num_kv_blocks",
    "max_cpu_kv_bytes",
    "num_threads",
)
OPTIONS = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "quantize": ("none", "int8"),
    "kv_cache_dtype": ("auto", "int8"),
    "prompt_lookup": ("auto", "on", "off"),
}
