"""How many KV blocks fit: measures the memory that is left and divides it. Raises with the numbers if it is too little.

Knows nothing of how a step runs; it is handed a way to run the largest one where the peak has to be measured.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.model.loader import LoadedModel
from engine.runner.batch_inputs import BatchInputs, ScoredTokens
from engine.runner.device_errors import is_of_memory
from engine.runner.step_budget import plain_rows, prompts_step
from engine.sampling_params import MAX_LOGPROBS
from engine.step_plan import MAX_SCORED_TOKENS

logger = logging.getLogger(__name__)

_MEBIBYTE = 1 << 20
_CGROUP = Path("/sys/fs/cgroup")


MeasureGraphs = Callable[[Callable[[], int], float], int]  # `GraphedSteps.measure`


def choose_num_blocks(
    config: EngineConfig,
    model: LoadedModel,
    run_largest_step: Callable[[], None],
    measure_graphs: MeasureGraphs | None = None,
) -> int:
    """Blocks of the KV cache: `num_kv_blocks` if given, else what `kv_memory_fraction` of the free memory holds.

    On CUDA the largest step is run once, over a cache of a single block, and its peak is kept free as well, and so is
    what graphs of the largest steps take, which have memory of their own. Raises `ModelLoadError` if there is not room
    for the tokens of one step or of one context, whichever is less.
    """
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    if model.device.type == "cuda":
        num_bytes = _free_on_cuda(config, model, run_largest_step, measure_graphs)
    else:
        num_bytes = min(int(config.kv_memory_fraction * free_host_bytes()), config.max_cpu_kv_bytes)
        num_bytes //= config.tensor_parallel_size  # ranks share the machine's memory
    num_blocks = max(0, num_bytes) // model.kv_block_bytes
    max_num_tokens = config.step_tokens(str(model.device))
    num_needed = -(-min(max_num_tokens, model.max_model_len) // model.block_size)
    if num_blocks < num_needed:
        raise ModelLoadError(
            f"the KV cache would have {num_blocks} blocks of {model.block_size} tokens "
            f"({num_bytes / _MEBIBYTE:.0f} MiB at {model.kv_block_bytes} bytes each); at least {num_needed} are needed "
            f"for max_num_tokens {max_num_tokens} or max_model_len {model.max_model_len}: lower one of these, "
            "raise kv_memory_fraction or max_cpu_kv_bytes, or set num_kv_blocks"
        )
    return num_blocks


def warn_of_short_context(config: EngineConfig, model: LoadedModel, num_blocks: int) -> None:
    """Say so where the cache ends the context before the model does: requests would hear of it first."""
    held = num_blocks * model.block_size
    if held >= model.max_model_len:
        return
    num_wanted = -(-model.max_model_len // model.block_size)
    if config.num_kv_blocks is not None:
        remedy = f"raise num_kv_blocks to {num_wanted}"
    elif model.device.type == "cpu":
        num_bytes = num_wanted * model.kv_block_bytes * config.tensor_parallel_size
        remedy = f"raise max_cpu_kv_bytes to {num_bytes}, or kv_memory_fraction"
    else:
        remedy = f"raise kv_memory_fraction until there are {num_wanted} blocks"
    logger.warning(
        "action=context_cut context_length=%d max_model_len=%d num_kv_blocks=%d remedy=%r",
        held,
        model.max_model_len,
        num_blocks,
        f"{remedy}; if it is meant so, set max_model_len to {held}",
    )


def _free_on_cuda(
    config: EngineConfig,
    model: LoadedModel,
    run_largest_step: Callable[[], None],
    measure_graphs: MeasureGraphs | None,
) -> int:
    """Bytes for the cache beside the weights, the largest step's peak and graphs."""
    device = model.device

    def free_bytes() -> int:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]

    model.allocate_kv_cache(1)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        run_largest_step()
        peak = torch.cuda.max_memory_allocated(device) - before
        spare_share = 1 - config.kv_memory_fraction
        graphs = measure_graphs(free_bytes, spare_share) if measure_graphs is not None else 0
    except RuntimeError as error:
        if not is_of_memory(error):
            raise
        raise ModelLoadError(
            f"a step of max_num_tokens {config.step_tokens(str(device))} does not fit beside the weights: lower it "
            f"({error})"
        ) from error
    num_bytes = int(config.kv_memory_fraction * free_bytes()) - peak - graphs
    logger.info("action=memory_measured cache_bytes=%d step_bytes=%d graph_bytes=%d", num_bytes, peak, graphs)
    return num_bytes


def largest_step(config: EngineConfig, max_model_len: int) -> BatchInputs:
    """The inputs that take the most memory: a full token budget, and as many rows of logits as there can be."""
    num_tokens = config.step_tokens("cuda")
    num_sampled = min(config.max_num_seqs, num_tokens)
    ones, zeros = np.ones(num_sampled, np.float32), np.zeros(num_sampled, np.int64)
    scored = np.zeros(min(MAX_SCORED_TOKENS, num_tokens), np.int64)
    return replace(
        prompts_step(config, num_tokens, min(num_tokens, max_model_len), num_blocks=1),
        logits_indices=np.arange(num_sampled),
        sampled_positions=zeros,
        sampling=replace(
            plain_rows(num_sampled),
            temperature=ones,
            top_p=ones * np.float32(0.9),
            top_k=zeros + 50,
            min_p=ones * np.float32(0.01),
            logprob_rows=np.arange(num_sampled),
            num_top=MAX_LOGPROBS,
        ),
        scored=ScoredTokens(scored, scored, scored, MAX_LOGPROBS),
    )


def free_host_bytes() -> int:
    """Memory that this process may still take: the machine's, or its control group's if that has less."""
    membership = Path("/proc/self/cgroup")
    return min(_machine_bytes(), *_cgroup_bytes(_CGROUP, membership.read_text() if membership.exists() else ""))


def _machine_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 << 30  # elsewhere the system does not say; `max_cpu_kv_bytes` and `num_kv_blocks` decide


def _cgroup_bytes(root: Path, membership: str) -> list[int]:
    """What is left under each limit that is set for this process's group or one above it (version 2, then version 1).

    membership: what `/proc/self/cgroup` says. A group is charged for the files that it has read as well; what of them
    is not in use makes room for whoever asks.
    """
    groups = {kinds: path.strip("/") for _, kinds, path in (line.split(":", 2) for line in membership.splitlines())}
    of_memory = next((path for kinds, path in groups.items() if "memory" in kinds.split(",")), "")
    left = []
    for top, group, limit, usage in (
        (root, groups.get("", ""), "memory.max", "memory.current"),
        (root / "memory", of_memory, "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        own = top / group
        left += [_bytes_left(folder, limit, usage) for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return left


def _bytes_left(folder: Path, limit: str, usage: str) -> int:
    """Of a group; very many where it has no limit."""
    if not (folder / limit).exists() or (most := (folder / limit).read_text().strip()) == "max":
        return 1 << 62
    figures = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    unused = int(figures.get("total_inactive_file") or figures["inactive_file"])
    return int(most) - int((folder / usage).read_text()) + unused
