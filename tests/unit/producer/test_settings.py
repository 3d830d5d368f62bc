"""The settings of everything that talks to the queues: a Redis URL is wrong before anything connects."""

import pytest

from producer.errors import SettingsError
from producer.gateway.settings import GatewaySettings
from producer.settings import ProducerSettings, load_settings, redact_url, warn_of_misspelt_variables
from worker.serve import ServeSettings
from worker.settings import WorkerSettings


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://localhost:6380/",
        "rediss://me:s%40cret%2F%23@[::1]:6379/15?ssl_cert_reqs=none",
        "unix://:secret@/run/redis.sock?db=4",
        "redis+sentinel://one,two:1234/mill/2",
    ],
)
def test_a_redis_url_that_can_be_used_is_taken(url: str) -> None:
    assert load_settings(ProducerSettings, {"redis_url": url}).redis_url == url


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_URL", "QUEUE", "S3_ENDPOINT_URL", "NUM_THREADS", "DRAIN"):
        monkeypatch.setenv(f"PROMPTMILL_{name}", "")
    assert load_settings(WorkerSettings) == WorkerSettings()
    assert "redis_url" not in load_settings(WorkerSettings).model_fields_set
    with pytest.raises(SettingsError, match="--s3-endpoint-url"):
        load_settings(ProducerSettings, {"s3_endpoint_url": ""})


def test_a_variable_that_is_no_setting_and_looks_like_one_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("MAX_NUM_SEQ", "REDIS_SERVICE_HOST", "QUEUE"):
        monkeypatch.setenv(f"PROMPTMILL_{name}", "8")
    warn_of_misspelt_variables(WorkerSettings)
    (told,) = caplog.messages
    assert "PROMPTMILL_MAX_NUM_SEQ is not a setting here; did you mean PROMPTMILL_MAX_NUM_SEQS?" in told


@pytest.mark.parametrize("kind", [WorkerSettings, GatewaySettings])
def test_the_settings_of_another_command_are_no_misspelt_ones(
    kind: type[ProducerSettings], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for other in (ServeSettings, GatewaySettings):
        for name in other.model_fields:
            monkeypatch.setenv(f"PROMPTMILL_{name.upper()}", "8")
    warn_of_misspelt_variables(kind)
    assert not caplog.messages


def test_a_choice_is_taken_in_any_case_from_a_variable_and_from_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOG_LEVEL": "INFO", "LOG_FORMAT": "Json", "DRAIN": "FINISH", "DEVICE": "CUDA:1"}.items():
        monkeypatch.setenv(f"PROMPTMILL_{name}", value)
    gateway = load_settings(GatewaySettings, {"log_level": "WARNING"})
    assert (gateway.log_level, gateway.log_format) == ("warning", "json")
    worker = load_settings(WorkerSettings, {"dtype": "Float32", "tool_parser": "HERMES", "attention": "Torch"})
    assert (worker.log_level, worker.drain, worker.device) == ("info", "finish", "cuda:1")
    assert (worker.dtype, worker.tool_parser, worker.attention) == ("float32", "hermes", "torch")
    with pytest.raises(SettingsError, match=r"--log-level .*'debug', 'info', 'warning' or 'error'; got 'LOUD'"):
        load_settings(GatewaySettings, {"log_level": "LOUD"})


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:6379", "must begin with redis://"),
        ("redis://localhost:port", "Port could not be cast"),
        ("redis://localhost/queue", "only a database number may follow"),
        ("redis://localhost/1/2", "only a database number may follow"),
        ("redis://localhost?db=one", "db"),
        ("redis://localhost?fast=1", "option that is not supported"),
        ("redis://:a#secret@localhost", "# as %23"),
        ("redis://:a/secret@localhost", "/ as %2F"),
        ("redis://:p@ss/w@secret@localhost", "/ as %2F"),
        ("unix://", "must name the socket"),
        ("redis+sentinel://one", "SERVICE"),
    ],
)
def test_a_redis_url_that_redis_py_would_misread_is_refused_without_its_password(url: str, words: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load_settings(ProducerSettings, {"redis_url": url})
    assert words in str(refused.value) and str(refused.value).startswith("--redis-url (PROMPTMILL_REDIS_URL): ")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379", "redis://localhost:6379"),
        ("redis://:secret@host:1/0", "redis://:***@host:1/0"),
        ("rediss://me:s%40cret@host", "rediss://me:***@host"),
        ("redis://:s@cret/1@host", "redis://:***@host"),
        ("unix:///tmp/redis.sock", "unix:///tmp/redis.sock"),
        ("redis://secret@host/1", "redis://***@host/1"),
        ("redis://host/1?password=s%40cret&protocol=2", "redis://host/1?password=***&protocol=2"),
        ("redis://host?Pasword=secret", "redis://host?Pasword=***"),
        ("rediss://me:secret@host?ssl_password=secret", "rediss://me:***@host?ssl_password=***"),
        ("redis+sentinel://me:s@cret@a:1,b:2/main", "redis+sentinel://me:***@a:1,b:2/main"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert redact_url(url) == shown


def test_a_value_that_fits_no_pattern_is_told_in_words_too() -> None:
    with pytest.raises(SettingsError) as refused:
        load_settings(WorkerSettings, {"device": "tpu"})
    assert str(refused.value).endswith("(Device: auto, cpu, cuda or cuda:N); got 'tpu'")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_num_seqs", "0", "--max-num-seqs (PROMPTMILL_MAX_NUM_SEQS): must be at least 1; got '0'"),
        ("max_num_seqs", "many", "--max-num-seqs (PROMPTMILL_MAX_NUM_SEQS): must be a whole number; got 'many'"),
        ("lease_seconds", "long", "--lease-seconds (PROMPTMILL_LEASE_SECONDS): must be a number; got 'long'"),
        ("dtype", "float8", "must be 'auto', 'float32', 'bfloat16' or 'float16'; got 'float8'"),
        ("prefix_caching", "maybe", "must be true or false; got 'maybe'"),
    ],
)
def test_a_setting_that_is_wrong_is_told_as_a_field_of_a_request_is(name: str, value: str, words: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(WorkerSettings, {name: value})
    assert words in str(error.value)
