"""The worker's settings: sources, rules, and the engine's configuration made of them."""

import pytest

from engine.config import EngineConfig
from producer.errors import SettingsError
from producer.settings import load_settings
from worker.settings import WorkerSettings


def test_defaults_serve_the_demo_model_from_the_default_queues() -> None:
    settings = load_settings(WorkerSettings)
    assert settings.model == "smollm2-135m"
    assert settings.served_model_names == ["smollm2-135m"]
    assert settings.queue_names == ["promptmill:high", "promptmill", "promptmill:low"]
    assert settings.engine_config == EngineConfig(model_path="smollm2-135m")


def test_every_setting_has_a_description() -> None:
    assert [name for name, info in WorkerSettings.model_fields.items() if not info.description] == []


def test_lists_are_comma_separated() -> None:
    settings = load_settings(WorkerSettings, {"queues": "a, b:high,", "model_names": "x,y", "callbacks": "m.f,m.g"})
    assert settings.queue_names == ["a", "b:high"]
    assert settings.served_model_names == ["x", "y"]
    assert settings.allowed_callbacks == {"m.f", "m.g"}


def test_the_environment_is_read_and_a_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTMILL_MAX_NUM_SEQS", "8")
    monkeypatch.setenv("PROMPTMILL_DEVICE", "cuda:1")
    settings = load_settings(WorkerSettings, {"device": "cpu"})
    assert (settings.engine_config.max_num_seqs, settings.engine_config.device) == (8, "cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "tpu"),
        ("dtype", "int3"),
        ("quantize", "int3"),
        ("kv_cache_dtype", "int3"),
        ("max_num_seqs", "0"),
        ("max_num_tokens", "many"),
        ("kv_memory_fraction", "1.5"),
        ("num_kv_blocks", "0"),
        ("results", "ftp://x"),
        ("results", "s3://"),
        ("redis_url", "http://x"),
        ("queues", "a b"),
        ("queues", ","),
        ("callbacks", "m.f,os.system()"),
        ("webhooks", "https://a.example,b.example/hook"),
        ("lease_seconds", "0"),
        ("drain", "never"),
        ("log_level", "loud"),
        ("worker_name", "a b"),
        ("s3_endpoint_url", "minio:9000"),
    ],
)
def test_a_wrong_value_names_its_flag_and_its_variable(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(WorkerSettings, {name: value})
    assert f"--{name.replace('_', '-')} (PROMPTMILL_{name.upper()})" in str(caught.value)


def test_a_step_must_have_room_for_every_sequence() -> None:
    with pytest.raises(SettingsError, match=r"--max-num-tokens .*at least --max-num-seqs"):
        load_settings(WorkerSettings, {"max_num_tokens": 100, "max_num_seqs": 200})
    assert load_settings(WorkerSettings, {"max_num_seqs": 10_000}).engine_config.max_num_tokens is None
