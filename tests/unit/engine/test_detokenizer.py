"""Token ids into text, a token at a time, held against the tokenizers' own decoding of the whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer

from engine.detokenizer import Detokenizer
from engine.token_bytes import TokenBytes
from tests.fakes.tiny_tokenizers import END_TOKEN, START_TOKEN, byte_level_tokenizer, sentencepiece_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
SENTENCEPIECE = sentencepiece_tokenizer()
TABLES = {id(raw): TokenBytes(raw) for raw in (BYTE_LEVEL, SENTENCEPIECE)}
both_kinds = pytest.mark.parametrize("raw", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])

# What people write: letters, CJK, emoji with joiners and skin tones, combining marks, control characters.
_texts = st.text(
    alphabet=st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from("aé你好😀👩\u200d👧🏽e\u0301\u0928\u093f \n\t▁\ufffd"),
    ),
    max_size=30,
)


def pieces(raw: RawTokenizer, prompt: list[int], output: list[int]) -> list[str]:
    detokenizer = Detokenizer(TABLES[id(raw)], prompt)
    return [detokenizer.push(token_id) for token_id in output]


def encode(raw: RawTokenizer, text: str) -> list[int]:
    return list(raw.encode(text, add_special_tokens=False).ids)


def id_of(raw: RawTokenizer, token: str) -> int:
    token_id = raw.token_to_id(token)
    assert token_id is not None
    return token_id


def byte_tokens(data: bytes) -> list[int]:
    """Sentencepiece's fallback tokens of these bytes."""
    return [id_of(SENTENCEPIECE, f"<0x{byte:02X}>") for byte in data]


@both_kinds
@given(text=_texts)
def test_joined_pieces_equal_the_tokenizers_own_decoding(raw: RawTokenizer, text: str) -> None:
    prompt = encode(raw, "a b")
    output = encode(raw, text)
    assert raw.decode(prompt) + "".join(pieces(raw, prompt, output)) == raw.decode(prompt + output)


@given(data=st.data())
def test_any_tokens_at_all_decode_as_the_tokenizer_does_up_to_an_unfinished_character(data: st.DataObject) -> None:
    output = data.draw(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=30))
    joined = "".join(pieces(BYTE_LEVEL, encode(BYTE_LEVEL, "a"), output))
    whole = BYTE_LEVEL.decode(output)
    assert joined in (whole, whole.removesuffix("\ufffd"))


@given(text=_texts)
def test_what_has_appeared_is_always_the_beginning_of_the_text(text: str) -> None:
    so_far = ""
    for piece in pieces(BYTE_LEVEL, encode(BYTE_LEVEL, "a"), encode(BYTE_LEVEL, text)):
        so_far += piece
        assert text.startswith(so_far)
    assert so_far == text


def test_an_emoji_split_over_tokens_comes_with_its_last_token() -> None:
    output = [id_of(BYTE_LEVEL, symbol) for symbol in "ðŁĳį"]  # the four bytes of 👍, one token each
    assert pieces(BYTE_LEVEL, encode(BYTE_LEVEL, "ok"), output) == ["", "", "", "👍"]


def test_an_unfinished_character_at_the_end_is_dropped() -> None:
    output = [*encode(BYTE_LEVEL, "ok"), id_of(BYTE_LEVEL, "ð")]
    assert "".join(pieces(BYTE_LEVEL, [], output)) == "ok"


def test_an_invalid_byte_does_not_hold_back_what_follows() -> None:
    """Where `DecodeStream` falls silent."""
    assert pieces(BYTE_LEVEL, [], [id_of(BYTE_LEVEL, "ÿ"), *encode(BYTE_LEVEL, "a")]) == ["\ufffd", "a"]
    assert "".join(pieces(SENTENCEPIECE, [], byte_tokens("你".encode() + b"\xffa"))) == "你\ufffda"


@both_kinds
def test_special_tokens_and_ids_without_a_token_add_no_text(raw: RawTokenizer) -> None:
    output = [id_of(raw, START_TOKEN), *encode(raw, "is"), id_of(raw, END_TOKEN), 100_000]
    assert "".join(pieces(raw, encode(raw, "a"), output)).strip() == "is"


def test_a_special_token_between_the_bytes_of_a_character_is_passed_over() -> None:
    data = byte_tokens("你".encode())
    output = [data[0], id_of(SENTENCEPIECE, END_TOKEN), *data[1:]]
    assert pieces(SENTENCEPIECE, [], output) == ["", "", "", "你"]


def test_a_leading_space_survives_behind_a_prompt() -> None:
    paris = id_of(SENTENCEPIECE, "▁Paris")
    assert pieces(SENTENCEPIECE, [id_of(SENTENCEPIECE, "▁is")], [paris]) == [" Paris"]


def test_a_text_that_begins_with_the_output_has_its_first_space_cut_like_the_whole() -> None:
    start, paris = id_of(SENTENCEPIECE, START_TOKEN), id_of(SENTENCEPIECE, "▁Paris")
    assert pieces(SENTENCEPIECE, [start], [start, paris, paris]) == ["", "Paris", " Paris"]
    assert SENTENCEPIECE.decode([start, start, paris, paris]) == "Paris Paris"


@pytest.mark.parametrize("num_begun", [1, 2, 3])
def test_a_character_that_the_prompt_began_is_completed_by_the_output(num_begun: int) -> None:
    data = byte_tokens("好😀".encode())
    cut = len("好".encode()) + num_begun
    assert pieces(SENTENCEPIECE, data[:cut], data[cut:]) == [""] * (3 - num_begun) + ["😀"]


@both_kinds
def test_a_special_token_made_visible_stands_in_the_text_as_it_is_spelt(raw: RawTokenizer) -> None:
    table = TABLES[id(raw)]
    start, end = id_of(raw, START_TOKEN), id_of(raw, END_TOKEN)
    output = [start, *encode(raw, "a"), end, start]
    shown = Detokenizer(table.showing((start,)), encode(raw, "a b"))
    text = "".join(shown.push(token_id) for token_id in output)
    assert text.replace(" ", "") == f"{START_TOKEN}a{START_TOKEN}"  # sentencepiece puts a space before its words
    assert "".join(pieces(raw, encode(raw, "a b"), output)).strip() == "a"
    assert table.showing(()) is table and table.showing((start,)) is table.showing((start,))
