"""The manifests as they would be applied: to the settings, ports, signals and time limits of the code."""

import re

import pytest
from fastapi import APIRouter
from starlette.routing import Route

from engine.config import EngineConfig
from producer.gateway.routes import figures, health
from producer.gateway.server import EXIT_GRACE_SECONDS
from producer.gateway.settings import GatewaySettings
from tests.unit.deploy.manifests import (
    Document,
    container_of,
    environment_of,
    named,
    of_kind,
    pod_of,
    workloads,
)
from worker.leases import INFO_TTL_SECONDS
from worker.settings import WorkerSettings
from worker.stop_signals import MAX_STOP_SECONDS

SECRETS = {
    ("promptmill-redis", "url"): "redis://:PASSWORD@redis:6379/0",
    ("promptmill-s3", "access-key-id"): "a",
    ("promptmill-s3", "secret-access-key"): "b",
    ("promptmill-hub", "token"): "c",
}


def variables(role: str, documents: list[Document]) -> dict[str, str]:
    return environment_of(named(documents, "Deployment", f"promptmill-{role}"), documents, SECRETS)


@pytest.fixture
def worker_settings(assembled: list[Document], monkeypatch: pytest.MonkeyPatch) -> WorkerSettings:
    for name, value in variables("worker", assembled).items():
        monkeypatch.setenv(name, value)
    return WorkerSettings()


@pytest.fixture
def gateway_settings(assembled: list[Document], monkeypatch: pytest.MonkeyPatch) -> GatewaySettings:
    for name, value in variables("gateway", assembled).items():
        monkeypatch.setenv(name, value)
    return GatewaySettings()


def test_every_variable_is_a_setting(assembled: list[Document]) -> None:
    known = {f"PROMPTMILL_{name.upper()}" for kind in (WorkerSettings, GatewaySettings) for name in kind.model_fields}
    for role in ("worker", "gateway"):
        ours = {name for name in variables(role, assembled) if name.startswith("PROMPTMILL_")}
        assert ours and ours <= known, ours - known


def test_the_settings_are_taken(
    assembled: list[Document], worker_settings: WorkerSettings, gateway_settings: GatewaySettings
) -> None:
    limits = container_of(named(assembled, "Deployment", "promptmill-worker"))["resources"]["limits"]
    assert ("nvidia.com/gpu" in limits) == (worker_settings.device == "cuda")
    assert worker_settings.device == "cuda" or worker_settings.num_threads == int(limits["cpu"])
    assert not gateway_settings.is_loopback and not gateway_settings.allow_anonymous
    replicas = named(assembled, "Deployment", "promptmill-gateway")["spec"]["replicas"]
    assert gateway_settings.files.startswith("s3://") or replicas == 1, "gateways share their files"


def test_a_worker_has_the_time_that_its_end_takes(assembled: list[Document], worker_settings: WorkerSettings) -> None:
    seconds = pod_of(named(assembled, "Deployment", "promptmill-worker"))["terminationGracePeriodSeconds"]
    drain_seconds = 0.0
    if worker_settings.drain == "finish":
        assert worker_settings.drain_seconds is not None, "else nothing but SIGKILL ends it"
        drain_seconds = worker_settings.drain_seconds
    assert seconds >= drain_seconds + 2 * MAX_STOP_SECONDS


def test_a_gateway_has_the_time_that_its_end_takes(
    assembled: list[Document], gateway_settings: GatewaySettings
) -> None:
    gateway = named(assembled, "Deployment", "promptmill-gateway")
    pause = container_of(gateway)["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = pause + gateway_settings.http_drain_seconds + EXIT_GRACE_SECONDS
    assert pod_of(gateway)["terminationGracePeriodSeconds"] >= needed


def test_a_worker_is_ended_only_when_redis_has_long_forgotten_it(assembled: list[Document]) -> None:
    worker = named(assembled, "Deployment", "promptmill-worker")
    container = container_of(worker)
    liveness, startup = container["livenessProbe"], container["startupProbe"]
    assert liveness["periodSeconds"] * (liveness["failureThreshold"] - 1) > 4 * INFO_TTL_SECONDS
    assert worker["spec"]["progressDeadlineSeconds"] > startup["periodSeconds"] * startup["failureThreshold"]


def test_ports_and_paths_are_those_that_are_served(
    assembled: list[Document], gateway_settings: GatewaySettings
) -> None:
    container = container_of(named(assembled, "Deployment", "promptmill-gateway"))
    [port] = container["ports"]
    assert port["containerPort"] == gateway_settings.http_port
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    [service] = named(assembled, "Service", "promptmill-gateway")["spec"]["ports"]
    assert {service["targetPort"], *(probe["port"] for probe in probes)} == {port["name"]}
    assert {probe["path"] for probe in probes} <= paths(health.router)
    for monitor in of_kind(assembled, "ServiceMonitor"):
        [endpoint] = monitor["spec"]["endpoints"]
        assert endpoint["port"] == service["name"] and endpoint["path"] in paths(figures.router)


def paths(router: APIRouter) -> set[str]:
    return {route.path for route in router.routes if isinstance(route, Route)}


def test_nothing_runs_as_root_or_writes_where_no_volume_is(assembled: list[Document]) -> None:
    for workload in workloads(assembled):
        pod, container = pod_of(workload), container_of(workload)
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
        assert pod["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        volumes = [*pod.get("volumes", []), *(claim["metadata"] for claim in templates(workload))]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in volumes}
        claims = {claim["metadata"]["name"] for claim in of_kind(assembled, "PersistentVolumeClaim")}
        needed = {
            volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume
        }
        assert needed <= claims


def templates(workload: Document) -> list[Document]:
    found: list[Document] = workload["spec"].get("volumeClaimTemplates", [])
    return found


def test_selectors_meet_the_pods_that_they_mean(assembled: list[Document]) -> None:
    pods = {one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"] for one in workloads(assembled)}
    for document in assembled:
        spec = document.get("spec", {})
        selector = spec.get("selector", {})
        labels = selector.get("matchLabels", selector)
        if document["kind"] == "ServiceMonitor":
            service = named(assembled, "Service", document["metadata"]["name"])
            assert labels.items() <= service["metadata"]["labels"].items()
        elif labels:
            met = [name for name, given in pods.items() if labels.items() <= given.items()]
            assert met == [document["metadata"]["name"]], document["kind"]


def test_redis_has_memory_left_beside_its_limit(assembled: list[Document]) -> None:
    for redis in of_kind(assembled, "StatefulSet"):
        container = container_of(redis)
        arguments = container["args"]
        [gigabytes] = re.findall(r"^(\d+)gb$", arguments[arguments.index("--maxmemory") + 1])
        [limit] = re.findall(r"^(\d+)Gi$", container["resources"]["limits"]["memory"])
        assert int(gigabytes) < int(limit)


def test_workers_are_scaled_by_as_many_jobs_as_one_takes(assembled: list[Document]) -> None:
    for scaled in of_kind(assembled, "ScaledObject"):
        target = named(assembled, "Deployment", scaled["spec"]["scaleTargetRef"]["name"])
        assert "replicas" not in target["spec"], "an apply would undo what the autoscaler has done"
        [trigger] = scaled["spec"]["triggers"]
        assert int(trigger["metadata"]["threshold"]) == EngineConfig(model_path="m").max_num_seqs


@pytest.mark.parametrize("version", ["1.30.0", "1.37.0"])
def test_kubernetes_own_schemas_take_all_of_it(assembled: list[Document], version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install -e '.[schemas]'")
    of_others = {"ScaledObject", "ServiceMonitor"}  # kinds that operators bring
    for document in assembled:
        if document["kind"] not in of_others:
            validator.validate(document, version, strict=True)
