"""Which of a choice's tokens are its thought's: told alike, however the tokens and their text come."""

import pytest

from worker.parsing.output_parser import OutputParser
from worker.parsing.reasoning_parser import ReasoningParser
from worker.parsing.thought_tokens import ThoughtTokens


def count(tokens: list[str], *, begins_inside: bool = False, num_at_a_time: int = 1, num_late: int = 0) -> int:
    """`num_late`: characters of the text that come one output later, as if they might begin a stop string."""
    parser = OutputParser(
        ReasoningParser(begins_inside=begins_inside),
        None,
        ThoughtTokens({at: token.encode() for at, token in enumerate(tokens)}),
    )
    num_tokens, held = 0, ""
    for first in range(0, len(tokens), num_at_a_time):
        token_ids = list(range(len(tokens)))[first : first + num_at_a_time]
        text = held + "".join(tokens[at] for at in token_ids)
        held = text[max(0, len(text) - num_late) :] if num_late else ""
        num_tokens += parser.read(text.removesuffix(held), token_ids=token_ids).num_reasoning_tokens
    return num_tokens + parser.read(held, "stop").num_reasoning_tokens


@pytest.mark.parametrize(
    ("tokens", "begins_inside", "expected"),
    [
        (["<think>", "\n", "So", ".", "</think>", "\n\n", "Paris"], False, 5),
        (["So", ".", "</think>", "Paris"], True, 3),
        (["\n", "<th", "ink>", "So", "</", "thi", "nk>Pa", "ris"], False, 7),
        (["<think>", "\n\n", "</think>", "Paris"], False, 3),
        (["<think>", "So", "</think", ">", "Paris"], False, 4),
        (["<think>", "cut", " off", ""], False, 4),
        (["Paris", "</think>", "<think>", "</think>"], False, 0),
        (["<thi"], False, 0),
        (["<think>", "a", "</think>", "<think>", "b", "</think>"], False, 3),
    ],
    ids=["markers", "begun", "spelt", "empty", "last character", "cut off", "answer", "no marker", "second"],
)
def test_the_tokens_up_to_the_end_of_a_thought_are_its_own(
    tokens: list[str], begins_inside: bool, expected: int
) -> None:
    for num_at_a_time in (1, 2, 3, len(tokens)):
        for num_late in (0, 1, 9):
            options = {"num_at_a_time": num_at_a_time, "num_late": num_late}
            assert count(tokens, begins_inside=begins_inside, **options) == expected, options
