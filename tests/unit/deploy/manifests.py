"""Questions that tests ask Kubernetes manifests."""

from pathlib import Path
from typing import Any

KUBERNETES = Path(__file__).parents[3] / "deploy" / "kubernetes"

Document = dict[str, Any]


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def named(documents: list[Document], kind: str, name: str) -> Document:
    [found] = [document for document in of_kind(documents, kind) if document["metadata"]["name"] == name]
    return found


def workloads(documents: list[Document]) -> list[Document]:
    return of_kind(documents, "Deployment", "StatefulSet")


def pod_of(workload: Document) -> Document:
    pod: Document = workload["spec"]["template"]["spec"]
    return pod


def container_of(workload: Document) -> Document:
    [container] = pod_of(workload)["containers"]
    assert isinstance(container, dict)
    return container


def secret_references(documents: list[Document]) -> set[tuple[str, str]]:
    """Name and key of each."""
    found = set()
    for workload in workloads(documents):
        for container in pod_of(workload).get("containers", []):
            given = [entry.get("valueFrom", {}) for entry in container.get("env", [])]
            references = [source["secretKeyRef"] for source in given if "secretKeyRef" in source]
            found |= {(reference["name"], reference["key"]) for reference in references}
    for monitor in of_kind(documents, "ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            credentials = endpoint["authorization"]["credentials"]
            found.add((credentials["name"], credentials["key"]))
    return found


def environment_of(
    workload: Document, documents: list[Document], secrets: dict[tuple[str, str], str]
) -> dict[str, str]:
    """The container's variables, with values for what the cluster fills in."""
    container = container_of(workload)
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= named(documents, "ConfigMap", source["configMapRef"]["name"])["data"]
    for entry in container.get("env", []):
        given = entry.get("valueFrom", {})
        if "value" in entry:
            found[entry["name"]] = entry["value"]
        elif "secretKeyRef" in given:
            found[entry["name"]] = secrets[given["secretKeyRef"]["name"], given["secretKeyRef"]["key"]]
        else:
            resource = given["resourceFieldRef"]["resource"]
            kind, name = resource.split(".")
            found[entry["name"]] = container["resources"][kind][name]
    return found
