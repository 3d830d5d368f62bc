"""The console's files: what they may hold, whether their colours can be read, and their logic under node."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from producer.gateway.console.page_files import page_files

HERE = Path(__file__).parent
PAGE = HERE.parents[3] / "producer" / "gateway" / "console" / "page"
MIN_NODE = (20, 19)  # tells modules by their content
MAX_LINES = 300

# Text, its grounds, and the ratio that WCAG 2.2 AA asks for: 4.5 of text, 3 of lines and marks.
TEXT_PAIRS = [
    ("text", "ground"),
    ("text", "surface"),
    ("text", "sunken"),
    ("text", "accent-soft"),
    ("muted", "ground"),
    ("muted", "surface"),
    ("muted", "sunken"),
    ("accent", "ground"),
    ("accent", "surface"),
    ("accent", "accent-soft"),
    ("accent-text", "accent"),
    ("good", "good-soft"),
    ("bad", "bad-soft"),
    ("bad", "surface"),
    ("warn", "warn-soft"),
]
MARK_PAIRS = [(mark, "surface") for mark in ("first", "second", "third", "bad", "good", "line-strong", "accent")]


def themes() -> dict[str, dict[str, str]]:
    css = (PAGE / "theme.css").read_text()
    found = re.findall(r"--([a-z-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);", css)
    return {"light": {name: light for name, light, _ in found}, "dark": {name: dark for name, _, dark in found}}


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_contrast_is_measured_as_wcag_does() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") < 4.5


def test_text_and_marks_can_be_read_in_every_theme() -> None:
    for name, colours in themes().items():
        for pairs, least in ((TEXT_PAIRS, 4.5), (MARK_PAIRS, 3.0)):
            for one, other in pairs:
                assert contrast(colours[one], colours[other]) >= least, (name, one, other)


def test_the_page_loads_nothing_from_elsewhere_and_parses_no_text() -> None:
    for path in PAGE.iterdir():
        text = path.read_text()
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not addresses, path.name
        forbidden = (
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|javascript:"
        )
        assert not re.search(forbidden, text), path.name
        assert not re.search(r"<[^>]+\son\w+=|<style|style=", text), path.name


def test_every_file_is_served_and_small_enough_to_be_read() -> None:
    assert set(page_files()) == {path.name for path in PAGE.iterdir()}
    for path in PAGE.iterdir():
        assert len(path.read_text().splitlines()) <= MAX_LINES, path.name


def test_every_module_that_is_imported_is_there() -> None:
    for path in PAGE.glob("*.js"):
        for name in re.findall(r'from "\./([\w.]+)"', path.read_text()):
            assert name in page_files(), (path.name, name)


def test_the_logic_holds_under_node() -> None:
    node = shutil.which("node")
    if node is None or node_version(node) < MIN_NODE:
        pytest.skip("needs node 20.19 or later")
    files = sorted(str(path) for path in HERE.glob("*.test.mjs"))
    done = subprocess.run([node, "--test", *files], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def node_version(node: str) -> tuple[int, ...]:
    text = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in text.strip().removeprefix("v").split(".")[:2])
