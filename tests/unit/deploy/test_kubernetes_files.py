"""deploy/kubernetes as it lies there: the files belong together; images, commands and secrets that they name exist."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from producer import cli
from tests.unit.deploy.manifests import KUBERNETES, container_of, secret_references, workloads

ROOT = Path(__file__).parents[3]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCUMENTS = {
    path.relative_to(KUBERNETES).as_posix(): list(yaml.safe_load_all(path.read_text()))
    for path in sorted(KUBERNETES.rglob("*.yaml"))
}
ALL = [document for documents in DOCUMENTS.values() for document in documents]
SECRETS = DOCUMENTS["secrets.example.yaml"]
BASE = DOCUMENTS["base/worker.yaml"] + DOCUMENTS["base/gateway.yaml"]


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name.endswith("kustomization.yaml")])
def test_a_kustomization_names_every_file_beside_it(name: str) -> None:
    [kustomization] = DOCUMENTS[name]
    patches = [patch["path"] for patch in kustomization.get("patches", []) if "path" in patch]
    used = {part for part in [*kustomization.get("resources", []), *patches] if "/" not in part}
    folder = KUBERNETES / Path(name).parent
    assert used == {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    for part in [*kustomization.get("resources", []), *kustomization.get("components", [])]:
        assert (folder / part).exists(), part


def test_images_are_those_that_compose_builds_and_runs() -> None:
    services = COMPOSE["services"]
    images = {document["metadata"]["name"]: container_of(document)["image"] for document in workloads(BASE)}
    assert images == {
        "promptmill-worker": services["worker"]["image"],
        "promptmill-gateway": services["gateway"]["image"],
    }
    [redis] = workloads(DOCUMENTS["components/redis/redis.yaml"])
    assert container_of(redis)["image"] == services["redis"]["image"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {image.partition(":")[2] for image in images.values()} == {version}


def test_redis_is_told_what_compose_tells_it() -> None:
    [redis] = workloads(DOCUMENTS["components/redis/redis.yaml"])
    arguments = " ".join(container_of(redis)["args"])
    assert arguments.startswith(" ".join(COMPOSE["services"]["redis"]["command"]))


@pytest.mark.parametrize("document", workloads(BASE), ids=lambda document: document["metadata"]["name"])
def test_commands_and_flags_are_those_of_the_command_line(document: dict[str, Any]) -> None:
    container = container_of(document)
    scripts = [shlex.join(container["command"])]
    probes = [container.get(f"{kind}Probe", {}) for kind in ("startup", "readiness", "liveness")]
    scripts += [probe["exec"]["command"][2] for probe in probes if "exec" in probe]
    for script in scripts:
        [(name, flags)] = re.findall(r"promptmill (\w+)((?: --?[\w-]+(?: \"[^\"]*\")?)*)", script)
        command = cli.main.get_command(click.Context(cli.main), name)
        assert command is not None, script
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", flags)) <= known, script


def test_the_example_has_exactly_the_secrets_that_the_manifests_name() -> None:
    given = {(secret["metadata"]["name"], key) for secret in SECRETS for key in secret["stringData"]}
    assert secret_references(ALL) == given


def test_the_example_is_no_secret_and_its_url_has_the_password_of_its_redis() -> None:
    [redis] = [secret["stringData"] for secret in SECRETS if secret["metadata"]["name"] == "promptmill-redis"]
    assert redis["password"] == "PASSWORD" and f":{redis['password']}@" in redis["url"]
    [service] = [one for one in DOCUMENTS["components/redis/redis.yaml"] if one["kind"] == "Service"]
    assert f"@{service['metadata']['name']}:{service['spec']['ports'][0]['port']}/" in redis["url"]


def test_users_and_folders_are_those_of_the_images() -> None:
    for document in workloads(BASE):
        role = document["metadata"]["name"].removeprefix("promptmill-")
        dockerfile = (ROOT / "deploy" / f"{role}.Dockerfile").read_text()
        assert f"--uid {document['spec']['template']['spec']['securityContext']['runAsUser']} " in dockerfile
    [worker] = workloads(DOCUMENTS["base/worker.yaml"])
    places = {mount["name"]: mount["mountPath"] for mount in container_of(worker)["volumeMounts"]}
    assert f"HOME={places['cache']} " in (ROOT / "deploy/worker.Dockerfile").read_text()
    [gateway] = DOCUMENTS["overlays/cpu/gateway.yaml"]
    [files] = container_of(gateway)["volumeMounts"]
    assert f"ENV PROMPTMILL_FILES={files['mountPath']}\n" in (ROOT / "deploy/gateway.Dockerfile").read_text()


def test_the_readmes_command_makes_a_prometheus_rule_of_the_alerts() -> None:
    readme = (ROOT / "deploy/README.md").read_text()
    [script] = re.findall(r"```sh\n(\{ printf .*?) \| kubectl apply [^\n]*\n```", readme, re.DOTALL)
    made = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rule = yaml.safe_load(made)
    assert (rule["apiVersion"], rule["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())


def test_the_workers_image_makes_keys_though_it_has_nothing_of_the_gateways() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    kinds = {"client": project["dependencies"], **project["optional-dependencies"]}
    names = {kind: {re.split(r"[^\w-]", line)[0] for line in kinds[kind]} for kind in ("client", "worker", "gateway")}
    missing = sorted(name.replace("-", "_") for name in names["gateway"] - names["worker"] - names["client"])
    assert {"fastapi", "prometheus_client", "uvicorn"} <= set(missing)
    program = f"import sys; sys.modules.update(dict.fromkeys({missing})); from producer.cli import main; main()"
    command = [sys.executable, "-c", program, "keys", "add", "--help"]
    assert "Make a key" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
