"""What deploy/ has for those who watch: alerts, dashboard and autoscaling speak of figures that gateways export."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.exported_figures import ExportedFigures
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.gateways import RunningGateway
from tests.fakes.waiting import wait_until

DEPLOY = Path(__file__).parents[3] / "deploy"
RULES = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
README = (DEPLOY / "README.md").read_text()
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "promptmill.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SCALING = yaml.safe_load((DEPLOY / "kubernetes/components/autoscaling/scaled-object.yaml").read_text())
# As Grafana puts them in where nothing is chosen.
VARIABLES = {"$__rate_interval": "5m", "$queue": ".*", "$model": ".*"}


def text_of(gateway: RunningGateway) -> str:
    return httpx.get(f"{gateway.url}/metrics").text


@pytest.fixture
def figures(gateway: RunningGateway, client: openai.OpenAI, echoing: FakeWorker) -> ExportedFigures:
    """Of a gateway that has streamed an answer and seen its job end."""
    with client.completions.create(model="fake", prompt="one two three", stream=True) as stream:
        assert len(list(stream)) > 2
    wait_until(lambda: 'promptmill_jobs_ended_total{outcome="finished",queue="promptmill"} 1.0' in text_of(gateway))
    return ExportedFigures(text_of(gateway))


def test_the_figures_that_operators_read_of_are_those_that_there_are(
    gateway: RunningGateway, figures: ExportedFigures
) -> None:
    documented = re.findall(r"^\| `(promptmill_\w+)` \| (\w+) \| (.*?) ?\| (.*) \|$", README, re.MULTILINE)
    exported = []
    for family in text_string_to_metric_families(text_of(gateway)):
        if not family.name.endswith("_created"):
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            name = f"{family.name}_total" if family.type == "counter" else family.name
            exported.append((name, family.type, labels, family.documentation.partition(" Each gateway")[0]))
    assert [(name, kind, text) for name, kind, _, text in documented] == [
        (name, kind, text) for name, kind, _, text in exported
    ]
    for (name, _, shown, _), (_, _, labels, _) in zip(documented, exported, strict=True):
        assert not labels or shown.split(", ") == sorted(labels), name


def queries() -> Iterator[tuple[str, str, str]]:
    """Of the dashboard: title, query and legend."""
    for panel in PANELS:
        for target in panel["targets"]:
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            yield panel["title"], query, target["legendFormat"]


def test_every_alert_is_about_figures_and_labels_that_there_are(figures: ExportedFigures) -> None:
    for rule in RULES:
        kept = figures.result_labels(rule["expr"])
        shown = re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])
        assert set(shown) <= kept, f"{rule['alert']} shows a label that its expression drops"


def test_every_panel_is_about_figures_and_labels_that_there_are(figures: ExportedFigures) -> None:
    for title, query, legend in queries():
        kept = figures.result_labels(query)
        shown = re.findall(r"\{\{(\w+)\}\}", legend)
        assert set(shown) == kept, f"{title}: series differ by {sorted(kept)}, and the legend shows {shown}"


def test_what_a_dashboard_is_narrowed_by_are_labels_that_there_are(figures: ExportedFigures) -> None:
    source, *variables = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"]) == ("datasource", "datasource")
    for variable in variables:
        [(metric, label)] = re.findall(r"^label_values\((\w+), (\w+)\)$", variable["query"]["query"])
        assert label in figures.labels_of(metric), variable["name"]
    assert {f"${variable['name']}" for variable in variables} == {name for name in VARIABLES if "__" not in name}
    assert not re.search(r"\$(?!__rate_interval|queue|model|\{datasource\})", json.dumps(DASHBOARD["panels"]))


def test_panels_have_a_place_of_their_own_and_the_source_that_was_chosen() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, f"{panel['title']} covers another panel"
        taken |= cells
    for panel in PANELS:
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources), panel["title"]


def test_workers_are_scaled_by_a_figure_that_there_is(figures: ExportedFigures) -> None:
    [trigger] = SCALING["spec"]["triggers"]
    assert figures.result_labels(trigger["metadata"]["query"]) == set(), "one number"
