"""The tables in docs/ are the code's: every setting with its default and meaning, every error of the client."""

import re
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

import producer
from producer.gateway.settings import GatewaySettings
from worker.settings import WorkerSettings

DOCS = Path(__file__).parents[2] / "docs"
SHARED = set(WorkerSettings.model_fields)  # the gateway's table does not repeat them


@pytest.mark.parametrize(
    ("name", "kind", "left_out"),
    [("settings", WorkerSettings, set()), ("gateway settings", GatewaySettings, SHARED)],
)
def test_the_table_lists_exactly_the_settings_of_the_code(
    name: str, kind: type[BaseSettings], left_out: set[str]
) -> None:
    found = re.search(rf"<!-- {name} -->\n(.*)<!-- /{name} -->", (DOCS / "settings.md").read_text(), re.DOTALL)
    assert found is not None
    assert found.group(1).strip() == settings_table(kind, left_out), "paste what settings_table() gives"


def test_the_first_five_settings_are_the_gateways_as_well() -> None:
    names = list(WorkerSettings.model_fields)
    assert SHARED & set(GatewaySettings.model_fields) == set(names[:5])


def test_the_clients_page_lists_every_error_that_callers_can_name() -> None:
    listed = re.findall(r"^\| `(\w+Error)` \|", (DOCS / "client.md").read_text(), re.MULTILINE)
    named = {name for name in producer.__all__ if name.endswith("Error")} - {"PromptmillError"}
    assert len(listed) == len(named) and set(listed) == named


def settings_table(kind: type[BaseSettings], left_out: set[str]) -> str:
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for name, info in kind.model_fields.items():
        default = "" if info.default in (None, "") else f"`{info.default}`"
        meaning = (info.description or "").replace("|", "\\|")
        if name not in left_out:
            rows.append(f"| `--{name.replace('_', '-')}` | {default} | {meaning} |")
    return "\n".join(rows)
