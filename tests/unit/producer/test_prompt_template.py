"""Prompts with columns in them."""

import datetime
import decimal

import pytest

from producer.errors import InvalidJobError
from producer.tables.prompt_template import PromptTemplate, UnusableRowError


def render(template: str, /, null_text: str | None = None, **cells: object) -> str:
    return PromptTemplate(template, list(cells), flag="--prompt", null_text=null_text).render(cells)


def test_columns_stand_in_braces() -> None:
    assert render("Summarise: {text}", text="a b") == "Summarise: a b"
    assert render("{a}{b}{a}", a="1", b="2") == "121"


def test_doubled_braces_are_braces() -> None:
    assert render('Answer as {{"city": "…"}}: {text}', text="{x}") == 'Answer as {"city": "…"}: {x}'
    assert render("{{{text}}}", text="x") == "{x}"


def test_a_columns_name_is_taken_as_it_is() -> None:
    cells = {"Review Text": "good", "a.b[0]:>10!r": "odd", "": "nameless"}
    template = PromptTemplate("{Review Text}|{a.b[0]:>10!r}|{}", list(cells), flag="--prompt")
    assert template.render(cells) == "good|odd|nameless"
    assert template.columns == ("Review Text", "a.b[0]:>10!r", "")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (0.1, "0.1"),
        (True, "true"),
        (b"bytes", "bytes"),
        ([1, "zwölf", None], '[1, "zwölf", null]'),
        ({"a": datetime.date(2026, 1, 2)}, '{"a": "2026-01-02"}'),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (decimal.Decimal("1.20"), "1.20"),
    ],
)
def test_cells_of_every_type_are_text(value: object, text: str) -> None:
    assert render("{cell}", cell=value) == text


def test_a_null_cell_makes_its_row_unusable_unless_a_text_stands_for_it() -> None:
    with pytest.raises(UnusableRowError, match=r"null_cell: column 'text' is null; --null TEXT"):
        render("{text}", text=None)
    assert render("<{text}>", null_text="", text=None) == "<>"


def test_bytes_that_are_no_text_make_their_row_unusable() -> None:
    with pytest.raises(UnusableRowError, match="column 'text' is not UTF-8"):
        render("{text}", text=b"\xff")


def test_an_unknown_column_is_named_with_those_that_there_are() -> None:
    with pytest.raises(
        InvalidJobError, match=r"--prompt: there is no column 'txet' \(did you mean 'text'\?\)"
    ) as error:
        render("{txet}", text="", title="")
    assert str(error.value).endswith("the columns are: text, title")
    with pytest.raises(InvalidJobError, match="c18, c19 and 5 more"):
        PromptTemplate("{nothing like it}", [f"c{number}" for number in range(25)], flag="--prompt")


@pytest.mark.parametrize(("text", "place"), [("a { b", 3), ("a } b", 3), ("{a", 1), ("{a{b}}", 1)])
def test_a_brace_alone_is_refused_with_its_place(text: str, place: int) -> None:
    with pytest.raises(InvalidJobError, match=f"at character {place} stands alone"):
        render(text, a="", b="")
