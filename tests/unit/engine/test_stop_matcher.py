"""Stop strings in text that arrives in pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.stop_matcher import StopMatcher

_few_letters = st.text(alphabet="abc", max_size=40)
_stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple)


def feed(stop: tuple[str, ...], pieces: list[str]) -> tuple[list[str], StopMatcher]:
    matcher = StopMatcher(stop)
    return [matcher.push(piece) for piece in pieces], matcher


def text_before_stop(text: str, stop: tuple[str, ...]) -> str | None:
    """Brute force: the first place where a stop string ends, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            return text[: end - max(map(len, ending))]
    return None


def cut(text: str, lengths: list[int]) -> list[str]:
    pieces, start = [], 0
    for length in lengths:
        pieces.append(text[start : start + length])
        start += length
    return [*pieces, text[start:]]


@given(text=_few_letters, stop=_stops, lengths=st.lists(st.integers(0, 4), max_size=20))
def test_the_released_text_is_what_precedes_the_first_stop_string_however_it_is_cut(
    text: str, stop: tuple[str, ...], lengths: list[int]
) -> None:
    released, matcher = feed(stop, cut(text, lengths))
    expected = text_before_stop(text, stop)
    assert matcher.is_matched == (expected is not None)
    assert "".join(released) + matcher.flush() == (text if expected is None else expected)


@given(text=_few_letters, stop=_stops)
def test_no_more_is_held_back_than_could_become_a_stop_string(text: str, stop: tuple[str, ...]) -> None:
    released, matcher = feed(stop, list(text))
    if not matcher.is_matched:
        held = text[len("".join(released)) :]
        beginnings = [
            text[-length:] for string in stop for length in range(1, len(string)) if text.endswith(string[:length])
        ]
        assert held == max(beginnings, key=len, default="")


def test_a_partial_stop_string_is_never_released() -> None:
    released, matcher = feed(("</end>",), ["all </", "en", "d", ">", " more"])
    assert released == ["all ", "", "", "", ""]
    assert matcher.is_matched
    assert matcher.flush() == ""


def test_text_held_back_is_released_when_it_turns_out_otherwise() -> None:
    released, matcher = feed(("STOP",), ["a ST", "ST", "OR"])
    assert released == ["a ", "ST", "STOR"]
    assert not matcher.is_matched


def test_flush_releases_what_is_held_at_the_end() -> None:
    released, matcher = feed(("\n\nUser:",), ["bye\n", "\nUs"])
    assert released == ["bye", ""]
    assert matcher.flush() == "\n\nUs"


@pytest.mark.parametrize(
    ("stop", "text", "before"),
    [
        (("world", "ld"), "hello world", "hello "),  # both end together: the longer
        (("lo wor", "world"), "hello world", "hel"),  # the one completed first
        (("end", "the end"), "at the end.", "at "),
        (("é",), "cafe\u0301 é", "cafe\u0301 "),  # no normalisation: the text as it is
        (("👩‍👩‍👧",), "a👩‍👩‍👦👩‍👩‍👧b", "a👩‍👩‍👦"),
    ],
)
def test_of_several_stop_strings_the_one_completed_first_counts(stop: tuple[str, ...], text: str, before: str) -> None:
    assert feed(stop, [text])[0] == [before]
    assert "".join(feed(stop, list(text))[0]) == before


def test_a_long_repetitive_stop_string_costs_linear_time() -> None:
    automaton_steps = 0
    matcher = StopMatcher(("a" * 1000 + "b",))
    original = matcher._automaton.edges

    class CountingEdges(list):  # type: ignore[type-arg]
        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            nonlocal automaton_steps
            automaton_steps += 1
            return super().__getitem__(index)

    matcher._automaton.edges = CountingEdges(original)
    try:
        for _ in range(50):
            matcher.push("a" * 999 + "c")
    finally:
        matcher._automaton.edges = original
    assert automaton_steps <= 3 * 50 * 1000


def test_a_match_that_may_not_end_is_text_and_the_next_one_counts() -> None:
    matcher = StopMatcher(("ab", "abc"))
    assert matcher.push("xab", may_end=False) == "x" and not matcher.is_matched
    assert matcher.push("d") == "abd"
    assert matcher.push("ab") == "" and matcher.is_matched


def test_a_stop_string_completed_by_later_text_counts_where_it_began_early() -> None:
    matcher = StopMatcher(("aba",))
    assert matcher.push("xaba", may_end=False) == "x"
    assert matcher.push("ba") == "ab" and matcher.is_matched
