"""How many blocks the KV cache has: its share of the memory that is free, and what a context needs."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.runner import memory
from engine.runner.memory import choose_num_blocks, free_host_bytes
from engine.runner.model_runner import ModelRunner
from tests.fakes.tiny_models import make_tiny_model, tiny_config


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


def test_the_cache_takes_its_share_of_the_free_memory(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelRunner(tiny_config(tiny_llama))._model
    block = model.kv_block_bytes
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 1000 * block)

    def num_blocks(**overrides: Any) -> int:
        settings = tiny_config(tiny_llama, num_kv_blocks=None, max_model_len=64, **overrides)
        return choose_num_blocks(settings, model, lambda: None)

    assert num_blocks(kv_memory_fraction=0.25) == 250
    assert num_blocks(max_cpu_kv_bytes=20 * block) == 20
    with pytest.raises(ModelLoadError, match=r"1 blocks of 16 .* at least 2 .*max_num_tokens 32.*max_cpu_kv_bytes"):
        num_blocks(max_cpu_kv_bytes=block)


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        ({"num_kv_blocks": 2}, "raise num_kv_blocks to 4; if it is meant so, set max_model_len to 32"),
        ({"num_kv_blocks": None, "max_cpu_kv_bytes": 3}, r"raise max_cpu_kv_bytes to 4, or kv_memory_fraction; .* 48"),
    ],
)
def test_a_cache_that_ends_the_context_early_says_so_and_how_it_holds_more(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture, overrides: dict[str, Any], remedy: str
) -> None:
    model = ModelRunner(tiny_config(tiny_llama))._model
    if (num_blocks := overrides.get("max_cpu_kv_bytes")) is not None:
        overrides = overrides | {"max_cpu_kv_bytes": num_blocks * model.kv_block_bytes}
        remedy = remedy.replace("bytes to 4", f"bytes to {4 * model.kv_block_bytes}")
    caplog.clear()
    held = ModelRunner(tiny_config(tiny_llama, max_model_len=64, **overrides)).info
    assert (held.max_model_len, held.is_bound_by_cache) == (16 * held.num_kv_blocks, True)
    (said,) = [record.getMessage() for record in caplog.records if "context_cut" in record.getMessage()]
    assert re.search(f"context_length={held.max_model_len} max_model_len=64 .*{remedy}", said)


def test_a_cache_that_holds_the_whole_context_says_nothing(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = ModelRunner(tiny_config(tiny_llama, max_model_len=64, num_kv_blocks=4)).info
    assert (info.max_model_len, info.is_bound_by_cache) == (64, False)
    assert "context_cut" not in caplog.text


def test_on_cuda_the_cache_leaves_room_for_a_step_and_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name, value in {
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "mem_get_info": (1_000_000, 2_000_000),
        "memory_allocated": 7_000,
        "max_memory_allocated": 107_000,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, value=value: (calls.append(name), value)[1])
    model: Any = SimpleNamespace(
        device=torch.device("cuda", 0),
        allocate_kv_cache=lambda num_blocks: calls.append(f"{num_blocks} block"),
        kv_block_bytes=1000,
        block_size=16,
        max_model_len=64,
    )
    settings = EngineConfig(model_path="", max_num_seqs=4, max_num_tokens=64, kv_memory_fraction=0.5)

    def choose(measure: Any) -> int:
        return choose_num_blocks(settings, model, lambda: calls.append("step"), measure)

    assert choose(None) == 500 - 100
    assert choose(lambda free_bytes, spare_share: int(free_bytes() * spare_share) // 10) == 500 - 100 - 50
    assert calls.index("1 block") < calls.index("step") < calls.index("max_memory_allocated")

    def run_out(free_bytes: Any, spare_share: float) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ModelLoadError, match="does not fit beside the weights"):
        choose(run_out)


def test_a_control_group_with_less_memory_bounds_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = free_host_bytes()
    assert machine > 1 << 20
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_bytes() > 1 << 20
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("anon 1200\nfile 800\ninactive_file 500\n")
    assert free_host_bytes() == 3500, "files that were read and are not in use make room"


@pytest.mark.parametrize(("membership", "group"), [("0::/a.slice/b\n", "a.slice/b"), ("3:cpu,memory:/x\n", "memory/x")])
def test_the_limits_of_all_groups_that_a_process_is_in_count(tmp_path: Path, membership: str, group: str) -> None:
    is_old = group.startswith("memory")
    limit, usage = ("memory.limit_in_bytes", "memory.usage_in_bytes") if is_old else ("memory.max", "memory.current")
    own = tmp_path / group
    own.mkdir(parents=True)
    for folder, most in ((own, 9000), (own.parent, 5000)):
        (folder / limit).write_text(f"{most}\n")
        (folder / usage).write_text("2000\n")
        (folder / "memory.stat").write_text("inactive_file 500\n")
    assert sorted(memory._cgroup_bytes(tmp_path, membership))[:2] == [3500, 7500]
    assert sorted(memory._cgroup_bytes(tmp_path, ""))[0] == (3500 if is_old else 1 << 62)
