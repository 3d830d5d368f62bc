"""deploy/alerts.yml speaks of figures, labels and states that the gateway has."""

import re
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from producer.gateway.metrics import GatewayMetrics
from producer.workers import QueueStatus

RULES = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "alerts.yml").read_text())["groups"][0]["rules"]
WRITTEN_BY_PROMETHEUS = {"le", "alertname"}


def labels_by_sample() -> dict[str, dict[str, set[str]]]:
    """Of a gateway that has served: each sample's labels, and the values they had."""
    metrics = GatewayMetrics()
    metrics.observe_request("POST", "/v1/completions", 500, 0.1)
    timer = metrics.token_timer("m")
    for _ in range(2):
        timer.take(1)
    registries = {"started": 0, "failed": 1}
    queue = QueueStatus(name="promptmill", depth=1, oldest_seconds=1.0, registries=registries)
    text = metrics.render([queue], [], {"completed": 1}, is_redis_up=True).decode()
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for label, value in sample.labels.items():
                found.setdefault(sample.name, {}).setdefault(label, set()).add(value)
            found.setdefault(sample.name, {})
    return found


def test_every_alert_is_about_figures_and_labels_that_there_are() -> None:
    known = labels_by_sample()
    for rule in RULES:
        named = re.findall(r"\b(promptmill_\w+)(?:\{([^}]*)\})?", rule["expr"])
        assert named, rule["alert"]
        labels = set(WRITTEN_BY_PROMETHEUS)
        for sample, selectors in named:
            assert sample in known, f"{rule['alert']} is about {sample}"
            labels |= set(known[sample])
            for label, operator, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', selectors):
                assert label in known[sample], f"{rule['alert']}: {sample} has no label {label}"
                assert operator != "=" or value in known[sample][label], f"{rule['alert']}: {label} is never {value}"
        shown = re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])
        grouped = re.findall(r"\bby \(([^)]*)\)", rule["expr"])
        kept = {label.strip() for group in grouped for label in group.split(",")}
        assert set(shown) <= kept & labels, f"{rule['alert']} shows a label that its expression drops"
