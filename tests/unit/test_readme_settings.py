"""The README's table of settings is the code's: every flag, variable, default and meaning."""

import re
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from producer.gateway.settings import GatewaySettings
from worker.settings import WorkerSettings

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize(("name", "kind"), [("settings", WorkerSettings), ("gateway settings", GatewaySettings)])
def test_the_table_lists_exactly_the_settings_of_the_code(name: str, kind: type[BaseSettings]) -> None:
    found = re.search(rf"<!-- {name} -->\n(.*)<!-- /{name} -->", README.read_text(), re.DOTALL)
    assert found is not None
    assert found.group(1).strip() == settings_table(kind), "paste what settings_table() gives"


def settings_table(kind: type[BaseSettings]) -> str:
    rows = ["| flag | variable | default | meaning |", "|---|---|---|---|"]
    for name, info in kind.model_fields.items():
        default = "" if info.default in (None, "") else f"`{info.default}`"
        meaning = (info.description or "").replace("|", "\\|")
        rows.append(f"| `--{name.replace('_', '-')}` | `PROMPTMILL_{name.upper()}` | {default} | {meaning} |")
    return "\n".join(rows)
