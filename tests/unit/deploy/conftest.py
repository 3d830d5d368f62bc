"""The Kubernetes manifests, as files and as `kubectl kustomize` puts them together."""

import re
import shutil
import subprocess

import pytest
import yaml

from tests.unit.deploy.manifests import KUBERNETES, Document

COMPONENTS = sorted(folder.name for folder in (KUBERNETES / "components").iterdir())
ASSEMBLIES = {
    "base": ["base"],
    "gpu": ["overlays/gpu"],
    "cpu": ["overlays/cpu"],
    "gpu with everything": ["overlays/gpu", *(f"components/{name}" for name in COMPONENTS if name != "redis")],
    "cpu with everything": ["overlays/cpu", *(f"components/{name}" for name in COMPONENTS if name != "redis")],
    "as the README shows": [],
}


@pytest.fixture(scope="session", params=ASSEMBLIES)
def assembled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    """What one would apply."""
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl to put the manifests together")
    folder = tmp_path_factory.mktemp("manifests") / "kubernetes"
    shutil.copytree(KUBERNETES, folder)
    resource, *components = ASSEMBLIES[request.param] or [""]
    kustomization = {"resources": [f"../{resource}"], "components": [f"../{name}" for name in components]}
    (folder / "mine").mkdir()
    (folder / "mine" / "kustomization.yaml").write_text(
        yaml.safe_dump(kustomization) if resource else example_of_the_readme()
    )
    command = ["kubectl", "kustomize", str(folder / "mine")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a warning, as of what kustomize is about to drop"
    return [document for document in yaml.safe_load_all(done.stdout) if document is not None]


def example_of_the_readme() -> str:
    text: str
    [text] = re.findall(r"```yaml\n(namespace: .*?)```", (KUBERNETES.parent / "README.md").read_text(), re.DOTALL)
    return text.replace("../promptmill/deploy/kubernetes/", "../")
