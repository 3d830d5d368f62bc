"""The order in which a file's lines are run, and what the index says of each line."""

import io
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from producer.batch.line_index import PREFIX_CHARS, LineIndex, ParsedLine, prefix_text
from producer.batch.lines import BadLineError, BatchLine


def chat(custom_id: str, *contents: Any, **body: Any) -> bytes:
    messages = [{"role": "user", "content": content} for content in contents]
    line = {"custom_id": custom_id, "url": "/v1/chat/completions", "body": {"messages": messages, **body}}
    return json.dumps(line).encode() + b"\n"


def scanned(data: bytes, **options: Any) -> LineIndex:
    index = LineIndex(io.BytesIO(data), **options)
    index.scan()
    return index


def code(line: ParsedLine) -> str:
    return line.code if isinstance(line, BadLineError) else line.custom_id


def test_lines_that_begin_alike_come_next_to_each_other_and_the_rest_in_the_files_order() -> None:
    prefixes = [f"{letter * 3000}" for letter in "abc"]
    names = [(prefix, number) for number in range(5) for prefix in prefixes]
    lines = [chat(f"{prefix[0]}{number}", prefix, f"question {number}") for prefix, number in names]
    lines.insert(4, chat("alone", "nothing like it"))
    index = scanned(b"".join(lines))
    order = [code(index.read(number)) for number in index.numbers()]
    assert order == [*(f"a{n}" for n in range(5)), *(f"b{n}" for n in range(5)), *(f"c{n}" for n in range(5)), "alone"]


def test_of_those_that_share_a_beginning_the_ones_that_share_more_come_together() -> None:
    common = "s" * 600
    lines = [chat(f"{n}", common + "xyxyxy"[n] * 3000, str(n)) for n in range(6)]
    index = scanned(b"".join(lines))
    assert [code(index.read(number)) for number in index.numbers()] == ["0", "2", "4", "1", "3", "5"]


def test_a_file_without_common_beginnings_keeps_its_order() -> None:
    index = scanned(b"".join(chat(str(n), f"{n} is different") for n in range(200)))
    assert list(index.numbers()) == list(range(1, 201))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([b"", b"  ", b"{broken", b"\xff", chat("x", "y").strip(), chat("z", "y").strip()])))
def test_every_line_is_found_again_whatever_stands_around_it(lines: list[bytes]) -> None:
    data = b"\n".join(lines)
    seen: dict[int, ParsedLine] = {}
    index = LineIndex(io.BytesIO(data))
    index.scan(seen.__setitem__)
    assert list(seen) == [number for number, line in enumerate(lines, start=1) if line.strip()]
    assert sorted(index.numbers()) == list(seen) and len(index) == len(seen)
    for number, line in seen.items():
        assert code(index.read(number)) == code(line)
        assert index.position(number) == list(seen).index(number)


def test_a_repeated_id_is_named_with_the_line_that_had_it_first() -> None:
    index = scanned(chat("a", "x") + b"\n" + chat("b", "x") + chat("a", "y"))
    repeated = index.read(4)
    assert isinstance(repeated, BadLineError) and repeated.code == "duplicate_custom_id"
    assert "stands on line 1 already" in str(repeated)
    assert isinstance(index.read(1), BatchLine)


def test_a_line_that_is_too_long_is_an_error_and_the_next_is_found_behind_it() -> None:
    data = chat("short", "x") + chat("long", "y" * 5000) + chat("after", "x")
    index = scanned(data, max_line_bytes=200)
    assert [code(index.read(number)) for number in (1, 2, 3)] == ["short", "line_too_long", "after"]


def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    assert code(scanned(b"\xef\xbb\xbf" + chat("a", "x")).read(1)) == "a"


def test_the_beginning_of_a_prompt_is_told_from_any_body() -> None:
    assert prefix_text({"prompt": "a" * 9000}) == "a" * PREFIX_CHARS[-1]
    assert prefix_text({"prompt": [1, 2]}) == "[1, 2]"
    assert prefix_text({"instructions": "rule", "input": "a" * 9000}).startswith("rule\naaa")
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, "no message", 7]
    for body in ({}, {"messages": 3}, {"messages": parts}, {"tools": [{}], "messages": [{"role": "user"}]}):
        assert isinstance(prefix_text(body), str)
