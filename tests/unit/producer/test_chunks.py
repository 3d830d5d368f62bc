"""The short way to a chunk's JSON."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.contract import Chunk, FinishReason, plain_chunk_to_wire

characters = st.characters(exclude_categories=["Cs"]) | st.sampled_from('"\\/\b\f\n\r\t\x00\x1f\x7f\u2028é😀')


@given(
    text=st.text(characters, max_size=8),
    token_ids=st.lists(st.integers(0, 200_000), max_size=3),
    finish_reason=st.none() | st.sampled_from(get_args(FinishReason)),
    token_offset=st.integers(0, 5000),
)
def test_a_plain_chunk_is_written_as_pydantic_writes_it(
    text: str, token_ids: list[int], finish_reason: FinishReason | None, token_offset: int
) -> None:
    chunk = Chunk(
        job_id='job-"1',
        index=1,
        token_offset=token_offset,
        text=text,
        token_ids=token_ids,
        finish_reason=finish_reason,
    )
    assert plain_chunk_to_wire('job-"1', 1, token_offset, text, token_ids, finish_reason) == chunk.to_wire()


def test_text_that_cannot_be_written_down_is_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        plain_chunk_to_wire("job-1", 0, 0, "\ud83d", [1], None)
