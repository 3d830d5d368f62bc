"""docker-compose.yml as a container engine would read it: promises that can be checked without one."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from producer.gateway.settings import GatewaySettings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
WORKERS = [name for name in SERVICES if name.startswith("worker")]


def test_every_service_restarts_and_has_a_health_check() -> None:
    for name, service in SERVICES.items():
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"], name


def test_redis_appends_every_write_and_evicts_nothing() -> None:
    command = " ".join(SERVICES["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


def test_each_gpu_worker_reserves_a_gpu_of_its_own_and_the_cpu_worker_none() -> None:
    devices = {}
    for name in WORKERS:
        reserved = SERVICES[name].get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        devices[name] = [device_id for device in reserved for device_id in device["device_ids"]]
    assert devices == {"worker": ["0"], "worker-gpu1": ["1"], "worker-cpu": []}


def test_a_worker_starts_only_behind_a_healthy_redis_and_object_store() -> None:
    for name in WORKERS:
        needs = {service: needed["condition"] for service, needed in SERVICES[name]["depends_on"].items()}
        assert needs == {"redis": "service_healthy", "objectstore": "service_healthy"}


def test_the_default_profile_is_one_of_the_workers_profiles() -> None:
    default = dict(line.split("=") for line in (ROOT / ".env").read_text().split() if "=" in line)["COMPOSE_PROFILES"]
    assert default in {profile for name in WORKERS for profile in SERVICES[name]["profiles"]}


def test_the_gateway_needs_redis_alone_and_has_time_to_drain() -> None:
    gateway = SERVICES["gateway"]
    assert list(gateway["depends_on"]) == ["redis"] and "profiles" not in gateway
    drain_seconds = GatewaySettings.model_fields["http_drain_seconds"].default
    assert int(gateway["stop_grace_period"].removesuffix("s")) > drain_seconds
    assert gateway["ports"][0].endswith(f":{GatewaySettings.model_fields['http_port'].default}")


def test_the_gateways_files_lie_in_a_volume_at_the_place_that_its_image_names() -> None:
    [volume] = SERVICES["gateway"]["volumes"]
    dockerfile = (ROOT / SERVICES["gateway"]["build"]["dockerfile"]).read_text()
    folder = volume.removeprefix("files:")
    assert f"ENV PROMPTMILL_FILES={folder}\n" in dockerfile and f"chown promptmill {folder}\n" in dockerfile


def test_ports_are_published_on_loopback_alone() -> None:
    for service in SERVICES.values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")


def test_every_volume_that_is_used_is_declared() -> None:
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert used == set(COMPOSE["volumes"])


@pytest.mark.parametrize("service", ["worker", "gateway"])
def test_the_dockerfile_copies_only_what_exists_and_what_dockerignore_lets_through(service: str) -> None:
    dockerfile = (ROOT / SERVICES[service]["build"]["dockerfile"]).read_text()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source in allowed, source
